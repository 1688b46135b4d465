"""The Flower ServerApp: conducts one run in a run folder, new or left off."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedllm.config import RunConfig
from fedllm.host.processes import die_with_parent
from server.federation import FEDERATION

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what ``run_config`` names: a configuration as JSON (``fedllm``) and a folder (``run-dir``)."""
    from server.rounds.conduct import conduct

    config = RunConfig.from_json(str(context.run_config["fedllm"]))
    folder = Path(str(context.run_config["run-dir"]))
    federation = os.environ.get(FEDERATION)
    if federation is None:
        conduct(grid, config, folder)
        return
    # Flower's own watch takes a parent that died and that nobody waited for (a container's first process may
    # be any program) for alive; the run would go on without a SuperLink for ever and keep its folder locked.
    die_with_parent()
    from server.federation import deployed
    from server.federation.inbox import Inbox
    from server.federation.uploads import LIMITS, Limits

    deployed.keep_log(Path(federation), folder.name)
    limits = Limits(Path(federation) / "superlink" / LIMITS)
    number = grid.run.run_id
    Inbox.serve(grid, lambda: limits.of(number))
    bound = partial(limits.set, number)
    transport = deployed.transport(Path(federation), folder.name, bound)
    conduct(grid, config, folder, transport=transport)
