"""``python -m server.dashboard RUNS``: the dashboard as a child of another command."""

from __future__ import annotations

import sys

from fedllm.errors import FedllmError
from fedllm.host.processes import die_with_parent
from fedllm.terminal.console import console
from server.dashboard.dashboard_commands import app

if __name__ == "__main__":
    die_with_parent()
    try:
        app(prog_name="fedllm dashboard")
    except FedllmError as error:
        console.print(f"error: the dashboard: {error}")
        sys.exit(error.exit_code)
