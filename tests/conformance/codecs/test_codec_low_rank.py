"""Low-rank compression of updates, and the mistakes that published code makes with it."""

from __future__ import annotations

import re

import pytest
import torch

from fedllm.codecs import CodecContext, measure, parse
from fedllm.codecs.base import HEADER_BYTES
from fedllm.codecs.stages.low_rank import LowRank, energy_rank, largest_rank
from fedllm.tensors import Tensors, dense_bytes, spec_of

CONTEXT = CodecContext(seed=1, path=("up", 3, 1))
methods = pytest.mark.parametrize("method", ["svd", "power"])


def matrix(m: int, n: int, values: list[float]) -> torch.Tensor:
    """Return an m x n matrix with these singular values."""
    generator = torch.Generator().manual_seed(m + n)
    u = torch.linalg.qr(torch.randn(m, len(values), generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64))[0]
    return ((u * torch.tensor(values, dtype=torch.float64)) @ v.T).float()


def decoded(text: str, tensors: Tensors, progress: float = 0.0) -> Tensors:
    codec = parse(text)
    context = CodecContext(seed=1, path=("up", 3, 1), progress=progress)
    return codec.decode(codec.encode(tensors, {}, context)[0], spec_of(tensors), {}, context)[0]


@pytest.mark.parametrize(
    ("share", "rank"), [(0.5, 1), (0.64, 1), (0.65, 2), (0.95, 2), (0.9999, 3), (1.0, 3)]
)
def test_rank_is_the_smallest_that_holds_the_energy(share: float, rank: int) -> None:
    s = torch.tensor([8.0, 5.8, 1.5])
    total = float(s.double().square().sum())
    assert energy_rank(s, share, total) == rank
    assert float(s[:rank].double().square().sum()) >= share * total
    assert rank == 1 or float(s[: rank - 1].double().square().sum()) < share * total


@methods
@pytest.mark.parametrize(("m", "n"), [(60, 90), (90, 60), (70, 70)])
def test_energy_is_kept_on_any_shape_with_the_fewest_values(method: str, m: int, n: int) -> None:
    x = matrix(m, n, [10.0, 5.0, 2.0, 1.0, 0.5, 0.1])
    y = decoded(f"low_rank(energy=0.95, method={method})", {"x": x})["x"]
    assert torch.linalg.matrix_rank(y.double(), rtol=1e-4) == 2
    # 1 - (100 + 25) / 130.26 of the energy is in the four values left out.
    assert float((x - y).square().sum() / x.square().sum()) == pytest.approx(5.26 / 130.26, rel=1e-3)


@methods
def test_a_matrix_of_full_rank_is_sent_not_dropped(method: str) -> None:
    x = torch.eye(64)
    assert torch.equal(decoded(f"low_rank(energy=1.0, method={method})", {"x": x})["x"], x)


@methods
def test_rank_one_and_zero_matrices_keep_one_value(method: str) -> None:
    x = {"one": matrix(50, 40, [3.0]), "zero": torch.zeros(50, 40)}
    y = decoded(f"low_rank(energy=0.5, method={method})", x)
    torch.testing.assert_close(y["one"], x["one"], atol=1e-5, rtol=1e-4)
    assert not y["zero"].any()


@pytest.mark.slow
@methods
def test_flat_spectra_go_dense_instead_of_growing(method: str) -> None:
    x = {"x": torch.randn(768, 768, generator=torch.Generator().manual_seed(0))}
    payload, _ = parse(f"low_rank(energy=0.95, method={method})").encode(x, {}, CONTEXT)
    assert len(payload) <= 4 * 768 * 768 + HEADER_BYTES
    assert torch.equal(decoded(f"low_rank(energy=0.95, method={method})", x)["x"], x["x"])


@methods
def test_a_flat_matrix_goes_dense_beside_one_that_is_not(method: str) -> None:
    flat = torch.randn(90, 90, generator=torch.Generator().manual_seed(0))
    x = {"flat": flat, "low": matrix(300, 200, [2.0, 1.0])}
    y = decoded(f"low_rank(energy=0.99, method={method})", x)
    assert torch.equal(y["flat"], x["flat"])
    payload, _ = parse(f"low_rank(energy=0.99, method={method})").encode(x, {}, CONTEXT)
    assert len(payload) == HEADER_BYTES + 4 + 4 * (90 * 90 + 2 * 500)


def test_dense_is_chosen_from_where_factors_are_no_smaller() -> None:
    for m, n in [(768, 768), (384, 8), (5, 384), (2, 2), (1, 50), (1000, 3)]:
        k = largest_rank(m, n)
        assert k < m * n / (m + n + 1) <= k + 1


