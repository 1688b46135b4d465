"""The resident worker: one process per node that keeps model, data and caches loaded between messages.

Flower starts a new process for every message. That process stays thin and calls :func:`ask`; the worker
behind the Unix socket answers. Requests and answers are opaque bytes over gRPC, with gRPC's standard health
service beside them.

An answer that nobody waits for any more (deadline passed, run stopped) cannot be interrupted inside torch, so
the worker gives it a few seconds and then ends itself; its supervisor starts a new one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from types import FrameType

import grpc
import psutil
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from client.outward import log_to, reason
from fedllm.errors import FedllmError
from fedllm.host.processes import die_with_parent, keep_no_core

__all__ = ["Answer", "WorkerError", "ask", "limit_memory", "serve"]

Answer = Callable[[bytes], bytes]
"""What the worker does with one request."""

SERVICE = "fedllm.Worker"
METHOD = f"/{SERVICE}/Answer"
GRACE_SECONDS = 5.0
ATTEMPTS = 3
FAREWELL_SECONDS = 0.5
"""So long a worker that ends of itself gives its last answer to leave."""
ABANDONED = 75
"""Exit status of a worker that wants to be started anew (EX_TEMPFAIL)."""

_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
# A worker that is only being started is found soon: the next look comes after half a second, not minutes.
_SOON = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]

_log = logging.getLogger("fedllm.worker")


class WorkerError(FedllmError):
    """The resident worker could not answer; the message says why."""


def ask(socket: str | Path, request: bytes, timeout: float = 3600.0) -> bytes:
    """Have the worker answer one request, waiting for it to start or to come back where that is needed.

    Args:
        socket: the worker's Unix socket.
        request: opaque to this module. It may be sent again if the worker dies over it.
        timeout: seconds until the answer must be here, restarts included.

    Raises:
        WorkerError: no answer in time, the worker died over the request three times, or it refused.
    """
    deadline = time.monotonic() + timeout
    for attempt in range(1, ATTEMPTS + 1):
        with grpc.insecure_channel(f"unix:{socket}", options=_OPTIONS + _SOON) as channel:
            call = channel.unary_unary(METHOD)
            try:
                return bytes(call(request, timeout=deadline - time.monotonic(), wait_for_ready=True))
            except grpc.RpcError as error:
                code, details = error.code(), error.details()
                if code == grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise WorkerError(f"the worker did not answer within {timeout:.0f} s") from error
                if code != grpc.StatusCode.UNAVAILABLE:
                    raise WorkerError(str(details)) from error
                if attempt == ATTEMPTS:
                    raise WorkerError(f"the worker died {ATTEMPTS} times over this request") from error
        # The socket of the dead worker refuses at once; its successor takes a moment to replace it.
        time.sleep(0.2)
    raise AssertionError("unreachable")


def serve(socket: Path, load: Callable[[], Answer], *, memory: int | None = None) -> grpc.Server:
    """Serve requests on a socket that only this user can open; returns once ``load`` has returned.

    Args:
        socket: path of the Unix socket, at most about 100 characters; its folder is made private.
        load: imports and prepares whatever answers need; health says NOT_SERVING until it is done.
        memory: bytes of private memory this process may use. An allocation beyond fails; the request reports
            that, and the process then ends to let go of what it had cached. Enforced on Linux.
    """
    socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    socket.unlink(missing_ok=True)
    handler = _Handler(memory if sys.platform == "linux" else None)
    status = health.HealthServicer()
    status.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8), options=_OPTIONS)
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    method = grpc.unary_unary_rpc_method_handler(handler.answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Answer": method}),))
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{socket}")
    finally:
        os.umask(before)
    server.start()
    handler.ready(load())
    status.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    return server


class _Handler:
    """Answers one request at a time: two at once would need the memory of both."""

    def __init__(self, memory: int | None) -> None:
        self._memory = memory
        self._turn = threading.Lock()
        self._loaded = threading.Event()
        self._answer: Answer = _not_loaded

    def ready(self, answer: Answer) -> None:
        self._answer = answer
        self._loaded.set()

    def answer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        while not self._loaded.wait(0.1) or not self._turn.acquire(timeout=0.1):
            if not context.is_active():
                return b""
        finished = threading.Event()
        try:
            context.add_callback(lambda: _leave_unless(finished))
            if self._memory is not None:
                limit_memory(self._memory)
            return self._answer(request)
        except FedllmError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason(error))
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                context.abort(grpc.StatusCode.INTERNAL, reason(error))
            _log.exception("a request did not fit into memory; starting anew")
            threading.Timer(FAREWELL_SECONDS, os._exit, (ABANDONED,)).start()
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"out of memory on this device: {error}")
        except Exception as error:
            # Sent to the server, whose operator sees it in the run; the rest stays in the device's log.
            _log.error("a request failed: %s", type(error).__name__)
            context.abort(grpc.StatusCode.INTERNAL, reason(error))
        finally:
            finished.set()
            self._turn.release()
        raise AssertionError("unreachable")


def limit_memory(memory: int) -> None:
    """Limit what this process may use from now on, whatever address space it holds without using it.

    The system's limit counts both: what libraries reserve, and what allocators keep after it was freed.
    """
    now = psutil.Process().memory_info()
    unused = max(now.data - (now.rss - now.shared), 0)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = memory + unused if hard == resource.RLIM_INFINITY else min(memory + unused, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _not_loaded(request: bytes) -> bytes:
    raise AssertionError("asked before it was loaded")


def _leave_unless(finished: threading.Event) -> None:
    def watch() -> None:
        if not finished.wait(GRACE_SECONDS):
            _log.warning("nobody waits for this answer any more; starting anew")
            os._exit(ABANDONED)

    if not finished.is_set():
        threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Run a worker process: ``python -m client.resident --socket PATH``."""
    parser = argparse.ArgumentParser(description="Resident worker of one fedllm node")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument(
        "--answer", default="client.worker:answer_bytes", help="MODULE:FUNCTION, bytes to bytes"
    )
    parser.add_argument("--memory", type=int, default=None, help="bytes this process may allocate")
    arguments = parser.parse_args()
    die_with_parent()
    keep_no_core()  # it would hold texts, and lie where the device was started
    log_to(sys.stdout)
    module, _, name = arguments.answer.partition(":")

    def load() -> Answer:
        answer: Answer = getattr(importlib.import_module(module), name)
        return answer

    server = serve(arguments.socket, load, memory=arguments.memory)

    def leave(signum: int, frame: FrameType | None) -> None:
        server.stop(None)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    _log.info("ready")
    server.wait_for_termination()
    with contextlib.suppress(FileNotFoundError):
        arguments.socket.unlink()


if __name__ == "__main__":
    main()
