"""Which runs' state a device keeps: by use and not by clock, with a sentence for whatever goes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from client.device.collection import Bounds, collect, mark


def worked_on(state: Path, run: str, *, size: int = 1000, ended: bool = False) -> None:
    """Leave what a node leaves of a run: a state of so many bytes."""
    mark(state, run, ended=ended)
    (state / run / "local-1-0.safetensors").write_bytes(bytes(size))


def runs(state: Path) -> set[str]:
    return {path.name for path in state.iterdir() if path.is_dir()}


def test_the_runs_used_last_are_kept_whatever_the_clock_says(tmp_path: Path) -> None:
    for age, run in enumerate(("first", "second", "third", "second")):
        worked_on(tmp_path, run)
        for path in (tmp_path / run, *(tmp_path / run).iterdir()):
            os.utime(path, (1e9 - age, 1e9 - age))  # a device without a battery for its clock
    said = collect(tmp_path, Bounds(runs=2))
    assert runs(tmp_path) == {"second", "third"}
    assert len(said) == 1
    assert "run first" in said[0]
    assert "0.0 MB" in said[0]


def test_nothing_goes_while_there_is_room(tmp_path: Path) -> None:
    """However long the device was away: only another run's state takes the place of one."""
    worked_on(tmp_path, "old")
    for path in (tmp_path / "old", *(tmp_path / "old").iterdir()):
        os.utime(path, (0, 0))
    assert collect(tmp_path, Bounds(runs=2), "new") == []
    assert runs(tmp_path) == {"old"}


def test_runs_that_ended_go_before_one_that_may_be_resumed(tmp_path: Path) -> None:
    worked_on(tmp_path, "stopped")
    worked_on(tmp_path, "ended", ended=True)
    worked_on(tmp_path, "later", ended=True)
    collect(tmp_path, Bounds(runs=2))
    assert runs(tmp_path) == {"stopped", "later"}
    mark(tmp_path, "later", ended=False)  # taken further after its end
    collect(tmp_path, Bounds(runs=1))
    assert runs(tmp_path) == {"later"}


def test_the_run_at_hand_is_kept_and_takes_a_place(tmp_path: Path) -> None:
    worked_on(tmp_path, "at-hand", size=5_000_000)
    worked_on(tmp_path, "newer", size=1000)
    assert collect(tmp_path, Bounds(runs=2, bytes=6_000_000), "at-hand") == []
    said = collect(tmp_path, Bounds(runs=2, bytes=4_000_000), "at-hand")
    assert runs(tmp_path) == {"at-hand"}
    assert "run at-hand alone takes more than --state-limit, 4.0 MB" in said[0]
    assert "run newer" in said[1]
    worked_on(tmp_path, "newer", size=1000)
    collect(tmp_path, Bounds(runs=1), "to-come")  # has no state yet
    assert runs(tmp_path) == set()


@pytest.mark.parametrize(("limit", "left"), [(0, {"a", "b", "c"}), (2500, {"b", "c"}), (500, set[str]())])
def test_bytes_are_bounded_over_all_runs(limit: int, left: set[str], tmp_path: Path) -> None:
    for run in ("a", "b", "c"):
        worked_on(tmp_path, run, size=1000)
    said = collect(tmp_path, Bounds(runs=9, bytes=limit))
    assert runs(tmp_path) == left
    assert len(said) == 3 - len(left)
    assert all("--state-limit" in sentence for sentence in said)


def test_only_runs_are_collected(tmp_path: Path) -> None:
    """Flower's own folder, the log and the lock lie beside them; older versions left no mark."""
    (tmp_path / "flower/apps").mkdir(parents=True)
    (tmp_path / "flower/apps/app").write_text("flower's")
    (tmp_path / "client.log").write_text("told")
    (tmp_path / "unmarked").mkdir()
    (tmp_path / "unmarked/reply-3-0.bin").write_bytes(b"answer")
    (tmp_path / "torn.gone").mkdir()
    (tmp_path / "torn.gone/local-1-0.safetensors").write_bytes(b"half")
    worked_on(tmp_path, "marked")
    (said,) = collect(tmp_path, Bounds(runs=1))
    assert "run unmarked" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["client.log", "flower", "marked"]


def test_a_damaged_mark_is_the_oldest(tmp_path: Path) -> None:
    worked_on(tmp_path, "damaged")
    worked_on(tmp_path, "whole")
    (tmp_path / "damaged/used").write_bytes(b"\xff\x00")
    collect(tmp_path, Bounds(runs=1))
    assert runs(tmp_path) == {"whole"}


def test_what_cannot_be_deleted_is_said_and_ends_no_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked_on(tmp_path, "stuck")

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    (said,) = collect(tmp_path, Bounds(runs=1), "new")
    assert "run stuck, 0.0 MB, cannot be deleted: Permission denied" in said


def test_a_mark_is_for_its_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        mark(tmp_path / "state", "run", ended=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state/run").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "state/run/used").stat().st_mode) == 0o600
