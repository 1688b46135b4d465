"""Exact aggregation of low-rank products, on factors alone.

LoRA (Hu et al., ICLR 2022) adds s B A to a frozen weight W, with B [m, r], A [r, n] and s = alpha / r. What a
federation wants is the dense sum of p_k s_k B_k A_k. It is itself a product of stacked factors,

    sum_k p_k s_k B_k A_k = [B_1 ... B_K] [p_1 s_1 A_1; ...; p_K s_K A_K]                (FLoRA)

so its singular values come from two thin QR decompositions and the SVD of a small core; nothing of size
m x n is ever formed. All arithmetic here is float64: it is small, and it decides every client's next model.

Layers that store W transposed (GPT-2's Conv1D) keep A and B as above, so nothing here needs to know of them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from fedllm.errors import RunFailed
from fedllm.sums import WeightedSum
from fedllm.tensors import Tensors, TensorSpec, spec_of

__all__ = [
    "A_ROW",
    "FactorSum",
    "Factors",
    "NormSum",
    "align",
    "compact",
    "complete",
    "leading",
    "norm",
    "pairs",
    "singular",
    "stack",
    "truncate",
    "unheld",
]

A_ROW = 1.0 / math.sqrt(3.0)
"""Length of a row of A as LoRA initialises it: n values, uniform in +-1/sqrt(n)."""

_NAME = re.compile(r"(?P<layer>.+)\.lora_(?P<kind>embedding_)?A\b(?P<adapter>.*)")


class Factors(NamedTuple):
    """A product B A of rank at most r: ``b`` is [m, r], ``a`` is [r, n]."""

    b: torch.Tensor
    a: torch.Tensor

    @property
    def rank(self) -> int:
        """Columns of B, rows of A."""
        return self.a.shape[0]

    def product(self) -> torch.Tensor:
        """The dense [m, n], float64."""
        return self.b.double() @ self.a.double()


def pairs(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Map each layer that has both factors among ``names`` to the names of its B and its A.

    >>> pairs(["q.lora_A.default.weight", "q.lora_B.default.weight", "head.weight"])
    {'q': ('q.lora_B.default.weight', 'q.lora_A.default.weight')}
    """
    known = set(names)
    found = {}
    for name in sorted(known):
        if match := _NAME.fullmatch(name):
            partner = f"{match['layer']}.lora_{match['kind'] or ''}B{match['adapter']}"
            if partner in known:
                found[match["layer"]] = (partner, name)
    return found


def leading(factors: Factors, rank: int) -> Factors:
    """The first ``rank`` components, or all: after :func:`truncate`, the best truncation to that rank."""
    return Factors(factors.b[:, :rank], factors.a[:rank])


def stack(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return factors of sum_k w_k B_k A_k, of rank sum_k r_k, in float64 (FLoRA, Wang et al., NeurIPS 2024).

    >>> one, two = Factors(torch.ones(2, 1), torch.ones(1, 3)), Factors(torch.ones(2, 2), torch.ones(2, 3))
    >>> stack([one, two], [0.5, 0.25]).product().tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    b = torch.cat([part.b.double() for part in parts], dim=1)
    a = torch.cat([part.a.double() * weight for part, weight in zip(parts, weights, strict=True)])
    return Factors(b, a)


def complete(matrix: torch.Tensor) -> Factors:
    """Write a dense [m, n] as factors of rank min(m, n), one of which is the identity."""
    m, n = matrix.shape
    if m <= n:
        return Factors(torch.eye(m, dtype=matrix.dtype), matrix)
    return Factors(matrix, torch.eye(n, dtype=matrix.dtype))


def norm(factors: Factors) -> torch.Tensor:
    """Frobenius norm of the product: ||B A||^2 = <B' B, A A'>, without forming it.

    >>> norm(Factors(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0, 0.0]]))).item()
    10.0
    """
    a, b = factors.a.double(), factors.b.double()
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0.0).sqrt()


def truncate(factors: Factors, rank: int) -> Factors:
    """Return the best factors of ``rank`` (Eckart-Young), largest component first, in float64.

    QR of both stacks, then the SVD of the R x R core: O((m + n) R^2). A gets orthogonal rows of the length
    that LoRA's own initialisation gives them and B carries the singular values, as B does in training: so a
    component of size zero still learns, where a split of the root between both would leave it dead.

    Args:
        factors: any rank R.
        rank: of the result; padded with zeros beyond min(R, m, n).
    """
    u, s, vt = _svd(factors)
    kept = min(rank, len(s))
    b, a = u[:, :kept] * (s[:kept] / A_ROW), vt[:kept] * A_ROW
    if kept == rank:
        return Factors(b, a)
    return Factors(
        torch.nn.functional.pad(b, (0, rank - kept)), torch.nn.functional.pad(a, (0, 0, 0, rank - kept))
    )


