"""Flower's SuperNode as a process that ends with its supervisor and asks for work at a sensible pace."""

from __future__ import annotations

import time

from flwr.supercore.corestate import in_memory_corestate, sql_corestate
from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode

from fedllm.processes import allow_slow_starts, die_with_parent

__all__ = ["Pace", "main"]

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


def main() -> None:
    """Run ``flower-supernode`` with this process's arguments."""
    die_with_parent()
    allow_slow_starts(in_memory_corestate, sql_corestate)
    vars(start_client_internal)["time"] = Pace()
    flower_supernode()


if __name__ == "__main__":
    main()
