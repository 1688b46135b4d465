"""What a command would lack at its end is said at its beginning."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.commands.conftest import Fedllm


@pytest.mark.parametrize(
    ("words", "purpose", "package", "extra"),
    [
        (["simulate"], "the report", "matplotlib", "plots"),
        (["simulate", "--dashboard"], "the dashboard", "nicegui", "dashboard"),
        (["simulate", "--engine", "flower"], "--engine flower", "ray", "simulation"),
        (["simulate", "--seeds", "0..1"], "the comparison of several runs", "scipy", "simulation"),
        (["reproduce", "lora"], "the comparison of several runs", "scipy", "simulation"),
        (["dashboard"], "the dashboard", "nicegui", "dashboard"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_missing_package_is_one_sentence_before_anything_starts(
    fedllm: Fedllm,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    purpose: str,
    package: str,
    extra: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr("fedllm.extras.find_spec", lambda name: None if name == package else find(name))
    answer = fedllm(*words)
    assert " ".join(answer.err.split()) == (
        f"error: {purpose} needs {package}, which is not installed: pip install 'fedllm[{extra}]'"
    )
    assert (answer.code, answer.out) == (2, "")
    assert list(tmp_path.iterdir()) == []
