"""Whoever may read a run but not write sees what its owner sees, or is told why not."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedllm.errors import StoreError
from fedllm.runs.reader import Run
from fedllm.runs.writer import RunStore
from tests.store.test_store import CONFIG, commit

NOBODY = 65534


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that others may look into, which those of pytest are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@contextlib.contextmanager
def reading_only(folder: Path) -> Iterator[None]:
    """Take away the right to write: root becomes somebody else, anybody else loses it on the files."""
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)
        return
    paths = [folder, *folder.iterdir()]
    modes = [path.stat().st_mode for path in paths]
    for path, mode in zip(paths, modes, strict=True):
        path.chmod(mode & ~0o222)
    try:
        yield
    finally:
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)


def rounds(folder: Path) -> int:
    with reading_only(folder):
        return len(Run(folder).rounds())


def test_a_reader_sees_every_round_of_a_run_under_way(place: Path) -> None:
    with RunStore.create(place / "run", CONFIG) as store:
        for number in range(1, 34):
            commit(store, number)
        assert (place / "run" / "run.db-wal").stat().st_size > 0
        assert rounds(place / "run") == 33
        with reading_only(place / "run"):
            assert Run(place / "run").status == "running"
        commit(store, 34)
        assert rounds(place / "run") == 34
    assert rounds(place / "run") == 34  # and once it has ended


@pytest.mark.parametrize("left", [("run.db-wal",), ("run.db-wal", "run.db-shm")])
def test_a_reader_sees_every_round_of_a_run_that_was_killed(left: tuple[str, ...], place: Path) -> None:
    with RunStore.create(place / "run", CONFIG) as store:
        commit(store, 1)
        commit(store, 2)
        (place / "killed").mkdir()
        for name in ("run.db", "lock", *left):
            shutil.copy(store.folder / name, place / "killed")
    before = {path.name: path.read_bytes() for path in (place / "killed").iterdir()}
    assert rounds(place / "killed") == 2
    assert {path.name: path.read_bytes() for path in (place / "killed").iterdir()} == before
    assert len(Run(place / "killed").rounds()) == 2


def test_who_may_not_read_is_told(place: Path) -> None:
    RunStore.create(place / "run", CONFIG).close()
    (place / "run" / "lock").chmod(0)
    (place / "run" / "run.db").chmod(0)
    with reading_only(place / "run"):
        with pytest.raises(StoreError, match=r"cannot open \S+run\.db"):
            Run(place / "run")
        with pytest.raises(StoreError, match=r"cannot open \S+run\.db"):
            RunStore.open(place / "run")
    (place / "run" / "run.db").chmod(0o444)
    with reading_only(place / "run"), pytest.raises(StoreError, match=r"cannot read \S+lock: Permission"):
        _ = Run(place / "run").status
    (place / "run").chmod(0)
    with reading_only(place), pytest.raises(StoreError, match=r"cannot read \S+run\.db: Permission denied"):
        Run(place / "run")
    (place / "run").chmod(0o755)


def test_who_may_not_write_is_told(place: Path) -> None:
    RunStore.create(place / "run", CONFIG).close()
    with reading_only(place / "run"):
        with pytest.raises(StoreError, match=r"cannot \w+ \S+(run|lock)"):
            Run(place / "run").audit("ada", "look")
        with pytest.raises(StoreError, match=r"cannot write \S+lock: Permission denied"):
            RunStore.open(place / "run")
        with pytest.raises(StoreError, match=r"cannot write \S+: Permission denied"):
            RunStore.create(place / "run" / "other", CONFIG)
