"""The process of one message: Flower's own runner, without what Flower's command for it loads besides.

That command brings a database and its migrations along: a quarter of its memory and a third of its start,
once for every message.
"""

from __future__ import annotations

import argparse

from flwr.supernode.runtime.run_clientapp import run_clientapp

from fedllm.host.processes import die_with_parent

__all__ = ["main"]


def main() -> None:
    """Answer one message: ``python -m client.device.task``, with the arguments of ``flwr-clientapp``."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--runtime-api-address", required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--insecure", action="store_true", required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    told = parser.parse_args()
    die_with_parent(told.parent_pid)  # why Flower's own watch does not suffice: server/app.py
    run_clientapp(told.runtime_api_address, told.token, told.insecure, parent_pid=told.parent_pid)


if __name__ == "__main__":
    main()
