"""What an experiment's file says: cells to run, differences to pair, and what the paper claims."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator

from fedllm.config import Section, read_toml, require_name
from fedllm.config.mistakes import explain
from fedllm.errors import ConfigError
from fedllm.wording import suggest

__all__ = [
    "Architecture",
    "Cell",
    "Claim",
    "Difference",
    "Experiment",
    "Hardware",
    "Variant",
    "names",
    "read",
]

Scale = Literal["cpu", "paper"]
"""What fits an hour of two cores, or the papers' own models, texts and numbers of clients."""

_FOLDERS = {
    scale: Path(__file__).with_name(folder) for scale, folder in (("cpu", "comparisons"), ("paper", "paper"))
}

Settings = dict[str, Any]
"""Sections and keys, as a configuration has them."""


class Base(Section):
    """What all cells begin from."""

    preset: str
    """Of a cell that names none."""
    set: Settings = Field(default_factory=dict)
    """Of every cell, before its own."""
    memory_gb: float | None = Field(None, gt=0)
    """Peak of a run's memory, unless its cell says another; left out where ``hardware`` computes."""
    disk_mb: float | None = Field(None, gt=0)
    """Size of a run's folder, unless its cell says another."""


class Cell(Section):
    """One setting, run with every seed."""

    title: str = Field(min_length=1, max_length=60)
    """As tables and figures call it."""
    preset: str | None = None
    """Instead of the base's."""
    set: Settings = Field(default_factory=dict)
    """What differs from it."""
    vary: dict[str, tuple[Any, ...]] = Field(default_factory=dict, max_length=1)
    """One key and values that it has in further cells, NAME-VALUE each; the cell itself is without it."""
    baseline: Literal["local", "central"] | None = None
    """No federation on the same split: every client for itself, or all texts in one place."""
    seeds: tuple[int, ...] | None = None
    """Instead of the experiment's."""
    minutes: float | None = Field(None, gt=0)
    """What one seed takes on one core; left out where ``hardware`` says what computes."""
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
    kind: Literal["difference", "times_fewer", "share_of_gain"] = "difference"
    """``of - against``; ``against / of``; or what ``of`` gained since the start, of what ``against`` did."""
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


class Architecture(Section):
    """The shapes of a model on the hub, so that what it needs is known without a download."""

    kind: str
    """transformers' ``model_type``."""
    million: float = Field(gt=0)
    """Parameters of the model without a head, as a check of ``sizes``."""
    sizes: Settings = Field(default_factory=dict)
    """What differs from the configuration that transformers has for the kind."""


