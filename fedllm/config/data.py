"""The section of the texts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from fedllm.section import Section


class DataConfig(Section):
    """The text, how it is split and who holds which part."""

    name: str = "bbcnews"
    """Bundled short name or hub name; ``path`` replaces it."""
    path: str | None = None
    """Local jsonl, json, csv, tsv, parquet or conll file, folder of such, or folder of class folders."""
    test_path: str | None = None
    """The server's test set, as ``path``; replaces ``test_fraction``, all other texts are trained on."""
    text: str = "text"
    """Column that holds the text."""
    pair: str | None = None
    """Column of a second text that is read with the first, where two are compared."""
    columns: dict[str, str] = Field(default_factory=dict)
    """What other columns are called that a task reads, by the task's names; unset ones are called so."""
    label: str | None = "label"
    """Column that holds the class, "" for none; a causal model uses it only for the partition."""
    classes: tuple[str, ...] = ()
    """Class names in the order of the model's outputs; empty takes those that the texts have, sorted."""
    max_length: int = Field(default=64, ge=1)
    """Tokens kept of each text."""
    overlong: Literal["truncate", "split", "drop"] = "truncate"
    """What becomes of longer texts: their ends are cut off, they become several rows, or are left out."""
    test_fraction: float = Field(default=0.2, gt=0.0, lt=1.0)
    """Share held out on the server, stratified by class."""
    client_test_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each client's own part held out for evaluation on that client."""
    partition: Literal["iid", "dirichlet", "pathological", "natural", "file"] = "iid"
    """``natural`` groups by the column ``by``; ``file`` gives each file to one client."""
    alpha: float = Field(default=0.5, gt=0.0)
    """Dirichlet concentration: smaller is more skewed."""
    classes_per_client: int = Field(default=2, ge=1)
    """Classes that each client holds under ``pathological``."""
    part: tuple[int, int] | None = None
    """(k, n): the only client holds what client k of n would hold, of one everything; the baselines without a
    federation."""
    by: str | None = None
    """Identity column of the ``natural`` partition."""
    group: str | None = None
    """Column of what belongs together, such as a document: its rows stay on one side of every split."""

    @field_validator("classes")
    @classmethod
    def _each_class_once(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in classes if classes.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]!r} stands twice; name each class once")
        return classes

    @field_validator("label")
    @classmethod
    def _no_label(cls, label: str | None) -> str | None:
        return label or None
