"""How low the rank of rounds' updates is: their singular values, as FedKD's figure 4 shows them.

An update is what one round changed of the global tensors, read from two checkpoints that follow one another;
energy is the sum of squared singular values (Wu et al., Nature Communications 13:2032, 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedllm.runs import checkpoint
from simulations.results.plots import canvas, legend, look, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["drawn", "energies", "figures", "of_run"]

Energies = np.ndarray[Any, np.dtype[np.float64]]
"""Share of the energy that the leading singular values hold, at each of :data:`SHARES` of them."""

SHARES = np.linspace(0.0, 1.0, 101)
"""Shares of the singular values, the largest first."""

KINDS = {
    **dict.fromkeys(("attention", "attn"), "attention"),
    **dict.fromkeys(("intermediate", "output.dense", "mlp", "ffn"), "feed-forward"),
}
"""What a matrix is called by a part of its name; the first that fits."""


def energies(update: torch.Tensor) -> Energies:
    """Return which share of a matrix's energy its leading singular values hold, at each of ``SHARES``.

    >>> energies(torch.eye(4))[[0, 25, 50, 100]].round(2).tolist()
    [0.0, 0.25, 0.5, 1.0]
    """
    squared = torch.linalg.svdvals(update.double()).square().numpy()
    held = np.concatenate([[0.0], np.cumsum(squared) / max(squared.sum(), np.finfo(float).tiny)])
    found: Energies = np.interp(SHARES, np.linspace(0.0, 1.0, len(held)), held)
    return found


def of_run(folder: Path) -> dict[tuple[str, int], Energies]:
    """Return the mean over a run's matrices of each kind, by kind and round.

    Rounds whose own checkpoint or the one before is gone are left out.
    """
    there = checkpoint.numbers(folder / "checkpoints")
    found: dict[tuple[str, int], Energies] = {}
    before: Mapping[str, torch.Tensor] | None = None
    for number in there:
        state = checkpoint.load(folder / "checkpoints", number).groups["tensors"]
        if before is not None and number - 1 in there:
            kinds: dict[str, list[Energies]] = {}
            for name, tensor in state.items():
                if tensor.dim() == 2 and (kind := _kind(name)):
                    kinds.setdefault(kind, []).append(energies(tensor - before[name]))
            found |= {(kind, number): np.mean(every, axis=0) for kind, every in kinds.items()}
        before = state
    return found


def _kind(name: str) -> str | None:
    return next((kind for part, kind in KINDS.items() if part in name), None)


def figures(folders: Mapping[str, Path]) -> dict[str, tuple[str, Figure]]:
    """Return caption and figure of each run's updates, by name; of runs that kept two checkpoints or more."""
    found = {label: of_run(folder) for label, folder in folders.items()}
    return {
        f"spectra-{label}": (f"Energy of what each round changed, by layers, {label}", drawn(energy))
        for label, energy in found.items()
        if energy
    }


@styled
def drawn(found: Mapping[tuple[str, int], Energies]) -> Figure:
    """Draw first and last round of each kind of matrix."""
    figure, axes = canvas()
    names = []
    for place, kind in enumerate(sorted({kind for kind, _ in found})):
        rounds = sorted(number for other, number in found if other == kind)
        for dashes, number in zip(("-", "--"), dict.fromkeys([rounds[0], rounds[-1]]), strict=False):
            axes.plot(100 * SHARES, 100 * found[kind, number], **{**look(place), "linestyle": dashes})
            names.append(f"{kind}, round {number}")
    axes.set_xlabel("leading singular values (% of all)")
    axes.set_ylabel("energy of the update (%)")
    legend(figure, axes.get_lines(), names)
    return figure
