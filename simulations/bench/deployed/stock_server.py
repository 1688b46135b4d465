"""Stock FedAvg over adapters, with a clock at the start and the end of each round."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from simulations.bench.peer.task import get_weights, load_model

app = ServerApp()


class Timed(FedAvg):
    """FedAvg that notes when each round began and ended, and the longest training in it."""

    def __init__(self, clients: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        self.rounds: list[dict[str, float]] = []
        self._began = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Start the clock."""
        self._began = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Stop the clock once the aggregate is there."""
        arrived = list(replies)
        trained = [float(str(reply.content.metric_records["metrics"]["seconds"])) for reply in arrived]
        result = super().aggregate_train(server_round, arrived)
        self.rounds.append({"seconds": time.perf_counter() - self._began, "compute": max(trained)})
        return result


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Average the adapters over ``rounds`` rounds, evaluation off; write the rounds' seconds to ``out``."""
    strategy = Timed(int(context.run_config["clients"]))
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_weights(load_model())),
        num_rounds=int(context.run_config["rounds"]),
    )
    Path(str(context.run_config["out"])).write_text(json.dumps(strategy.rounds), encoding="utf-8")
