"""Low-rank aggregation against dense arithmetic and numpy's own SVD."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.errors import RejectedReply, RunFailed
from strategies.lora.factors import (
    Factors,
    FactorSum,
    align,
    compact,
    complete,
    leading,
    norm,
    pairs,
    stack,
    truncate,
    unheld,
)

SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 24))
RANKS = st.lists(st.integers(1, 6), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**32 - 1)


def draw(m: int, n: int, rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator))


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_written_as_factors_is_the_matrix(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    factors = complete(matrix)
    assert factors.rank == min(shape)
    assert {factors.a.dtype, factors.b.dtype} == {dtype}
    assert torch.equal(factors.b @ factors.a, matrix)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-300))


@given(SHAPES, RANKS, SEEDS)
@settings(deadline=None)
def test_stacked_factors_are_the_dense_weighted_sum(
    shape: tuple[int, int], ranks: list[int], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet(np.ones(len(ranks)))
    scales = [
        float(alpha) / rank for alpha, rank in zip(generator.integers(1, 64, len(ranks)), ranks, strict=True)
    ]
    parts = [draw(*shape, rank, seed + k) for k, rank in enumerate(ranks)]
    dense = sum(
        float(p) * s * part.b.double() @ part.a.double()
        for p, s, part in zip(shares, scales, parts, strict=True)
    )
    stacked = stack(parts, [float(p) * s for p, s in zip(shares, scales, strict=True)])
    assert stacked.rank == sum(ranks)
    assert relative(stacked.product(), dense) <= 1e-12


@given(SHAPES, st.integers(1, 40), st.integers(1, 30), SEEDS)
@settings(deadline=None)
def test_truncation_is_the_optimum(shape: tuple[int, int], stacked: int, rank: int, seed: int) -> None:
    factors = draw(*shape, stacked, seed)
    dense = factors.product()
    singular = np.linalg.svd(dense.numpy(), compute_uv=False)
    least = float(np.sqrt((singular[rank:] ** 2).sum()))
    kept = truncate(factors, rank)
    assert (kept.b.shape, kept.a.shape) == ((shape[0], rank), (rank, shape[1]))
    assert (kept.product() - dense).norm() <= least * (1 + 1e-4) + 1e-9 * singular[0]
    for smaller in range(1, rank):  # every cut of it is the optimum of its own rank: what views rely on
        error = (leading(kept, smaller).product() - dense).norm()
        assert error <= np.sqrt((singular[smaller:] ** 2).sum()) * (1 + 1e-4) + 1e-9 * singular[0]


def test_truncation_leaves_no_component_dead() -> None:
    silent = Factors(torch.zeros(12, 4), torch.randn(4, 9, generator=torch.Generator().manual_seed(0)))
    kept = truncate(silent, 4)
    assert kept.product().norm() < 1e-12
    torch.testing.assert_close(kept.a @ kept.a.T, torch.eye(4, dtype=torch.float64) / 3)


@given(SHAPES, st.integers(1, 30), SEEDS)
@settings(deadline=None)
def test_norm_complete_and_compact_keep_the_product(shape: tuple[int, int], rank: int, seed: int) -> None:
    factors = draw(*shape, rank, seed)
    dense = factors.product()
    assert float(norm(factors)) == pytest.approx(float(dense.norm()), rel=1e-9)
    assert complete(dense).rank == min(shape)
    assert relative(complete(dense).product(), dense) == 0
    small = compact(stack([factors, factors], [2.0, -1.0]))
    assert small.rank <= min(*shape, rank)
    assert relative(small.product(), dense) <= 1e-6


@given(SHAPES, st.integers(1, 6), SEEDS)
@settings(deadline=None)
def test_aligned_signs_agree_with_the_previous_factors(shape: tuple[int, int], rank: int, seed: int) -> None:
    factors = truncate(draw(*shape, 8, seed), rank)
    signs = torch.tensor(np.random.default_rng(seed).choice([-1.0, 1.0], rank))
    flipped = Factors(factors.b * signs, factors.a * signs[:, None])
    torch.testing.assert_close(align(flipped, factors), factors)


@pytest.mark.parametrize(("count", "dense"), [(3, False), (12, True)])
def test_sum_of_replies_is_dense_sum_whatever_the_order(count: int, dense: bool) -> None:
    m, n = 20, 33
    tensors = {"q.lora_A.w": torch.zeros(4, n), "q.lora_B.w": torch.zeros(m, 4), "head": torch.zeros(5)}
    ranks, weights = [1 + k % 4 for k in range(count)], [1 + 7 * k for k in range(count)]
    parts = [draw(m, n, rank, k) for k, rank in enumerate(ranks)]
    wanted = sum(w * p.b.double() @ p.a.double() for w, p in zip(weights, parts, strict=True)) / sum(weights)
    seen = []
    orders = itertools.islice(itertools.permutations(range(count)), 0, 7, 3)
    for order in [*orders, range(count)[::-1]]:
        total = FactorSum(tensors, ["head"])
        for k in order:
            total.add(k, {"q": parts[k]}, {"head": torch.full((5,), float(k))}, weights[k])
        factors = total.product("q")
        assert (factors.rank == min(m, n)) is dense
        assert relative(factors.product(), wanted) <= 1e-6
        mean = sum(w * k for k, w in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(total.plain(), {"head": torch.full((5,), mean)})
        seen.append((factors.b.numpy().tobytes(), factors.a.numpy().tobytes()))
    assert len(set(seen)) == 1


def test_a_reply_folded_in_half_is_never_part_of_a_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer has taken it in when memory runs out over the second."""
    shapes = {"A": (2, 8), "B": (8, 2)}
    tensors = {f"{layer}.lora_{f}.w": torch.zeros(shapes[f]) for layer in "qv" for f in shapes}
    total = FactorSum(tensors, [])
    part = {layer: draw(8, 8, 4, 0) for layer in "qv"}
    total.add(0, part, {}, 1)
    left = iter([part["q"].product()])

    def product(self: Factors) -> torch.Tensor:
        for value in left:
            return value
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Factors, "product", product)
        with pytest.raises(MemoryError):
            total.add(1, part, {}, 1)
    total.add(2, part, {}, 1)
    with pytest.raises(RunFailed, match="sum is not whole; go on from the last checkpoint"):
        total.product("q")


