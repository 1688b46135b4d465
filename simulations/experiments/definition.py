"""What an experiment's file says: cells to run, differences to pair, and what the paper claims."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator

from fedllm.config import Section, read_toml, require_name
from fedllm.config.mistakes import explain
from fedllm.errors import ConfigError
from fedllm.wording import suggest

__all__ = ["Cell", "Claim", "Difference", "Experiment", "Variant", "names", "read"]

_FOLDER = Path(__file__).parent

Settings = dict[str, Any]
"""Sections and keys, as a configuration has them."""


class Base(Section):
    """What all cells begin from."""

    preset: str
    """Of a cell that names none."""
    set: Settings = Field(default_factory=dict)
    """Of every cell, before its own."""
    memory_gb: float = Field(gt=0)
    """Peak of a run's memory, unless its cell says another."""
    disk_mb: float = Field(gt=0)
    """Size of a run's folder, unless its cell says another."""


class Cell(Section):
    """One setting, run with every seed."""

    title: str = Field(min_length=1, max_length=60)
    """As tables and figures call it."""
    preset: str | None = None
    """Instead of the base's."""
    set: Settings = Field(default_factory=dict)
    """What differs from it."""
    baseline: Literal["local", "central"] | None = None
    """No federation on the same split: every client for itself, or all texts in one place."""
    seeds: tuple[int, ...] | None = None
    """Instead of the experiment's."""
    minutes: float = Field(gt=0)
    """What one seed takes on one core."""
    memory_gb: float | None = Field(None, gt=0)
    """Instead of the base's."""
    disk_mb: float | None = Field(None, gt=0)
    """Instead of the base's."""


class Difference(Section):
    """Two cells compared seed by seed."""

    of: str
    """A cell."""
    against: str
    """The cell that is subtracted, or whose bytes are divided by the other's."""
    measure: str = "metrics.accuracy"
    """A number of ``summary.json``, ``bytes.total`` (both ways), or ``clients.NAME`` of the last round."""
    kind: Literal["difference", "times_fewer"] = "difference"
    """``of - against``, or ``against / of``."""
    shows: str = ""
    """What the reader learns from it."""


class Claim(Difference):
    """What a paper says, and how it is judged here."""

    paper: str
    """Its words and numbers, with the place."""
    at_least: float | None = None
    """The claim is met where the mean is no less; left out where nothing is judged."""
    not_comparable: str = ""
    """Why ours and the paper's cannot be set side by side, where they cannot."""


class Variant(Section):
    """What is changed for a quick look, or for the paper's own models and data."""

    set: Settings = Field(default_factory=dict)
    """Of every cell, after its own."""
    seeds: tuple[int, ...] | None = None
    """Instead of the experiment's and of every cell's."""


class Experiment(Section):
    """One file."""

    title: str
    """Of the report."""
    paper: str
    """The paper, and what it ran."""
    here: str
    """What is run here instead, and what the two have in common."""
    seeds: tuple[int, ...]
    """Of every cell that says no other."""
    base: Base
    """What all cells begin from."""
    cells: dict[str, Cell] = Field(min_length=1)
    """By name, in the order of tables and figures."""
    differences: tuple[Difference, ...] = ()
    """To be paired by seed."""
    claims: tuple[Claim, ...] = ()
    """To be judged."""
    quick: Variant
    """``--quick``: minutes, not judged."""
    paper_scale: Variant | None = None
    """``--scale paper``; left out where there is none."""

    @field_validator("cells")
    @classmethod
    def _names(cls, cells: Mapping[str, Cell]) -> Mapping[str, Cell]:
        for name in cells:
            try:
                require_name(name)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return cells

    def require_cells(self) -> Self:
        """Refuse seeds that are none, and differences and claims of cells that are none.

        Raises:
            ConfigError: names the key.
        """
        seeds = {"seeds": self.seeds, "quick.seeds": self.quick.seeds}
        seeds |= {f"cells.{name}.seeds": cell.seeds for name, cell in self.cells.items()}
        for key, given in seeds.items():
            if given is not None and (not given or len(set(given)) < len(given) or min(given) < 0):
                raise ConfigError(f"{key} = {list(given)} must hold numbers from 0 on, each once")
        for part in ("differences", "claims"):
            for place, one in enumerate(getattr(self, part)):
                for side in ("of", "against"):
                    if (cell := getattr(one, side)) not in self.cells:
                        raise ConfigError(
                            f"{part}.{place}.{side} = {cell!r} is no cell{suggest(cell, self.cells)}"
                        )
        for place, claim in enumerate(self.claims):
            if (claim.at_least is None) != bool(claim.not_comparable):
                raise ConfigError(f"claims.{place} takes either at_least or not_comparable")
        return self


def names() -> list[str]:
    """Return the names of the experiments that come with the package.

    >>> names()
    ['fedkd', 'fwdllm', 'lora']
    """
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def read(source: str) -> Experiment:
    """Read an experiment by its name, or from a TOML file.

    Raises:
        ConfigError: there is none; or names the file, the key, and what would be right.
    """
    path = Path(source) if source.endswith(".toml") else _FOLDER / f"{source}.toml"
    if path.parent == _FOLDER and path.stem not in names():
        raise ConfigError(f"there is no experiment {source!r}{suggest(source, names())}, or a TOML file")
    document = read_toml(path)
    try:
        return Experiment.model_validate(document).require_cells()
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, Experiment)}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
