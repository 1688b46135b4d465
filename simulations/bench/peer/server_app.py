"""The stock ServerApp."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from simulations.bench.peer.task import get_weights, load_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Federated averaging of the adapters, evaluation off."""
    strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=int(context.run_config["clients"]))
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_weights(load_model())),
        num_rounds=int(context.run_config["rounds"]),
    )
    losses = {number: metrics["train_loss"] for number, metrics in result.train_metrics_clientapp.items()}
    print(f"peer losses {losses}")
