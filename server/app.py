"""The Flower ServerApp: conducts one run in a run folder, new or left off."""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedllm.config import RunConfig

app = ServerApp()

FEDERATION = "FEDLLM_FEDERATION"
"""Environment variable by which the SuperLink's processes know their federation's folder."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what ``run_config`` names: a configuration as JSON (``fedllm``) and a folder (``run-dir``)."""
    from server.conduct import conduct

    config = RunConfig.from_json(str(context.run_config["fedllm"]))
    folder = Path(str(context.run_config["run-dir"]))
    federation = os.environ.get(FEDERATION)
    if federation is None:
        conduct(grid, config, folder)
        return
    from server import deployed

    deployed.keep_log(Path(federation), folder.name)
    conduct(grid, config, folder, traffic=lambda: deployed.traffic(Path(federation), folder.name))
