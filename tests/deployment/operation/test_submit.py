"""What is handed to the server's process is what the command line read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from fedllm.config import RunConfig
from server.federation.control import Control
from server.federation.submit import submit


class Listening:
    """Takes what would be sent to a SuperLink."""

    def start(self, bundle: bytes, values: dict[str, Any]) -> int:
        self.config = RunConfig.from_json(values["fedllm"])
        return 7


@pytest.mark.parametrize(
    ("given", "sent"),
    [("texts.csv", "{here}/texts.csv"), ("/srv/texts", "/srv/texts"), ("~/texts", "{home}/texts")],
)
def test_relative_texts_are_those_of_the_folder_in_which_the_command_was_given(
    given: str, sent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's process runs in the federation's folder and would read others, or none."""
    (tmp_path / "here").mkdir()
    (tmp_path / "federation" / "superlink").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    control = Listening()
    config = RunConfig.model_validate({"data": {"path": given, "test_path": given}})
    submit(tmp_path / "federation", cast("Control", control), config)
    expected = sent.format(here=tmp_path / "here", home=tmp_path / "home")
    assert (control.config.data.path, control.config.data.test_path) == (expected, expected)
    submit(tmp_path / "federation", cast("Control", control), RunConfig(name="bundled"))
    assert (control.config.data.path, control.config.data.name) == (None, "bbcnews")
    known = json.loads((tmp_path / "federation" / "superlink" / "runs.json").read_text())
    assert known == {"run": [7], "bundled": [7]}
