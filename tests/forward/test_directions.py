"""Directions: the same bits everywhere, the right moments, never held whole."""

from __future__ import annotations

import hashlib
import math
import statistics

import numpy as np
import numpy.typing as npt
import pytest
import torch

from strategies.forward import directions
from strategies.forward.directions import Direction, add_scaled, chunks, combine, flat, gaussian_table
from strategies.forward.slopes import expected_cosine

GOLDEN_SIGNS = [1.0, -1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 1.0]
GOLDEN_SIGNS_SHA = "f4faf19a1d9b824b8ea70391ee70ccaf317edc839f0fb653bbda54bd035e112d"
GOLDEN_NORMALS = [0.80029296875, 0.559814453125, -0.40673828125, -0.631591796875, 0.927001953125]
GOLDEN_TABLE_SHA = "f32b3e374f6a48d0fce3070d6080b730cb169189d32f1e8ddc2fe121196ba3c2"


def test_golden_rademacher() -> None:
    got = flat(Direction(7, 3, 2, 1), 16)
    assert got.tolist() == GOLDEN_SIGNS
    assert hashlib.sha256(flat(Direction(7, 3, 2, 1), 100_003).tobytes()).hexdigest() == GOLDEN_SIGNS_SHA


def test_golden_gaussian() -> None:
    assert flat(Direction(7, 3, 2, 1), 5, "gaussian").tolist() == GOLDEN_NORMALS
    assert hashlib.sha256(gaussian_table().tobytes()).hexdigest() == GOLDEN_TABLE_SHA


def test_signs_are_the_bits_of_the_raw_words() -> None:
    """Against a naive reading of the generator, bit by bit."""
    from fedllm.randomness import stream

    words = stream(7, "direction", 3, 2, 1).bit_generator.random_raw(2)
    naive = [1.0 if (int(words[i // 64]) >> (i % 64)) & 1 else -1.0 for i in range(100)]
    assert flat(Direction(7, 3, 2, 1), 100).tolist() == naive


def test_no_quantile_sits_on_a_rounding_boundary() -> None:
    """Libraries differ by parts in 1e15; the nearest boundary is 1e9 times as far."""
    normal = statistics.NormalDist()
    upper = [normal.inv_cdf((i + 0.5) / 65536) for i in range(32768, 65536)]
    scale = math.sqrt(math.fsum(q * q for q in upper) / len(upper))
    fractions = np.array([(q / scale * 4096 + 0.5) % 1 for q in upper])
    assert min(fractions.min(), (1 - fractions).min()) > 1e-6


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_moments_and_independence(kind: directions.Kind) -> None:
    rows = np.stack([flat(Direction(0, 1, node, i), 50_000, kind) for node in range(2) for i in range(3)])
    assert np.abs(rows.mean(axis=1)).max() < 5 / math.sqrt(50_000)
    gram = rows @ rows.T / 50_000
    assert np.abs(gram - np.eye(6)).max() < 5 * math.sqrt(2 / 50_000)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "orthogonal"])
def test_chunk_size_does_not_show(kind: directions.Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = flat(Direction(1, 2, 3, 4), 1000, kind)
    monkeypatch.setattr(directions, "CHUNK_ENTRIES", 256)
    pieces = list(chunks(Direction(1, 2, 3, 4), 1000, kind))
    assert [len(piece) for piece in pieces] == [256, 256, 256, 232]
    assert np.array_equal(np.concatenate(pieces), whole)


def rows_of(clients: int, each: int, entries: int, round: int = 1) -> npt.NDArray[np.float64]:
    """Orthogonal directions of a round, [clients * each, entries]."""
    names = [Direction(3, round, node, i) for node in range(clients) for i in range(each)]
    return np.stack([flat(name, entries, "orthogonal") for name in names]).astype(np.float64)


@pytest.mark.parametrize(("clients", "each"), [(1, 64), (4, 16), (8, 8), (64, 1), (2, 64)])
def test_all_orthogonal_directions_give_the_gradient_itself(clients: int, each: int) -> None:
    """The mean of v v' is the identity, whether p is a power of two or less, once or twice around."""
    for entries in (64, 50, 33):
        rows = rows_of(clients, each, entries)
        assert set(np.unique(rows)) == {-1.0, 1.0}
        np.testing.assert_array_equal(rows.T @ rows / len(rows), np.eye(entries))


def test_orthogonal_directions_are_at_right_angles_and_others_in_each_round() -> None:
    rows = rows_of(10, 4, 64)
    np.testing.assert_array_equal(rows @ rows.T, 64 * np.eye(40))
    assert not np.isin(np.abs(rows_of(10, 4, 64, 2) @ rows.T), (0, 64)).all()


@pytest.mark.parametrize(("directions", "entries"), [(10, 50), (32, 50), (48, 64)])
def test_the_error_of_orthogonal_directions_is_that_of_drawing_without_replacement(
    directions: int, entries: int
) -> None:
    """(p - 1)/N (M - N)/(M - 1), which expected_cosine has too; the mean over 2,000 rounds to 5 %."""
    gradient = np.random.default_rng(0).normal(size=entries)
    gradient /= np.linalg.norm(gradient)
    errors, total = [], np.zeros(entries)
    for round in range(2000):
        rows = rows_of(1, directions, entries, round)
        estimate = (rows @ gradient) @ rows / directions
        errors.append(float(np.square(estimate - gradient).sum()))
        total += estimate
    expected = (entries - 1) / directions * (64 - directions) / 63
    assert np.mean(errors) == pytest.approx(expected, rel=0.05)
    assert expected_cosine(directions, entries, "orthogonal") == pytest.approx((1 + expected) ** -0.5)
    assert np.linalg.norm(total / 2000 - gradient) < 3 * math.sqrt(expected / 2000)


def test_chunks_stay_under_16_megabytes() -> None:
    import tracemalloc

    for kind in ("rademacher", "gaussian", "orthogonal"):
        gaussian_table()
        tracemalloc.start()
        for _ in chunks(Direction(0, 0, 0, 0), 3 * directions.CHUNK_ENTRIES, kind):
            pass
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
        tracemalloc.stop()


def test_added_in_name_order_across_tensor_and_chunk_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directions, "CHUNK_ENTRIES", 64)
    tensors = {"b": torch.zeros(7, 11), "a": torch.zeros(130), "c": torch.zeros(())}
    add_scaled(tensors, Direction(5, 1, 0, 9), 0.5)
    walked = torch.cat([tensors[name].reshape(-1) for name in "abc"]).numpy()
    assert np.array_equal(walked, 0.5 * flat(Direction(5, 1, 0, 9), 208))


def test_combine_is_the_weighted_sum_whatever_the_order() -> None:
    terms = {Direction(0, 1, node, i): 0.1 * node - 0.03 * i for node in range(3) for i in range(4)}
    naive = sum(c * flat(v, 33).astype(np.float64) for v, c in terms.items())
    got = combine(terms, 33)
    np.testing.assert_allclose(got, naive, rtol=0, atol=1e-14)
    assert np.array_equal(got, combine(dict(reversed(list(terms.items()))), 33))
