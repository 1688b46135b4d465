"""What goes wrong is one sentence, word for word; with --json an object on stdout, the exit code the same."""

from __future__ import annotations

import errno
import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

import fedllm as package
from fedllm.errors import (
    ConfigError,
    DataError,
    FedllmError,
    Interrupted,
    ModelError,
    RunFailed,
    StoreError,
    WireError,
)
from fedllm.terminal.console import console, results
from tests.commands.conftest import Fedllm
from tests.parts import quick

ROOT = Path(package.__file__).parents[1]
HOSTILE = "[/red] [bold]C:\\data[0]\\[x] pip install 'fedllm[tensorboard]' :bug: [link=http://e]"
CODES = {ConfigError: 2, DataError: 2, ModelError: 2, RunFailed: 1, StoreError: 1, WireError: 1}


def fail(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def presets() -> None:
        raise error

    monkeypatch.setattr("fedllm.presets.presets", presets)


@pytest.mark.parametrize(("kind", "code"), [*CODES.items(), (Interrupted, 130)])
def test_a_sentence_is_printed_word_for_word(
    fedllm: Fedllm, monkeypatch: pytest.MonkeyPatch, kind: type[FedllmError], code: int
) -> None:
    fail(monkeypatch, kind(HOSTILE))
    answer = fedllm("presets")
    prefix = "" if kind is Interrupted else "error: "
    assert answer == (code, "", f"{prefix}{HOSTILE}\n")


@pytest.mark.parametrize(("kind", "code"), [*CODES.items(), (Interrupted, 130)])
def test_with_json_an_error_is_an_object_and_the_code_stays(
    fedllm: Fedllm, monkeypatch: pytest.MonkeyPatch, kind: type[FedllmError], code: int
) -> None:
    fail(monkeypatch, kind(HOSTILE))
    answer = fedllm("presets", "--json")
    told = {"kind": kind.__name__, "message": HOSTILE, "exit_code": code}
    assert answer.code == code
    assert json.loads(answer.out) == {"error": told}


@pytest.mark.parametrize(
    ("words", "kind"),
    quick(
        [
            (["bnch"], "NoSuchCommand"),
            (["simulate", "--sedes", "0..1"], "NoSuchOption"),
            (["simulate", "nothing-of-this-name"], "ConfigError"),
            (["resume", "nowhere"], "StoreError"),
            (["report", "nowhere"], "StoreError"),
            (["export", "nowhere", "out"], "StoreError"),
            (["predict", "nowhere", "text"], "StoreError"),
            (["compare", "nowhere"], "StoreError"),
            (["reproduce", "nothing"], "ConfigError"),
            (["bench", "nothing"], "ConfigError"),
            (["provision", "nowhere"], "ConfigError"),
            (["server", "nowhere"], "ConfigError"),
            (["run", "--server", "nowhere"], "ConfigError"),
            (["client", "nowhere"], "ConfigError"),
            (["dashboard", "nowhere", "--tls"], "ConfigError"),
        ],
        (["bnch"], "NoSuchCommand"),
        (["simulate", "nothing-of-this-name"], "ConfigError"),
        (["report", "nowhere"], "StoreError"),
        (["bench", "nothing"], "ConfigError"),
        (["client", "nowhere"], "ConfigError"),
    ),
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_command_gives_its_errors_as_json(
    fedllm: Fedllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    plain, told = fedllm(*words), fedllm(*words, "--json")
    error = json.loads(told.out)["error"]
    assert plain.code == told.code == error["exit_code"] != 0
    assert error["kind"] == kind
    assert plain.out == ""
    assert error["message"] in plain.err


def test_a_fault_of_our_own_keeps_its_traceback_and_is_told_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedllm import cli

    fail(monkeypatch, ZeroDivisionError("by nought"))
    monkeypatch.setattr("sys.argv", ["fedllm", "presets", "--json"])
    with pytest.raises(ZeroDivisionError):
        cli.main()
    told = json.loads(capsys.readouterr().out)["error"]
    assert told == {"kind": "ZeroDivisionError", "message": "by nought", "exit_code": 1}


def test_a_word_after_the_double_hyphen_is_no_option(fedllm: Fedllm, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fedllm("predict", "nowhere", "--", "--json").out == ""


@pytest.mark.parametrize("of", [console, results], ids=["stderr", "stdout"])
def test_cells_and_titles_of_tables_are_text(capsys: pytest.CaptureFixture[str], of: Console) -> None:
    table = Table("[head]", title="[/title] :bug:")
    table.add_row(HOSTILE)
    of.print(table)
    written = "".join(capsys.readouterr())
    assert "[/title] :bug:" in written
    assert "[head]" in written
    assert HOSTILE in written


def test_a_long_line_is_not_wrapped_away_from_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.print("word " * 60)
    assert capsys.readouterr().err.count("\n") == 1


def test_what_a_node_says_is_text_in_the_status_line(
    fedllm: Fedllm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def join(device: object, *, report: object, status: object) -> None:
        assert callable(report)
        assert callable(status)
        report(HOSTILE)
        status(HOSTILE)

    monkeypatch.setattr("client.device.supervisor.join", join)
    monkeypatch.setattr("client.device.checks.Bundle.read", lambda folder: None)
    answer = fedllm("client", tmp_path, "--state", tmp_path)
    assert answer.code == 0
    assert answer.err.count(HOSTILE) == 2


def test_one_place_makes_consoles_and_no_text_is_read_as_markup() -> None:
    """A console of rich's own reads every string as markup: only ours may be used."""
    makes = re.compile(r"\bConsole\(|from_markup|markup=True|\brich import print\b")
    found = {
        str(path.relative_to(ROOT)): makes.findall(path.read_text())
        for layer in ("fedllm", "strategies", "client", "server", "simulations")
        for path in (ROOT / layer).rglob("*.py")
        if makes.search(path.read_text())
    }
    assert found == {"fedllm/terminal/console.py": ["Console("]}


def test_a_folder_without_permission_is_one_sentence(monkeypatch: pytest.MonkeyPatch, fedllm: Fedllm) -> None:
    fail(monkeypatch, PermissionError(13, "Permission denied", "/root/runs"))
    assert fedllm("presets")[::2] == (1, "error: no permission for /root/runs: Permission denied\n")


def test_what_the_system_refuses_is_one_sentence_and_a_fault_of_ours_none(
    monkeypatch: pytest.MonkeyPatch, fedllm: Fedllm
) -> None:
    fail(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "/runs/x"))
    assert fedllm("presets")[::2] == (1, "error: the system refuses /runs/x: No space left on device\n")
    fail(monkeypatch, FileNotFoundError(errno.ENOENT, "No such file or directory", "ours"))
    with pytest.raises(FileNotFoundError):
        fedllm("presets")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["quickstart", "--resume", "x"],
            "a preset or file is for a new run; --resume and --stop are for one",
        ),
        (["--resume", "x", "--set", "rounds=3"], "--set is for a new run; --resume and --stop are for one"),
        (["--stop", "x", "--dry-run"], "--dry-run is for a new run; --resume and --stop are for one"),
        (["provision", "x", "--revoke", "1", "--renew"], "--revoke and --renew are two orders"),
        (["provision", "x", "--add-node", "--port", "9"], "--add-node and --port are two orders"),
        (["bench", "all", "--fuzz", "5"], "--fuzz and --plot belong to fedllm bench codecs, not to all"),
        (
            ["bench", "codecs", "--out", "x"],
            "--only, --fresh and --out belong to fedllm bench all, not to codecs",
        ),
        (["--stop", "x", "--resume", "x"], "--resume and --stop are two orders; give one"),
        (
            ["quickstart", "--set", "data.client_test_fraction=0.2", "--dry-run"],
            "data.client_test_fraction is for evaluation.clients = true",
        ),
        (
            ["--set", "simulation.profile=phones-4g", "--dry-run"],
            "simulation.profile = 'phones-4g' is for fedllm simulate",
        ),
    ],
)
def test_what_a_run_would_not_heed_is_refused(fedllm: Fedllm, words: list[str], sentence: str) -> None:
    answer = fedllm(*words) if words[0] in ("provision", "bench") else fedllm("run", *words)
    assert (answer.code, sentence in answer.err) == (2, True), answer.err


def test_a_simulation_that_only_devices_can_make_is_refused_as_it_is_shown(fedllm: Fedllm) -> None:
    answer = fedllm("simulate", "--set", "server.mode=async", "--dry-run")
    assert (answer.code, "set simulation.profile" in answer.err) == (2, True), answer.err


def test_whoever_stops_following_a_run_is_told_that_it_goes_on(
    fedllm: Fedllm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from server.federation.submit import Submitted

    def follow(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("server.federation.link.connect", lambda folder: nullcontext())
    monkeypatch.setattr("server.federation.serving.await_link", lambda folder, control: None)
    monkeypatch.setattr(
        "server.federation.submit.resume", lambda *_: Submitted(7, tmp_path / "runs" / "mine")
    )
    monkeypatch.setattr("server.federation.submit.follow", follow)
    answer = fedllm("run", "--resume", "mine", "--server", tmp_path)
    ending = f"fedllm run --stop mine --server {tmp_path}"
    assert answer.code == 130
    assert answer.err.endswith(f"no longer followed; the run goes on ({ending} ends it)\n")
