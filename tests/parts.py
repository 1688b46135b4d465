"""What many tests take apart: the cases that stay quick, the tasks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from fedllm import tasks
from fedllm.config import ModelConfig, RunConfig
from fedllm.tasks import Task


def quick(values: Iterable[Any], *chosen: Any) -> list[Any]:
    """Return the values as parameters, with those that are not chosen marked slow.

    >>> [param.marks[0].name if hasattr(param, "marks") else param for param in quick("abc", "b")]
    ['slow', 'b', 'slow']
    """
    values = list(values)
    unknown = [value for value in chosen if value not in values]
    assert not unknown, f"no such cases: {unknown}"
    return [
        value
        if value in chosen
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value in values
    ]


def task_of(name: str) -> Task:
    """Return a task by name, with default settings."""
    return tasks.of(RunConfig(model=ModelConfig(task=name)))