def compact(factors: Factors) -> Factors:
    """Return the same product without the components that float32 cannot tell from zero; rank at least 1."""
    u, s, vt = _svd(factors)
    kept = max(1, int((s > s[0] * torch.finfo(torch.float32).eps).sum()))
    return Factors(u[:, :kept] * s[:kept], vt[:kept])


def singular(factors: Factors, rank: int) -> Factors:
    """Return the leading singular vectors of the product: columns of b [m, rank], rows of a [rank, n].

    Args:
        factors: of at least that rank.
        rank: of the result, at most min(m, n).

    >>> found = singular(Factors(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0, 0.0]])), 1)
    >>> found.product().abs().round(decimals=6).tolist()
    [[0.6, 0.0], [0.8, 0.0]]
    """
    u, _, vt = _svd(factors)
    return Factors(u[:, :rank], vt[:rank])


def align(factors: Factors, previous: Factors) -> Factors:
    """Turn the sign of each component to that of ``previous``; the product stays as it is.

    An SVD leaves signs open. Without this a round that changes nothing could still send a downlink full of
    flipped signs.
    """
    sign = torch.where((factors.a * previous.a).sum(1) < 0, -1.0, 1.0).to(factors.a)
    return Factors(factors.b * sign, factors.a * sign[:, None])


def unheld(factors: Factors, weight_of_rank: Mapping[int, int]) -> Factors:
    """What the cohort could not hold of the global product: B diag(1 - d) A.

    d_j is the share of weight of the clients whose rank exceeds j. Each client started from the leading r_k
    components; averaging what they return forgets component j by the factor d_j in every round, until only
    the smallest rank is left ("rank collapse", raFLoRA). Adding this to their average gives

        P + sum_k p_k (B_k A_k - P truncated to r_k),

    the mean of the clients' CHANGES: a component fades only if a client that holds it makes it fade.

    Args:
        factors: the global factors that clients' own were cut from.
        weight_of_rank: total weight of the accepted replies of each rank.
    """
    total = sum(weight_of_rank.values())
    absent = [sum(w for rank, w in weight_of_rank.items() if rank <= j) / total for j in range(factors.rank)]
    return Factors(
        factors.b.double(), factors.a.double() * torch.tensor(absent, dtype=torch.float64)[:, None]
    )


class FactorSum:
    """Weighted mean of low-rank products, and of whatever else the replies hold; order-free to the bit.

    Replies' factors wait to be stacked, sorted by node. Once a matrix's stacked ranks reach min(m, n), they
    cost more than the matrix itself: its products are then added in fixed point to one dense m x n.
    Ranks only add up, so which of the two happens depends on the accepted replies alone, not on their order.

    Args:
        tensors: the global tensors: names, and the m and n of each pair of factors.
        plain: names averaged as they are.
    """

    def __init__(self, tensors: Tensors, plain: Iterable[str]) -> None:
        self.layers, self.names = pairs(tensors), tuple(plain)
        self.weight_of_rank: Counter[int] = Counter()
        self.count = 0
        self._plain = WeightedSum(
            spec_of({name: tensors[name] for name in self.names}) | {_REACH: TensorSpec(())}
        )
        self._waiting: dict[str, dict[int, tuple[Factors, int]]] = {layer: {} for layer in self.layers}
        self._dense: dict[str, WeightedSum] = {}
        self._whole = True

    @property
    def weight(self) -> int:
        """Total weight folded."""
        return self._plain.weight

    def add(self, node: int, factors: Mapping[str, Factors], plain: Tensors, weight: int) -> None:
        """Fold one reply in.

        Args:
            node: who sent it; a node is folded once.
            factors: by layer, in full (not as a difference), all of the reply's rank.
            plain: the tensors named so at the start.
            weight: positive integer.

        Raises:
            RejectedReply: a value is too large for exact sums; nothing was folded.
        """
        # Summing a bound of the products along with the rest makes one check cover everything.
        reach = max((_reach(item) for item in factors.values()), default=0.0)
        self._plain.add(plain | {_REACH: torch.tensor(reach, dtype=torch.float64)}, weight)
        self.count += 1
        self.weight_of_rank[max((item.rank for item in factors.values()), default=0)] += weight
        whole, self._whole = self._whole, False  # unless every layer gets its part
        for layer, item in factors.items():
            self._add(layer, node, item, weight)
        self._whole = whole

    def _add(self, layer: str, node: int, item: Factors, weight: int) -> None:
        if layer in self._dense:
            self._dense[layer].add({"": item.product()}, weight)
            return
        waiting = self._waiting[layer]
        waiting[node] = (item, weight)
        m, n = item.b.shape[0], item.a.shape[1]
        if sum(held.rank for held, _ in waiting.values()) >= min(m, n):
            self._dense[layer] = WeightedSum({"": TensorSpec((m, n), torch.float64)})
            for held, share in waiting.values():
                self._dense[layer].add({"": held.product()}, share)
            waiting.clear()

    def product(self, layer: str) -> Factors:
        """Factors of the weighted mean of one layer's products, float64.

        Raises:
            RunFailed: a reply was folded in half, because memory ran out over it.
        """
        if not self._whole:
            raise RunFailed(
                "the server failed half way through folding a reply (its log says how), and the round's sum "
                "is not whole; go on from the last checkpoint, if memory ran out with a smaller tuning.rank"
            )
        if layer in self._dense:
            return complete(self._dense[layer].mean()[""])
        waiting = [self._waiting[layer][node] for node in sorted(self._waiting[layer])]
        return stack([item for item, _ in waiting], [weight / self.weight for _, weight in waiting])

    def plain(self) -> Tensors:
        """Weighted mean of the other tensors."""
        return {name: value for name, value in self._plain.mean().items() if name != _REACH}


