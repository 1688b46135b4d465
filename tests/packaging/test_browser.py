"""The browser that make test needs: found under any name and anywhere, else installed, else one sentence."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dashboard import chromium
from tests.packaging.test_declarations import ROOT, planned

Program = Callable[..., Path]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Make a program in ``tmp_path/bin`` or below ``tmp_path``."""

    def make(name: str, code: int = 0, does: str = "echo Browser 1.0") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{does}\nexit {code}\n")
        path.chmod(0o755)
        return path

    return make


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv(chromium.VARIABLE, raising=False)
    monkeypatch.setattr(chromium, "PLACES", ())
    monkeypatch.setattr(chromium, "PLAYWRIGHT", "")


@pytest.mark.parametrize("name", ["chromium", "google-chrome-stable", "msedge"])
def test_a_browser_on_the_search_path_is_taken(program: Program, name: str) -> None:
    made = program(f"bin/{name}")
    assert chromium.require() == made


def test_a_browser_in_its_usual_place_is_taken(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    place = program("Applications/Google Chrome")
    monkeypatch.setattr(chromium, "PLACES", ("/nowhere/chrome", str(place)))
    assert chromium.require() == place


def test_playwrights_own_browser_is_taken(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    own = program("cache/chrome-linux64/chrome")
    monkeypatch.setattr(chromium, "PLAYWRIGHT", f"print({str(own)!r})")
    assert chromium.require() == own


def test_the_environment_variable_goes_before_all_else(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    program("bin/chromium")
    chosen = program("opt/brave")
    monkeypatch.setenv(chromium.VARIABLE, str(chosen))
    assert chromium.require() == chosen


def test_a_variable_that_names_nothing_is_one_sentence(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    program("bin/chromium")
    monkeypatch.setenv(chromium.VARIABLE, "/nowhere/chrome")
    with pytest.raises(chromium.NoBrowser, match=r"FEDLLM_BROWSER=/nowhere/chrome does not start"):
        chromium.require()


def test_what_does_not_start_is_passed_over(program: Program) -> None:
    program("bin/chromium", code=1)
    works = program("bin/google-chrome")
    assert chromium.require() == works


def test_root_installs_with_the_systems_packages(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "bin/chromium"
    program("bin/apt-get", does=f"echo $* >> {tmp_path}/asked; /bin/cp {sys.executable} {made}")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert chromium.require() == made
    updated, installed = (tmp_path / "asked").read_text().splitlines()
    assert updated.startswith("update")
    assert re.fullmatch(r"install .*--no-install-recommends chromium", installed)


@pytest.mark.parametrize(("user", "words"), [(1000, ["install", "chromium"]), (0, ["--with-deps"])])
def test_otherwise_playwright_installs_its_own(
    program: Program, monkeypatch: pytest.MonkeyPatch, user: int, words: list[str]
) -> None:
    program("bin/apt-get", code=100)
    monkeypatch.setattr("os.geteuid", lambda: user)
    last = list(chromium._installers())[-1]
    assert last[:4] == [sys.executable, "-m", "playwright", "install"]
    assert set(words) <= set(last)
    assert ("--with-deps" in last) == (user == 0)


def test_none_and_no_way_to_install_one_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chromium, "_installers", lambda: iter([["sh", "-c", "exit 1"]]))
    with pytest.raises(SystemExit) as ended:
        chromium.main()
    assert str(ended.value).startswith("error: the dashboard's tests need Chrome, Chromium or Edge")
    assert "Traceback" not in capfd.readouterr().err


def test_make_test_looks_for_the_browser_before_it_runs_what_needs_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    steps = planned(ROOT, "test")
    assert 0 < steps.index("tests.dashboard.chromium") < steps.index('-m "slow and not soak"')