def test_too_large_a_reply_is_rejected_and_leaves_no_trace() -> None:
    tensors = {"q.lora_A.w": torch.zeros(2, 8), "q.lora_B.w": torch.zeros(8, 2), "head": torch.zeros(2)}
    good, huge = draw(8, 8, 2, 0), Factors(torch.full((8, 2), 1e5), torch.full((2, 8), 1e14))
    head = {"head": torch.ones(2)}
    clean, tried = FactorSum(tensors, ["head"]), FactorSum(tensors, ["head"])
    for total in (clean, tried):
        for node in range(6):
            total.add(node, {"q": good}, head, 3)
            if total is tried:
                with pytest.raises(RejectedReply, match="too large"):
                    total.add(9, {"q": huge}, head, 3)
    assert (tried.count, tried.weight, tried.weight_of_rank) == (6, 18, {2: 18})
    assert torch.equal(tried.product("q").product(), clean.product("q").product())
    assert torch.equal(tried.plain()["head"], clean.plain()["head"])


def test_what_no_client_held_is_what_averaging_would_forget() -> None:
    whole = draw(9, 7, 4, 3)
    weights = {1: 5, 3: 2, 4: 3}
    held = stack([leading(whole, rank) for rank in weights], [weight / 10 for weight in weights.values()])
    both = held.product() + unheld(whole, weights).product()
    torch.testing.assert_close(both, whole.product())
    assert unheld(whole, {4: 8}).product().norm() == 0


def test_pairs_are_found_by_both_names() -> None:
    names = [
        "m.0.query.lora_A.default.weight",
        "m.0.query.lora_B.default.weight",
        "m.0.query.lora_B.default.bias",
        "m.1.query.lora_B.default.weight",  # its A is frozen
        "emb.lora_embedding_A.default",
        "emb.lora_embedding_B.default",
        "fc.weight",
        "m.0.query.base_A",
    ]
    assert pairs(names) == {
        "m.0.query": ("m.0.query.lora_B.default.weight", "m.0.query.lora_A.default.weight"),
        "emb": ("emb.lora_embedding_B.default", "emb.lora_embedding_A.default"),
    }


def test_an_svd_that_does_not_converge_is_taken_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = draw(11, 6, 3, 1)
    wanted = truncate(factors, 2).product()

    refused: list[torch.Tensor] = []

    def svd(matrix: torch.Tensor, full_matrices: bool) -> object:
        if not refused or torch.equal(matrix, refused[0]):
            refused.append(matrix)
            raise torch._C._LinAlgError("linalg.svd: The algorithm failed to converge")
        return map(torch.from_numpy, np.linalg.svd(matrix.numpy(), full_matrices))

    monkeypatch.setattr(torch.linalg, "svd", svd)
    torch.testing.assert_close(truncate(factors, 2).product(), wanted)
    assert len(refused) == 1