class NormSum:
    """HetLoRA's mean of factors (Cho et al., EMNLP 2024): zero-padded, weighted by ||B_k A_k||_F.

    Clients whose adapter does more count more; ``weight`` multiplies the norm: equal norms give FedAvg.

    Args:
        tensors: the global tensors; other names than factors are averaged plainly.
        plain: those other names.
    """

    def __init__(self, tensors: Tensors, plain: Iterable[str]) -> None:
        self.layers, self.names = pairs(tensors), tuple(plain)
        self._tensors = tensors
        padded = [name for pair in self.layers.values() for name in pair]
        spec = {name: TensorSpec(tuple(tensors[name].shape), torch.float64) for name in padded}
        norms = {_norm_of(layer): TensorSpec((), torch.float64) for layer in self.layers}
        self._sum = WeightedSum(spec | norms | spec_of({name: tensors[name] for name in self.names}))

    @property
    def count(self) -> int:
        """Replies folded."""
        return self._sum.count

    def add(self, node: int, factors: Mapping[str, Factors], plain: Tensors, weight: int) -> None:
        """Fold one reply in, as :meth:`FactorSum.add` does."""
        folded = dict(plain)
        for layer, item in factors.items():
            b, a = self.layers[layer]
            size = norm(item)
            folded[_norm_of(layer)] = size
            folded[b] = _widen(item.b.double() * size, self._tensors[b])
            folded[a] = _widen(item.a.double() * size, self._tensors[a])
        self._sum.add(folded, weight)

    def factors(self, layer: str) -> Factors | None:
        """The weighted mean of one layer's factors; ``None`` where every product is zero."""
        mean = self._sum.mean()
        b, a = self.layers[layer]
        size = mean[_norm_of(layer)]
        return Factors(mean[b] / size, mean[a] / size) if size > 0 else None

    def plain(self) -> Tensors:
        """Weighted mean of the other tensors."""
        return {name: value for name, value in self._sum.mean().items() if name in self.names}


_REACH = "\0reach"


def _norm_of(layer: str) -> str:
    return f"{layer}\0norm"


def _reach(factors: Factors) -> float:
    """Bound on the largest value of the product: Cauchy-Schwarz on rows of B and columns of A."""
    rows, columns = factors.b.double().norm(dim=1), factors.a.double().norm(dim=0)
    return float(rows.max() * columns.max()) * (1.0 + 1e-9)


def _widen(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    padding = [
        missing
        for old, new in zip(tensor.shape[::-1], like.shape[::-1], strict=True)
        for missing in (0, new - old)
    ]
    return torch.nn.functional.pad(tensor, padding)


def _svd(factors: Factors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Thin SVD of the product, from its factors: U [m, k], S [k], V' [k, n] with k = min(R, m, n)."""
    qb, rb = torch.linalg.qr(factors.b.double())
    qa, ra = torch.linalg.qr(factors.a.double().T)
    core = rb @ ra.T
    try:
        u, s, vt = torch.linalg.svd(core, full_matrices=False)
    except RuntimeError:
        u, s, vt = _turned_svd(core)
    return qb @ u, s, vt @ qa.T


def _turned_svd(core: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Thin SVD where LAPACK's divide and conquer did not converge, which happens on rare matrices.

    Turned by a rotation, the same values are another matrix to it: core Q = U S (V'Q), so V' = (V'Q) Q'.
    """
    generator = torch.Generator().manual_seed(0)
    columns = core.shape[1]
    turn = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=core.dtype)).Q
    u, s, turned = torch.linalg.svd(core @ turn, full_matrices=False)
    return u, s, turned @ turn.T
