"""Low-rank layout: a matrix travels as two thin factors where they are smaller.

FedKD's dynamic gradient approximation (Wu et al., Nature Communications 2022): keep the fewest
singular values that hold a share T of the squared norm, with T rising over the run.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from fedllm.codecs.base import CodecContext, Reader
from fedllm.codecs.chain import Rows, Shapes, generator
from fedllm.codecs.stages.concatenate import Concatenate
from fedllm.errors import CodecError, ConfigError
from fedllm.tensors import Spec, Tensors

__all__ = ["LowRank", "energy_rank", "largest_rank"]

Factors = tuple[torch.Tensor, torch.Tensor]
"""U sqrt(S) and V sqrt(S) as rows: [k, m] and [k, n]."""


@dataclass(frozen=True)
class LowRank:
    """``low_rank``: every matrix P [m, n] as k columns of U sqrt(S) and k of V sqrt(S), P = U S V'.

    Tensors of more axes are matrices of their first axis; vectors, and matrices whose k reaches
    m n / (m + n + 1), go as they are. Singular vectors travel as rows, so a following quantizer gives each a
    scale of its own.

    Attributes:
        energy: share T of the squared singular values to keep, in (0, 1]: a number, or "0.95->0.98" for
            T(t) = 0.95 + 0.03 t with t the progress of the run.
        rank: fixed k instead; exactly one of the two is set.
        method: ``svd`` is exact; ``power`` is randomised subspace iteration (Halko et al., SIAM Review 2011,
            algorithm 4.4), within a few percent of the least error and many times faster.
    """

    energy: float | str | None = None
    rank: int | None = None
    method: str = "svd"

    name = "low_rank"
    example = "low_rank(energy=0.95) | quantize(bits=8)"
    rate = "bits k (m + n) / (m n)"
    cost = "svd: O(m n min(m, n)); power: O(m n k)"
    kind = "layout"
    multiplies = True

    linear = False
    unbiased = False
    contractive = True

    def __post_init__(self) -> None:
        if (self.energy is None) == (self.rank is None):
            raise ConfigError("low_rank takes either energy, as in energy=0.95, or rank, as in rank=4")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"low_rank takes rank from 1, got {self.rank}")
        if self.energy is not None and not all(0 < share <= 1 for share in _schedule(self.energy)):
            raise ConfigError(f"low_rank takes energy above 0 and up to 1, got {self.energy}")
        if self.method not in ("svd", "power"):
            raise ConfigError(f"low_rank takes method svd or power, got {self.method}")

    def contracted(self) -> Self:
        """Return itself."""
        return self

    def share(self, progress: float) -> float:
        """Return T at a progress in [0, 1].

        >>> round(LowRank("0.95->0.98").share(0.5), 4)
        0.965
        """
        start, end = _schedule(1.0 if self.energy is None else self.energy)
        return start + (end - start) * min(max(progress, 0.0), 1.0)

    def encode(self, tensors: Tensors, context: CodecContext) -> tuple[Rows, bytes]:
        """Return factors, then what goes as it is; the side information is two bytes of k per matrix."""
        rows: Rows = []
        ranks = []
        rest = dict(tensors)
        for name in _matrices(tensors):
            matrix = tensors[name].detach().to(torch.float32).flatten(1)
            factors = self._factors(matrix, context, name)
            if factors is not None:
                rows.extend(factor.numpy() for factor in factors)
                del rest[name]
            ranks.append(0 if factors is None else factors[0].shape[0])
        remaining, _ = Concatenate().encode(rest, context)
        if kept := [rank for rank in ranks if rank]:
            context.notes["rank"] = sum(kept) / len(kept)
        if self.energy is not None:
            context.notes["energy"] = self.share(context.progress)
        return [*rows, *remaining], np.array(ranks, "<u2").tobytes()

    def outline(self, spec: Spec, reader: Reader) -> tuple[Shapes, dict[str, int]]:
        """Return shapes and each factored matrix's k; a k that would not have been sent is an error."""
        names = _matrices(spec)
        ranks = np.frombuffer(reader.take(2 * len(names), "ranks"), "<u2").tolist()
        factored = {name: rank for name, rank in zip(names, ranks, strict=True) if rank}
        shapes = []
        for name, rank in factored.items():
            m, n = _shape(spec[name].shape)
            if rank > largest_rank(m, n):
                raise CodecError(f"payload has rank {rank} for {name} [{m}, {n}], dense would be smaller")
            shapes += [(rank, m), (rank, n)]
        rest = {name: item for name, item in spec.items() if name not in factored}
        return shapes + Concatenate().outline(rest, reader)[0], factored

    def decode(self, rows: Rows, plan: dict[str, int], spec: Spec) -> Tensors:
        """Multiply the factors."""
        rest = {name: item for name, item in spec.items() if name not in plan}
        _, names = Concatenate().outline(rest, Reader(b""))
        tensors = Concatenate().decode(rows[2 * len(plan) :], names, rest)
        for index, name in enumerate(plan):
            left, right = (torch.from_numpy(factor) for factor in rows[2 * index : 2 * index + 2])
            tensors[name] = (left.T @ right).reshape(spec[name].shape)
        return tensors

    def _factors(self, matrix: torch.Tensor, context: CodecContext, name: str) -> Factors | None:
        bound = largest_rank(*matrix.shape)
        if not bound:
            return None
        try:
            if self.method == "power":
                return self._power(matrix, bound, context, name)
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch has it, its stubs do not say so
            return None  # did not converge: the matrix goes as it is
        return self._truncated(u, s, vh, bound, context.progress, s.double().square().sum().item())

    def _truncated(
        self, u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, bound: int, progress: float, total: float
    ) -> Factors | None:
        rank = self.rank or energy_rank(s, self.share(progress), total)
        rank = min(rank, s.numel())
        if rank > bound or not torch.isfinite(s).all():
            return None
        root = s[:rank].sqrt()
        return (u[:, :rank] * root).T.contiguous(), (vh[:rank] * root[:, None]).contiguous()

    def _power(self, matrix: torch.Tensor, bound: int, context: CodecContext, name: str) -> Factors | None:
        """Double the subspace until it holds the energy or dense would be smaller."""
        total = matrix.double().square().sum().item()
        width = (self.rank or 4) + 4
        random = generator(context, f"low_rank {name}")
        while True:
            width = min(width, *matrix.shape)
            basis = _subspace(matrix, width, random)
            u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
            held = s.double().square().sum().item()
            if self.rank or held >= self.share(context.progress) * total or width == min(matrix.shape):
                return self._truncated(basis @ u, s, vh, bound, context.progress, total)
            if width > bound:
                return None
            width *= 2


