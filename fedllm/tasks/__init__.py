"""Tasks by name: those that modules of this package hold in ``TASKS``, and those that plug-ins add.

No task's module imports torch at its top, so that the command line, the form and the check of a configuration
know every task and stay quick.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module

from fedllm import plugins
from fedllm.config import RunConfig
from fedllm.data import corpus as data
from fedllm.errors import ConfigError
from fedllm.tasks.base import Task
from fedllm.wording import suggest

__all__ = ["Task", "kind", "names", "of", "with_classes"]


@cache
def _own() -> dict[str, type[Task]]:
    modules = (import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return {task.name: task for module in modules for task in getattr(module, "TASKS", ())}


def names() -> list[str]:
    """Return the names of all tasks.

    >>> {"classification", "causal"} <= set(names())
    True
    """
    return sorted({**_own(), **_added()})


def kind(name: str) -> type[Task]:
    """Return a task's class.

    Raises:
        ConfigError: there is no such task; names the nearest.
    """
    known = {**_own(), **_added()}
    if name not in known:
        raise ConfigError(f"model.task = {name!r} is unknown{suggest(name, known)}")
    return known[name]


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
    return plugins.new("task", _own(), plugins.tasks())
