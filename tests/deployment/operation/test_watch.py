"""Runs whose process died: noted at once, waited for while it is ending, gone on with where asked to."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

import psutil
import pytest

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, RunFailed
from fedllm.runs.amending import settle, unsettled
from fedllm.runs.lock import RunLock
from fedllm.runs.reader import Run
from fedllm.runs.records import RoundRecord
from fedllm.runs.writer import RunStore
from server.dashboard.reading.runs import RunIndex
from server.federation import serving, submit
from server.federation.control import Control
from server.federation.control import Run as Session
from server.federation.provision import provision
from server.federation.serving import await_link, is_served
from server.federation.watch import Runs

CONFIG = RunConfig(name="one", clients=2, rounds=3)


class SuperLink:
    """Answers as a Control API: runs that were started are under way until they are told otherwise."""

    address = "localhost:1"
    trouble = "Connection refused"

    def __init__(self, *, refuses: int = 0) -> None:
        self.started: list[str] = []
        self.status = "running"
        self.refuses = refuses
        """Times that it does not answer yet."""

    def start(self, bundle: bytes, values: dict[str, Any]) -> int:
        self.started.append(Path(values["run-dir"]).name)
        return len(self.started)

    def run(self, number: int) -> Session:
        return Session(number, self.status, "", "", 0, 0)

    def ready(self) -> bool:
        self.refuses -= 1
        return self.refuses < 0


def control(**given: Any) -> Control:
    return cast("Control", SuperLink(**given))


def alive() -> bool:
    """The SuperLink serves."""
    return True


def begun(federation: Path, name: str, status: str | None = None) -> Path:
    """Make a run of one round that ends as told; with no word the process has died."""
    folder = federation / "runs" / name
    with RunStore.create(folder, CONFIG.model_copy(update={"name": name})) as store:
        store.round(RoundRecord(round=1, participants=2))
        store.phase("fit", round=2)
        store.event("start", "it began")
        if status is not None:
            store.finish(status)  # type: ignore[arg-type]
    return folder


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    (tmp_path / "federation" / "superlink").mkdir(parents=True)
    return tmp_path / "federation"


def told(folder: Path) -> tuple[str, str, str]:
    """How a run stands: to readers, in its document, in its last event."""
    run = Run(folder)
    document = json.loads((folder / "summary.json").read_text())
    return run.status, document["status"], run.newest_events()[-1].kind


def test_a_run_whose_process_died_is_interrupted_in_every_reading(federation: Path) -> None:
    folder = begun(federation, "one")
    assert json.loads((folder / "summary.json").read_text())["status"] == "running"
    assert Run(folder).summary["status"] == "interrupted"
    assert unsettled(folder)
    assert settle(folder)
    assert told(folder) == ("interrupted", "interrupted", "interrupted")
    assert not settle(folder)
    assert RunIndex(federation / "runs").overview("one").state == "interrupted"
    with RunStore.open(folder) as store:
        assert (store.status, store.last_round) == ("interrupted", 1)
        store.truncate(1)
        assert Run(folder).status == "running"


@pytest.mark.parametrize("status", ["finished", "failed", "stopped"])
def test_a_run_that_said_how_it_ended_stays_so(federation: Path, status: str) -> None:
    folder = begun(federation, "one", status)
    before = (folder / "summary.json").read_bytes()
    assert not settle(folder)
    assert told(folder) == (status, status, status)
    assert (folder / "summary.json").read_bytes() == before


def test_a_run_that_is_held_is_not_settled(federation: Path) -> None:
    folder = begun(federation, "one")
    with RunStore.open(folder):
        assert not settle(folder)
        assert Run(folder).status == "running"


def test_the_server_notes_a_death_between_two_looks_and_nothing_else(federation: Path) -> None:
    said: list[str] = []
    runs = Runs(federation, said.append)
    runs.look(alive)
    old, live, well = begun(federation, "old"), begun(federation, "live"), begun(federation, "well")
    stores = [RunStore.open(live), RunStore.open(well)]
    runs.look(alive)
    stores[0].close()
    stores[1].finish("finished")
    stores[1].close()
    runs.look(alive)
    runs.look(alive)
    assert said == [
        "live was interrupted: its process died; fedllm run --resume live goes on with it",
    ]
    assert [told(folder)[1] for folder in (old, live, well)] == ["running", "interrupted", "finished"]


def test_a_run_that_died_with_its_superlink_is_left_to_the_next_one(federation: Path) -> None:
    """It may be gone before anybody has noticed that the SuperLink is."""
    folder, link, said = begun(federation, "a"), control(), list[str]()
    runs = Runs(federation, said.append)
    with RunStore.open(folder):
        runs.look(alive)
    runs.look(lambda: False)
    runs.take_up(runs.left(), link, go_on=True)
    assert said == ["a goes on: it was running when the server went down"]


def test_what_went_down_with_the_server_goes_on_where_asked_to(federation: Path) -> None:
    """Not what was interrupted before, failed, was stopped or is finished, or cannot go on."""
    for name, status in {"a": None, "b": "stopped", "c": "failed", "d": "finished", "e": None}.items():
        begun(federation, name, status)
    settle(begun(federation, "before"))
    edited = federation / "runs" / "e" / "config.toml"
    edited.write_text(edited.read_text().replace("rounds = 3", "rounds = 4"))
    said: list[str] = []
    runs, link = Runs(federation, said.append), control()
    left = runs.left()
    assert [folder.name for folder in left] == ["a", "e"]
    runs.take_up(left, link, go_on=True)
    assert cast("SuperLink", link).started == ["a"]
    assert said[0] == "a goes on: it was running when the server went down"
    assert said[1].startswith("e was interrupted when the server went down; it cannot go on: ")
    assert told(federation / "runs" / "e")[1] == "interrupted"


def test_what_has_gone_on_after_its_superlink_died_is_not_told_to_have_died(federation: Path) -> None:
    """It lived at the last look before; its new process takes a while to start."""
    folder, link, said = begun(federation, "a"), control(), list[str]()
    runs = Runs(federation, said.append)
    with RunStore.open(folder):
        runs.look(alive)
    runs.take_up(runs.left(), link, go_on=True)
    runs.look(alive)
    assert said == ["a goes on: it was running when the server went down"]


def test_a_run_that_ended_by_itself_meanwhile_is_left_alone(federation: Path) -> None:
    folder, link = begun(federation, "a", "stopped"), control()
    Runs(federation, [].append).take_up([folder], link, go_on=True)
    assert cast("SuperLink", link).started == []
    assert told(folder)[1] == "stopped"


def test_without_being_asked_to_they_are_named(federation: Path) -> None:
    begun(federation, "a")
    said: list[str] = []
    runs, link = Runs(federation, said.append), control()
    runs.take_up(runs.left(), link, go_on=False)
    assert cast("SuperLink", link).started == []
    assert said == ["a was interrupted when the server went down; fedllm run --resume a goes on with it"]
    assert told(federation / "runs" / "a")[1] == "interrupted"


def here(instead: Callable[[float], object]) -> Callable[[float], object]:
    """Return what is done in place of sleeping, in this thread: those of earlier tests sleep on."""
    thread, sleep = threading.get_ident(), time.sleep
    return lambda seconds: (instead if threading.get_ident() == thread else sleep)(seconds)


@contextmanager
def held(folder: Path) -> Iterator[mock.Mock]:
    """Hold a run as a process does that the last SuperLink has left behind, until somebody waits for it."""
    lock = RunLock(folder)
    waited = mock.Mock(side_effect=lambda seconds: lock.release())
    with mock.patch("time.sleep", here(waited)):
        yield waited
    lock.release()


def test_a_process_that_is_ending_is_waited_for(federation: Path) -> None:
    folder, link = begun(federation, "one"), control()
    with held(folder) as waited:
        assert submit.resume(federation, link, "one").id == 1
        waited.assert_called()
    with held(folder) as waited:
        runs = Runs(federation, [].append)
        runs.take_up(runs.left(), link, go_on=True)
        waited.assert_called()
    assert cast("SuperLink", link).started == ["one", "one"]


def test_a_run_that_is_under_way_is_refused_at_once(
    federation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(federation, "one")
    monkeypatch.setattr(submit, "serves", lambda pid: True)
    with held(folder) as waited:
        with pytest.raises(ConfigError, match=r"is running \(process \d+\); follow it"):
            submit.resume(federation, control(), "one")
        waited.assert_not_called()


def test_whose_child_a_process_is_tells_whether_its_superlink_lives() -> None:
    """A process below one with a SuperLink's command line, and the same once that has gone."""
    below = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); input()"
    command = [sys.executable, "-c", below, "-m", submit.SUPERLINK]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            assert submit.serves(child)
            parent.kill()
            parent.wait()
            assert not submit.serves(child)
        finally:
            psutil.Process(child).kill()
    assert not submit.serves(-1)