STAGES = (LowRank,)


def energy_rank(s: torch.Tensor, share: float, total: float) -> int:
    """Return the smallest k >= 1 whose first k singular values hold ``share`` of the energy ``total``.

    >>> energy_rank(torch.tensor([3.0, 1.0, 1.0]), 0.9, 11.0), energy_rank(torch.zeros(3), 0.9, 0.0)
    (2, 1)
    """
    held = s.double().square().cumsum(0)
    return 1 + int((held < share * total).sum().item())


def largest_rank(m: int, n: int) -> int:
    """Return the largest k below m n / (m + n + 1), from where on dense is smaller.

    >>> largest_rank(768, 768), largest_rank(4, 1)
    (383, 0)
    """
    return max(0, math.ceil(m * n / (m + n + 1)) - 1)


def _subspace(matrix: torch.Tensor, width: int, random: np.random.Generator) -> torch.Tensor:
    """Return an orthonormal basis [m, width] of nearly the leading left singular vectors."""
    start = torch.from_numpy(random.standard_normal((matrix.shape[1], width), np.float32))
    basis: torch.Tensor = torch.linalg.qr(matrix @ start)[0]
    for _ in range(2):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    return basis


def _schedule(energy: float | str) -> tuple[float, float]:
    if not isinstance(energy, str):
        return energy, energy
    match = re.fullmatch(r"\s*([\d.]+)\s*->\s*([\d.]+)\s*", energy)
    try:
        start, end = (float(share) for share in match.groups()) if match else (math.nan, math.nan)
    except ValueError:
        start = end = math.nan
    return start, end


def _matrices(tensors: Spec | Tensors) -> list[str]:
    return sorted(name for name, item in tensors.items() if len(item.shape) > 1 and 0 not in item.shape)


def _shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])
