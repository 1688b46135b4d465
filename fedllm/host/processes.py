"""Child processes of a server or a device: their output goes to a bounded log, none outlives its parent.

Those that matter are started again when they end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

__all__ = [
    "Child",
    "Kept",
    "allow_slow_starts",
    "die_with_parent",
    "hand_secret",
    "interruptible",
    "keep_no_core",
    "open_log",
]

LOG_BYTES = 5_000_000
LOG_FILES = 4
LONGEST_DELAY = 300.0
STEADY_SECONDS = 60.0
_PARENT = "FEDLLM_PARENT"
"""Environment variable by which a child knows its parent."""


def open_log(path: Path) -> logging.Logger:
    """Open a log of at most 20 MB in four files, oldest lines dropped first; readable by its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger(f"fedllm.log.{path}")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        handler = _PrivateFile(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES - 1, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(handler)
    return logger


class _PrivateFile(RotatingFileHandler):
    """Creates each of its files with mode 0600, those after a rotation as well."""

    def _open(self) -> TextIOWrapper:
        path = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return TextIOWrapper(open(path, "ab"), encoding=self.encoding, write_through=True)

    def handleError(self, record: logging.LogRecord) -> None:
        """Lose a line that cannot be written, as on a full disk, rather than print a traceback for each."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class Child:
    """A running command whose whole tree of processes can be stopped.

    Args:
        command: program and arguments.
        environment: added to this process's own environment.
        log: receives every line the command prints.
        watch: called with every line, from a thread of its own.
        private: whether what it writes is for its own user alone, whatever the umask here.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: logging.Logger,
        watch: Callable[[str], None] | None = None,
        *,
        private: bool = False,
    ) -> None:
        # A session of its own: Ctrl-C in a terminal reaches the parent alone, which stops children in order.
        self._process = subprocess.Popen(
            list(command),
            env={
                **os.environ,
                "PATH": _path(),
                "PYTHONUNBUFFERED": "1",
                _PARENT: str(os.getpid()),
                **environment,
            },
            umask=0o077 if private else -1,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._pump = threading.Thread(target=self._read, args=(log, watch), daemon=True)
        self._pump.start()

    @property
    def pid(self) -> int:
        """Process id of the command itself."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        return self._process.poll()

    def stop(self, grace: float = 5.0) -> None:
        """Ask the tree to end, wait ``grace`` seconds, then kill what is left of it, by process id."""
        tree = self._tree()
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=grace)
        for process in {*alive, *self._tree()}:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._pump.join(timeout=1.0)

    def _tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _read(self, log: logging.Logger, watch: Callable[[str], None] | None) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                log.info(line.rstrip())
                if watch is not None:
                    watch(line)


class Kept:
    """A process that is started again whenever it ends, each time later, up to five minutes.

    Args:
        name: for what is reported.
        start: starts it.
        first_delay: seconds before the first restart; a process that held a minute starts from here again.
    """

    def __init__(self, name: str, start: Callable[[], Child], *, first_delay: float = 1.0) -> None:
        self.name = name
        self.restarts = 0
        self._start = start
        self._first_delay = first_delay
        self._delay = first_delay
        self._child: Child | None = None
        self._began = 0.0
        self._due = 0.0

    @property
    def pid(self) -> int | None:
        """Process id, or None while it is down."""
        return self._child.pid if self._child is not None and self._child.poll() is None else None

    def tend(self, *, start: bool = True) -> str | None:
        """Start it if it is due and wanted. Returns a sentence when it has ended since the last call."""
        now = time.monotonic()
        if self._child is None:
            if start and now >= self._due:
                self._child, self._began = self._start(), now
            return None
        status = self._child.poll()
        if status is None:
            return None
        self._child.stop()
        self._child = None
        self.restarts += 1
        if now - self._began > STEADY_SECONDS:
            self._delay = self._first_delay
        self._due = now + self._delay
        sentence = f"the {self.name} ended with status {status}; starting it again in {self._delay:.0f} s"
        self._delay = min(2 * self._delay, LONGEST_DELAY)
        return sentence

    def stop(self) -> None:
        """End it; the next :meth:`tend` starts it anew."""
        if self._child is not None:
            self._child.stop()
        self._child = None
        self._due = 0.0


def _path() -> str:
    # Flower starts its own commands by bare name, also where the virtual environment is not activated.
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def allow_slow_starts(*corestates: ModuleType) -> None:
    """Give what Flower starts for a task two minutes to report; its own 30 s can end in ever more processes.

    On a busy or slow machine a Python process can take that long to start. Flower then starts another for the
    same task and refuses the first. Heartbeats keep their 60 s: patience times interval.
    """
    for corestate in corestates:
        vars(corestate).update(HEARTBEAT_DEFAULT_INTERVAL=120, HEARTBEAT_PATIENCE=0.5)


def hand_secret(flower: ModuleType, secret: Path) -> None:
    """Have a module of Flower's, which starts an executor of tasks, give it a secret to prove itself with.

    Flower has the secret only for executors that others start, and none for its own.
    """
    plain = vars(flower)["get_client_tls_args"]

    def with_secret(**options: Any) -> list[str]:
        return [*plain(**options), "--superexec-auth-secret-file", str(secret)]

    vars(flower)["get_client_tls_args"] = with_secret


def keep_no_core() -> None:
    """Have the system write no core file of this process and those it starts: one holds all of its memory."""
    import resource  # not there on every system

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def die_with_parent(parent: int | None = None, grace: float = 5.0) -> None:
    """End this process soon after its parent has gone, even when the parent was killed.

    Args:
        parent: process id of the parent; a :class:`Child` is told it, and so notices also a parent that was
            killed before this call. Where nobody said, whoever is the parent now.
        grace: seconds between asking this process to end and ending it.
    """
    told = os.environ.pop(_PARENT, None)  # not for the children of this process
    parent = parent or int(told or os.getppid())

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turn Ctrl-C and a polite kill into an event, so that loops can end where they are whole."""
    stop = threading.Event()
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
