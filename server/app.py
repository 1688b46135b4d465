"""The Flower ServerApp: conducts one run in a run folder, new or left off."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedllm.config import RunConfig

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what ``run_config`` names: a configuration as JSON (``fedllm``) and a folder (``run-dir``)."""
    from server.conduct import conduct

    config = RunConfig.from_json(str(context.run_config["fedllm"]))
    conduct(grid, config, Path(str(context.run_config["run-dir"])))
