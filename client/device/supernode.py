"""Flower's SuperNode as one process that ends with its supervisor and asks for work at a sensible pace.

It runs no app but those that are installed here, and its local API, over which tasks are handed out, answers
to nobody but itself and what it starts.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from flwr.app import Error
from flwr.supercore.corestate import in_memory_corestate, sql_corestate
from flwr.supercore.fab import Fab
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor import subprocess_executor
from flwr.supernode import main as supernode_api
from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode

from client.device.accepted import APP, refusal
from client.device.screen import say
from fedllm.host.processes import allow_slow_starts, die_with_parent

__all__ = ["Pace", "execute_here", "main", "restrict"]

SHORTEST, LONGEST = 0.1, 3.0
PATIENCE = 0.1


class Pace:
    """Stands in for the ``time`` module in Flower's loop, whose sleeps are fixed: 3 s between questions.

    The pause is a tenth of the time for which there has been nothing to do, from 0.1 s to Flower's own 3 s: a
    round that follows soon is seen soon, and an idle night on a metered link costs what it always did.
    """

    def __init__(self) -> None:
        self._worked = time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Sleep between two questions, or between two looks for a reply that is being worked on."""
        now = time.monotonic()
        if seconds < LONGEST:
            self._worked = now
        time.sleep(min(seconds, max(SHORTEST, PATIENCE * (now - self._worked))))


def restrict(accepted: tuple[str, ...]) -> None:
    """Have Flower's SuperNode refuse, with an answer that says why, every app but the accepted ones."""
    pull = vars(start_client_internal)["_pull_and_store_message"]
    refused = vars(start_client_internal)["FAB_VERIFICATION_ERROR"]

    def verify(fab: Fab, _: Mapping[str, str]) -> bool:
        reason = refusal(fab.content, accepted)
        if reason is not None:
            say(f"refused: {reason}")
        return reason is None

    def pull_checked(**options: Any) -> Any:
        get_fab = options.pop("get_fab")

        def vouched(*names: Any) -> Fab:
            # Flower verifies signatures of its own hub's, and only bundles that come with some.
            fab: Fab = get_fab(*names)
            return replace(fab, verifications={"valid_license": "-"})

        return pull(**{**options, "get_fab": vouched, "trusted_entities": {"fedllm": "-"}})

    vars(start_client_internal).update(
        _pull_and_store_message=pull_checked,
        _verify_fab=verify,
        FAB_VERIFICATION_ERROR=Error(
            refused.code, f"this device runs {' or '.join(accepted)} as it is installed, and nothing else"
        ),
    )


def execute_here() -> None:
    """Have the SuperNode start its tasks from a thread of its own, with a secret that no other process has.

    Flower starts a second process for that, its executor, which takes as much memory as the SuperNode and
    asks it over the same local API.
    """
    secret = secrets.token_bytes(32)
    create = supernode_api.create_app

    def create_guarded(**options: Any) -> Any:
        return create(**{**options, "superexec_auth_secret": secret})

    def start(command: Sequence[str]) -> None:
        address = command[command.index("--runtime-api-address") + 1]
        threading.Thread(target=_execute, args=(address, secret), daemon=True).start()

    def start_task(command: Sequence[str]) -> None:
        subprocess.Popen([sys.executable, "-m", "client.device.task", *command[1:]])

    vars(supernode_api)["create_app"] = create_guarded
    vars(subprocess_executor)["subprocess"] = SimpleNamespace(Popen=start_task)
    vars(start_client_internal)["subprocess"] = SimpleNamespace(Popen=start)
    # Signals are the SuperNode's: it ends, and this thread with it.
    vars(run_superexec)["register_signal_handlers"] = lambda **_: None


def _execute(address: str, secret: bytes) -> None:
    try:
        run_superexec.run_superexec(address, insecure=True, superexec_auth_secret=secret)
    except Exception:
        logging.getLogger("flwr").exception("tasks can no longer be started")
    finally:
        # Without it no message would be answered any more; the supervisor starts both anew.
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Run ``flower-supernode`` with this process's arguments, and ``--app`` for apps that it accepts."""
    die_with_parent()
    allow_slow_starts(in_memory_corestate, sql_corestate)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--app", action="append", default=[])
    own, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    restrict(tuple(own.app) or (APP,))
    execute_here()
    vars(start_client_internal)["time"] = Pace()
    # A node that was revoked sends itself a signal for each refused call, and at the first Flower puts back
    # what answered signals before. Python's own answer to the second, an exception, would cut its leaving
    # short, with threads that go on for ever.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    flower_supernode()


if __name__ == "__main__":
    main()
