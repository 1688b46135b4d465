"""Everybody runs the same parts: .ci/run by hand, and GitHub's workflow."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.packaging.test_declarations import PROJECT, ROOT


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A file in which a make of our own notes what it is asked for."""
    program = tmp_path / "bin" / "make"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\necho "$@" >> "$MADE"\n[ "$1" != hanging ] || exec sleep 60\n[ "$1" != broken ]\n'
    )
    program.chmod(0o755)
    return tmp_path / "made"


def run(made: Path, *parts: str, **variables: str) -> int:
    path = f"{made.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "MADE": str(made)} | variables
    return subprocess.run([ROOT / ".ci/run", *parts], env=environment, check=False).returncode


@pytest.mark.parametrize(
    ("parts", "makes"),
    [([], ["lint", "test", "docs"]), (["coverage"], ["coverage"]), (["lint", "docs"], ["lint", "docs"])],
)
def test_a_part_is_a_make_target(made: Path, parts: list[str], makes: list[str]) -> None:
    assert run(made, *parts) == 0
    assert made.read_text().split() == makes


def test_a_part_that_fails_ends_it(made: Path) -> None:
    assert run(made, "lint", "broken", "docs") != 0
    assert made.read_text().split() == ["lint", "broken"]


@pytest.mark.slow
def test_a_part_that_hangs_is_stopped_and_said(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(made, "hanging", "docs", CI_MINUTES="0") == 124
    assert made.read_text().split() == ["hanging"]
    assert "error: make hanging was stopped" in capfd.readouterr().err


def test_the_workflow_runs_the_same_parts_on_the_oldest_python_and_on_a_newer_one() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    (job,) = jobs.values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run ${{ matrix.part }}"]
    asked = [(one["part"], one["python"]) for one in job["strategy"]["matrix"]["include"]]
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert {part for part, _ in asked} == {"lint", "test", "docs", "coverage"}
    assert {("test", oldest), ("test", "3.13")} <= set(asked)


@pytest.mark.parametrize("name", ["bug", "idea"])
def test_an_issue_form_asks_for_what_it_needs(name: str) -> None:
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert {"name", "description", "body"} <= form.keys()
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert all(part["attributes"]["label"] for part in asked)
    assert len({part["id"] for part in asked}) == len(asked)
    assert any(part.get("validations", {}).get("required") for part in asked)


def test_the_citation_is_of_this_version_under_this_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (
        PROJECT["project"]["version"],
        PROJECT["project"]["license"],
    )