def test_an_svd_that_does_not_converge_goes_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", diverge)
    x = {"x": matrix(50, 40, [3.0, 1.0])}
    for method in ("svd", "power"):
        assert torch.equal(decoded(f"low_rank(energy=0.5, method={method})", x)["x"], x["x"])


def test_the_share_rises_with_progress() -> None:
    x = {"x": matrix(80, 60, [1.0] * 8)}
    ranks = [
        torch.linalg.matrix_rank(decoded('low_rank(energy="0.4->0.9")', x, t)["x"], rtol=1e-3)
        for t in (0, 0.5, 1)
    ]
    assert [int(rank) for rank in ranks] == [4, 6, 8]
    assert LowRank("0.95->0.98").share(1.0) == pytest.approx(0.98)


def test_power_iteration_is_close_to_the_optimum() -> None:
    x = {"x": matrix(300, 200, [1 / (1 + i) for i in range(200)])}
    best, near = (decoded(f"low_rank(rank=8, method={method})", x)["x"] for method in ("svd", "power"))
    optimum = sum(1 / (1 + i) ** 2 for i in range(8, 200)) ** 0.5
    assert float((x["x"] - best).norm()) == pytest.approx(optimum, rel=1e-3)
    assert float((x["x"] - near).norm()) <= 1.02 * optimum


def test_quantised_factors_cost_a_quarter_and_little_accuracy() -> None:
    x = {"x": matrix(400, 300, [2.0**-i for i in range(12)])}
    exact = measure(parse("low_rank(rank=6)"), x, CONTEXT)
    coarse = measure(parse("low_rank(rank=6) | quantize(bits=8)"), x, CONTEXT)
    assert coarse.bytes < 0.26 * exact.bytes
    assert coarse.error < exact.error + 0.01


def test_convolutions_are_matrices_of_their_first_axis() -> None:
    x = {"x": matrix(24, 90, [4.0, 1.0]).reshape(24, 10, 9)}
    torch.testing.assert_close(decoded("low_rank(rank=2)", x)["x"], x["x"], atol=1e-5, rtol=1e-4)


ADAPTER = {"lora_A": matrix(8, 384, [2.0, 1.0]), "lora_B": matrix(384, 8, [2.0, 1.0])}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("low_rank(rank=2) | random_k(fraction=0.1)", "go uncompressed, since errors of two factors"),
        (
            "low_rank(rank=2) | rotate | quantize(bits=1)",
            "go uncompressed, since errors of two factors",
        ),
        ("top_k(fraction=0.99)", "updates would go uncompressed, since it makes them no smaller"),
        ("low_rank(rank=8)", r'low_rank\(rank=8, method="svd"\) leaves each tensor as it is, even lora_'),
        ("ef21(top_k(fraction=1.0))", "updates would go uncompressed"),
        ("per_tensor(matrices=low_rank(rank=8))", "leaves each tensor as it is"),
    ],
)
def test_a_chain_of_which_nothing_is_left_does_not_fit(text: str, reason: str) -> None:
    """What is refused: a payload as long as the values themselves."""
    codec = parse(text)
    assert re.match(f"^.*{reason}", codec.misfit(spec_of(ADAPTER)))
    payload, _ = codec.encode(ADAPTER, {}, CONTEXT)
    assert len(payload) >= dense_bytes(spec_of(ADAPTER))


@pytest.mark.parametrize(
    "text",
    [
        "low_rank(rank=2) | random_k(fraction=0.9)",
        "error_feedback(low_rank(rank=2) | random_k(fraction=0.1))",  # which leaves the factor out
        "low_rank(energy=0.9) | quantize(bits=8)",
        "low_rank(rank=7)",
        'low_rank(energy="0.3->1.0")',  # which is 1 at the end, where each tensor goes as it is
        "random_k(fraction=0.1)",
        "per_tensor(matrices=low_rank(rank=4), vectors=top_k(fraction=1.0))",  # there are no vectors
    ],
)
def test_a_chain_that_makes_an_update_smaller_fits(text: str) -> None:
    codec = parse(text)
    assert codec.misfit(spec_of(ADAPTER)) == ""
    payload, _ = codec.encode(ADAPTER, {}, CONTEXT)
    assert len(payload) < 0.99 * dense_bytes(spec_of(ADAPTER))


def test_low_rank_needs_a_matrix() -> None:
    slopes = spec_of({"slopes": torch.ones(10)})
    assert "leaves each tensor as it is, even slopes [10]" in parse("low_rank(energy=0.9)").misfit(slopes)
