"""Tasks by name: those of this package, one file each, and those that plug-ins add.

No task's module imports torch at its top, so that the command line, the form and the check of a configuration
know every task and stay quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from fedllm import plugins
from fedllm.config import RunConfig
from fedllm.data import corpus as data
from fedllm.errors import ConfigError
from fedllm.tasks.base import Task
from fedllm.wording import suggest

__all__ = ["Task", "kind", "names", "of", "with_classes"]

_OWN = {
    "classification": "Classification",
    "regression": "Regression",
    "tokens": "TokenTask",
    "span": "Span",
    "causal": "Causal",
    "instruct": "Instruct",
    "seq2seq": "Seq2Seq",
    "ranking": "Ranking",
    "preference": "Preference",
}
"""The module in this package that holds a task has its name; here is the class in it."""


def names() -> list[str]:
    """Return the names of all tasks.

    >>> {"classification", "causal"} <= set(names())
    True
    """
    return [*_OWN, *sorted(_added())]


def kind(name: str) -> type[Task]:
    """Return a task's class.

    Raises:
        ConfigError: there is no such task; names the nearest.
    """
    if name in _OWN:
        found: type[Task] = getattr(import_module(f"fedllm.tasks.{name}"), _OWN[name])
        return found
    added = _added()
    if name not in added:
        raise ConfigError(f"model.task = {name!r} is unknown{suggest(name, names())}")
    return added[name]


def of(config: RunConfig) -> Task:
    """Return a run's task.

    Raises:
        ConfigError: there is no such task, or it lacks a setting.
    """
    plugins.load(config.plugins)
    return kind(config.model.task)(config)


def with_classes(config: RunConfig) -> RunConfig:
    """Fix a run's classes and their order by the server's own texts: a device may lack some of them.

    Raises:
        DataError: as :func:`fedllm.data.corpus.load`.
    """
    task = of(config)
    if not task.classed or config.data.classes:
        return config
    classes = data.load(config.data, task).label_names
    return config.model_copy(update={"data": config.data.model_copy(update={"classes": classes})})


def _added() -> Mapping[str, type[Task]]:
    return plugins.new("task", _OWN, plugins.tasks())