class Hardware(Section):
    """What computes at a paper's scale: one accelerator, on which clients train in turn."""

    name: str
    """As its maker calls it."""
    tflops: float = Field(gt=0)
    """Peak, 10^12 operations a second in the base's precision."""
    efficiency: float = Field(gt=0, le=1)
    """Share of it that training gets."""
    memory_gb: float = Field(gt=0)
    """Of its own."""


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
    columns: tuple[str, ...] = ()
    """Measures that the table of cells shows beside the usual ones."""
    cells: dict[str, Cell] = Field(min_length=1)
    """By name, in the order of tables and figures."""
    spectra: tuple[str, ...] = ()
    """Cells whose rounds' updates are drawn by their singular values; their runs keep all checkpoints."""
    differences: tuple[Difference, ...] = ()
    """To be paired by seed."""
    claims: tuple[Claim, ...] = ()
    """To be judged."""
    quick: Variant | None = None
    """``--quick``: minutes, not judged."""
    models: dict[str, Architecture] = Field(default_factory=dict)
    """By name on the hub, of every model that cells take from there."""
    hardware: Hardware | None = None
    """What cells without ``minutes`` are reckoned for."""

    @field_validator("cells")
    @classmethod
    def _laid_out(cls, cells: Mapping[str, Cell]) -> Mapping[str, Cell]:
        found = [one for own in cells.items() for one in _varied(*own)]
        for name, _ in found:
            try:
                require_name(name)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        if twice := [name for name, many in Counter(name for name, _ in found).items() if many > 1]:
            raise ValueError(f"two cells are called {twice[0]}")
        return dict(found)

    def require_cells(self) -> Self:
        """Refuse seeds that are none, and differences and claims of cells that are none.

        Raises:
            ConfigError: names the key.
        """
        seeds = {"seeds": self.seeds, "quick.seeds": self.quick.seeds if self.quick else None}
        seeds |= {f"cells.{name}.seeds": cell.seeds for name, cell in self.cells.items()}
        for key, given in seeds.items():
            if given is not None and (not given or len(set(given)) < len(given) or min(given) < 0):
                raise ConfigError(f"{key} = {list(given)} must hold numbers from 0 on, each once")
        if self.hardware is None:
            self._require_measured()
        for place, cell in enumerate(self.spectra):
            if cell not in self.cells:
                raise ConfigError(f"spectra.{place} = {cell!r} is no cell{suggest(cell, self.cells)}")
        for part in ("differences", "claims"):
            for place, one in enumerate(getattr(self, part)):
                for side in ("of", "against"):
                    if (cell := getattr(one, side)) not in self.cells:
                        raise ConfigError(
                            f"{part}.{place}.{side} = {cell!r} is no cell{suggest(cell, self.cells)}"
                        )
                if one.kind == "share_of_gain" and not one.measure.startswith("metrics."):
                    raise ConfigError(
                        f'{part}.{place}.measure = {one.measure!r} has no start: kind = "share_of_gain" is '
                        "for those of metrics"
                    )
        for place, claim in enumerate(self.claims):
            if (claim.at_least is None) != bool(claim.not_comparable):
                raise ConfigError(f"claims.{place} takes either at_least or not_comparable")
        return self

    def _require_measured(self) -> None:
        for name, cell in self.cells.items():
            missing = [
                key for key in ("memory_gb", "disk_mb") if not (getattr(cell, key) or getattr(self.base, key))
            ]
            if cell.minutes is None or missing:
                raise ConfigError(
                    f"cells.{name} lacks {' and '.join([*([] if cell.minutes else ['minutes']), *missing])}, "
                    "and there is no hardware to reckon it for"
                )


def _varied(name: str, cell: Cell) -> Iterator[tuple[str, Cell]]:
    """Yield a cell, then those that ``vary`` makes of it, by name."""
    yield name, cell.model_copy(update={"vary": {}})
    for key, values in cell.vary.items():
        *path, last = key.split(".")
        for value in values:
            settings = deepcopy(cell.set)
            section = settings
            for part in path:
                section = section.setdefault(part, {})
                if not isinstance(section, dict):
                    raise ValueError(f"{name}.vary has {key!r}, and {part} is no section")
            section[last] = value
            title = f"{cell.title}, {last.replace('_', ' ')} {value}"
            yield f"{name}-{value}", cell.model_copy(update={"set": settings, "vary": {}, "title": title})


def names(scale: Scale = "cpu") -> list[str]:
    """Return the names of the experiments that come with the package.

    >>> names("paper")
    ['fedkd', 'fwdllm', 'lora']
    """
    return sorted(path.stem for path in _FOLDERS[scale].glob("*.toml"))


def read(source: str, scale: Scale = "cpu") -> Experiment:
    """Read an experiment by its name, or from a TOML file.

    Raises:
        ConfigError: there is none; or names the file, the key, and what would be right.
    """
    path = Path(source) if source.endswith(".toml") else _FOLDERS[scale] / f"{source}.toml"
    if path.parent == _FOLDERS[scale] and path.stem not in names(scale):
        at = "" if scale == "cpu" else " at --scale paper"
        raise ConfigError(
            f"there is no experiment {source!r}{at}{suggest(source, names(scale))}, or a TOML file"
        )
    document = read_toml(path)
    try:
        return Experiment.model_validate(document).require_cells()
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, Experiment)}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
