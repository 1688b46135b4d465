"""The engine ``loopback``: an in-process Flower grid that calls the real ClientApp.

One frozen backbone serves every virtual client; a client's own tensors lie on disk. Messages are answered one
after another when the server looks for replies, or side by side in a pool of worker processes, each with a
backbone of its own. The numbers are the same either way: a matrix product's last bits depend on how many
threads share it, so each client computes with the same number of threads wherever it is.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from flwr.app import Context, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from client.app import app as client_app
from client.node import CONFIG_KEY, FOLDER_KEY
from client.worker import open_globals
from fedllm.config import RunConfig
from fedllm.errors import FedllmError, RunFailed
from fedllm.host.processes import die_with_parent
from fedllm.protocol import wire
from server.app import app as server_app
from strategies.session import forget_sessions, open_session

__all__ = ["LoopbackGrid", "simulate"]

_RUN_ID = 1


def simulate(config: RunConfig, folder: Path, workers: int = 1, threads: int = 1) -> None:
    """Run a configuration, new or left off, with all clients on this host.

    Args:
        config: the resolved configuration.
        folder: the run folder.
        workers: processes that answer for the clients; 1 answers in this process.
        threads: torch threads of each client. The last bits of a run depend on it, not on ``workers``.

    Raises:
        RunFailed: a worker process died, or whatever ended the run.
    """
    run_config = {CONFIG_KEY: config.to_json(), FOLDER_KEY: str(folder.resolve())}
    torch.set_num_threads(threads)
    try:
        with loopback(config.clients, run_config, workers, threads) as grid:
            server_app(grid, _context(0, 0, run_config))
    finally:
        # A process that goes on needs the memory; and the same path may hold other texts by then.
        forget_sessions()
        open_globals.cache_clear()


@contextmanager
def loopback(
    clients: int, run_config: dict[str, str], workers: int = 1, threads: int = 1
) -> Iterator[LoopbackGrid]:
    """Open a grid of ``clients`` virtual nodes; see :func:`simulate`."""
    _take_identity()
    if workers == 1:
        yield LoopbackGrid(clients, run_config, None)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=_enter_pool, initargs=(threads, os.getpid())
    ) as pool:
        with _no_main_module():
            for _ in range(workers):
                pool.submit(_warm, run_config[CONFIG_KEY])
        try:
            yield LoopbackGrid(clients, run_config, pool)
        except BrokenProcessPool:
            raise RunFailed(
                "a worker process died, most likely for want of memory; nothing is lost: "
                f"continue with fedllm resume {run_config[FOLDER_KEY]} --workers 1"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _take_identity() -> None:
    """Flower's Message takes its identity from this process-wide place, which its runtimes fill."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = _RUN_ID, 1, SUPERLINK_NODE_ID


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Let new processes leave the program alone that started this one; they need nothing of it.

    Python runs the main module again in each of them: a script without a guard would simulate once more.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@dataclass(frozen=True)
class _Request:
    message_id: str
    node: int
    content: bytes
    run_config: dict[str, str]


class LoopbackGrid(Grid):
    """Flower's grid interface over clients in this process or in a pool; node k + 1 is client k."""

    def __init__(self, clients: int, run_config: dict[str, str], pool: ProcessPoolExecutor | None) -> None:
        self._clients = clients
        self._run_config = run_config
        self._pool = pool
        self._pushed = 0
        self._queue: deque[Message] = deque()
        self._flying: dict[Future[bytes], Message] = {}

    def set_run(self, run: Run) -> None:
        """Ignore: there is one run."""

    @property
    def run(self) -> Run:
        """Return what Flower knows of the one run."""
        return Run.create_empty(_RUN_ID)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message; Flower prefers its constructor."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return Flower ids of the virtual nodes, from 1."""
        return range(1, self._clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages for later."""
        identifiers = []
        for message in messages:
            self._pushed += 1
            message.metadata.__dict__["_message_id"] = str(self._pushed)
            identifiers.append(message.metadata.message_id)
            if self._pool is None:
                self._queue.append(message)
                continue
            node = message.metadata.dst_node_id - 1
            request = _Request(
                message.metadata.message_id, node, wire.encode(message.content), self._run_config
            )
            self._flying[self._pool.submit(_answer_in_pool, request)] = message
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answer the oldest message, or return what the pool has finished."""
        wanted = set(message_ids)
        if self._pool is None:
            while self._queue:
                message = self._queue.popleft()
                if message.metadata.message_id in wanted:
                    return [client_app(message, self.context(message.metadata.dst_node_id - 1))]
            return []
        done = set[Future[bytes]]()
        while self._flying and not done:  # whoever computes is not silent; the timeout lets Ctrl-C through
            done, _ = wait(self._flying, timeout=1.0, return_when=FIRST_COMPLETED)
        finished = [(future.result(), self._flying.pop(future)) for future in done]
        replies = [Message(wire.decode(data), reply_to=message) for data, message in finished]
        return [reply for reply in replies if reply.metadata.reply_to_message_id in wanted]

    def context(self, node: int) -> Context:
        """Return the Flower context in which client ``node`` answers."""
        return _context(node + 1, node, self._run_config)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, then pull until every reply is there or ``timeout`` seconds are over."""
        waiting = set(self.push_messages(messages))
        closes = time.monotonic() + (timeout if timeout is not None else float("inf"))
        replies: list[Message] = []
        while waiting and time.monotonic() < closes:
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
        return replies


def _context(flower_id: int, partition: int, run_config: dict[str, str]) -> Context:
    return Context(
        run_id=_RUN_ID,
        node_id=flower_id,
        node_config={"partition-id": partition},
        state=RecordDict(),
        run_config=dict(run_config),
    )


def _enter_pool(threads: int, parent: int) -> None:
    # Ctrl-C is the parent's to handle; a parent that was killed must not leave workers behind.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)
    torch.set_num_threads(threads)
    _take_identity()


def _warm(config: str) -> None:
    """Load data and model while the server does so too."""
    try:
        open_session(config).prepare()
    except FedllmError:
        return  # the server meets the same and says so


def _answer_in_pool(request: _Request) -> bytes:
    message = Message(wire.decode(request.content), request.node + 1, "train")
    reply = client_app(message, _context(request.node + 1, request.node, request.run_config))
    if reply.has_error():
        raise RunFailed(f"client {request.node} failed: {reply.error.reason}")
    return wire.encode(reply.content)