def test_whoever_follows_a_run_is_told_at_once_that_it_died(
    federation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SuperLink takes it for running, as it does for a minute."""
    folder = begun(federation, "one")
    settle(folder)

    def live_and_die() -> Iterator[None]:
        """Interrupted before: what counts is what becomes of the process that has taken it up."""
        yield
        with RunStore.open(folder) as store:
            store.truncate(1)
            yield
        yield

    life = live_and_die()
    monkeypatch.setattr("time.sleep", here(lambda seconds: next(life)))
    monkeypatch.setattr(submit, "serves", lambda pid: True)
    with pytest.raises(RunFailed, match="its server process died; go on with: fedllm run --resume one"):
        submit.follow(control(), submit.Submitted(1, folder))
    assert next(life, "died") == "died"
    assert told(folder)[1] == "interrupted"
    assert [event.kind for event in Run(folder).events()].count("interrupted") == 2


def test_who_notes_an_end_is_not_taken_for_the_run_that_goes_on(
    federation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the run for an instant, and is no process of a SuperLink's: the new one is still starting."""
    folder, link = begun(federation, "one"), control()

    def note_and_end() -> Iterator[None]:
        with RunStore.open(folder):
            yield
        settle(folder)
        yield
        with RunStore.open(folder) as store:
            store.truncate(1)
            store.finish("finished")
        cast("SuperLink", link).status = "finished"
        yield

    noted = note_and_end()
    monkeypatch.setattr("time.sleep", here(lambda seconds: next(noted)))
    submit.follow(link, submit.Submitted(1, folder))
    assert Run(folder).status == "finished"


@pytest.mark.slow
def test_a_folder_has_one_server_and_whoever_runs_waits_while_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", here(lambda seconds: None))
    folder = tmp_path / "federation"
    provision(folder, "localhost", 1)
    assert not is_served(folder)
    wanted = r"nobody serves .*host \(Connection refused\); start it: fedllm server"
    with pytest.raises(RunFailed, match=wanted):
        await_link(folder, control(refuses=1))
    with serving._sole_server(folder):
        assert is_served(folder)
        await_link(folder, control(refuses=2))
        with pytest.raises(ConfigError, match="another fedllm server serves"), serving._sole_server(folder):
            pass
    assert not is_served(folder)
