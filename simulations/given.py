"""What a caller gives from memory: texts, and a base model. A run finds them in its folder, as files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fedllm import tasks
from fedllm.config import RunConfig
from fedllm.data import given as texts
from fedllm.data.reading import Row
from fedllm.errors import ConfigError
from fedllm.here import HERE, located
from fedllm.runs import folder as run_folder
from fedllm.runs import lock as run_lock
from fedllm.runs.durable import disk_errors
from fedllm.runs.folder import GIVEN
from fedllm.runs.lock import RunLock
from fedllm.runs.records import FILE

__all__ = ["Given"]

_TEXTS, _TEST, _CLIENTS, _MODEL = "texts.jsonl", "test.jsonl", "clients", "model"


@dataclass(frozen=True)
class Given:
    """Texts and a model from memory, and the settings that say where a run is going to find them.

    Attributes:
        settings: by key.
        files: rows by the file that takes them.
        model: a transformers model, or a function that returns one; None where none is given.
        tokenizer: the model's; None where it is not given.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[Row]] = field(default_factory=dict)
    model: Any = None
    tokenizer: Any = None

    @classmethod
    def of(cls, data: Any, clients: Any, model: Any) -> Self:
        """Tell settings from what stands for itself among arguments of :func:`simulations.api.simulate`.

        Raises:
            ConfigError: texts are given twice.
            DataError: what is given as texts holds none.
        """
        about_data = _section(data, name="path", itself="rows")
        about_model = _section(model, name="name", itself="object")
        train, test = about_data.pop("rows", None), about_data.pop("test_rows", None)
        built, tokenizer = about_model.pop("object", None), about_model.pop("tokenizer", None)
        files: dict[str, list[Row]] = {}
        if train is not None:
            files[_TEXTS] = texts.rows(train, "data")
            about_data["path"] = _there(_TEXTS, about_data, "path")
        if isinstance(clients, list | tuple):
            if train is not None or "partition" in about_data:
                raise ConfigError(
                    "clients are given with the texts of each: leave out data's "
                    f"{'rows' if train is not None else 'partition'}"
                )
            own = {
                f"{_CLIENTS}/{n:06d}.jsonl": texts.rows(one, f"clients[{n}]") for n, one in enumerate(clients)
            }
            files |= own
            about_data["path"] = _there(_CLIENTS, about_data, "path")
            about_data["partition"] = "file"
            clients = len(own)
        if test is not None:
            files[_TEST] = texts.rows(test, "the test set")
            about_data["test_path"] = _there(_TEST, about_data, "test_path")
        if built is not None:
            about_model["name"] = _there(_MODEL, about_model, "name")
        settings = {"data": about_data, "model": about_model}
        return cls(settings if clients is None else settings | {"clients": clients}, files, built, tokenizer)

    @contextmanager
    def laid_out(self, config: RunConfig, folder: Path, overwrite: bool) -> Iterator[RunConfig]:
        """Write what was given into a run folder, for as long as the block lasts or the run that it begins.

        Args:
            config: the run, with :attr:`settings` in it.
            folder: the run folder.
            overwrite: replace the run that is there.

        Yields:
            The configuration that names the files.

        Raises:
            DataError: the texts cannot be read as the run is going to read them.
            ModelError: the model cannot be saved.
            StoreError: the folder is taken, or cannot be written.
        """
        if not self.files and self.model is None:
            yield config
            return
        from fedllm.models.base import given as base

        if self.files:
            train = [row for name, rows in self.files.items() if name != _TEST for row in rows]
            texts.check(config, tasks.of(config), train or None, self.files.get(_TEST))
        parts = () if self.model is None else base.parts(self.model, self.tokenizer)
        run_folder.require_apart(folder, config.init_from)
        with disk_errors(folder):
            run_folder.require_free(folder, overwrite)
            folder.mkdir(parents=True, exist_ok=True)
            lock = RunLock(folder)
        try:
            with disk_errors(folder):
                try:
                    run_folder.require_free(folder, overwrite)
                    run_folder.clear(folder)
                    for name, rows in self.files.items():
                        texts.write(rows, config.data, tasks.of(config).roles, folder / GIVEN / name)
                    base.write(parts, folder / GIVEN / _MODEL)
                finally:
                    lock.release()
            yield located(config, folder)
        finally:
            if not (folder / FILE).is_file():
                _take_back(folder)


def _section(told: Any, *, name: str, itself: str) -> dict[str, Any]:
    """Return an argument as the settings of a section; what is no settings is a name or the thing itself."""
    if told is None:
        return {}
    if isinstance(told, Mapping) and not texts.is_several_splits(told):
        return dict(told)
    return {name: str(told)} if isinstance(told, str | Path) else {itself: told}


def _there(file: str, section: Mapping[str, Any], key: str) -> str:
    """Return where a run finds what was given."""
    if key in section:
        raise ConfigError(f"{key} = {section[key]!r} and what is given from memory are two: give one of them")
    return f"{HERE}/{GIVEN}/{file}"


def _take_back(folder: Path) -> None:
    """Remove what was laid out for a run that did not begin."""
    shutil.rmtree(folder / GIVEN, ignore_errors=True)
    if {path.name for path in folder.iterdir()} <= {run_lock.FILE}:
        shutil.rmtree(folder)
