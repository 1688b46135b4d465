"""The stock ClientApp of ``simulations.bench.peer``, which also says how long its steps took."""

from __future__ import annotations

import time

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from simulations.bench.peer.task import get_weights, load_data, load_model, set_weights
from simulations.bench.peer.task import train as take_steps

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Load model and data, train, return the adapter."""
    model = load_model()
    set_weights(model, message.content.array_records["arrays"].to_torch_state_dict())
    dataset = load_data(int(context.node_config["partition-id"]), int(context.run_config["clients"]))
    began = time.perf_counter()
    loss = take_steps(model, dataset, int(context.run_config["local-steps"]), 1e-3)
    facts: dict[str, int | float | list[int] | list[float]]
    facts = {"train_loss": loss, "num-examples": len(dataset), "seconds": time.perf_counter() - began}
    content = RecordDict({"arrays": ArrayRecord(get_weights(model)), "metrics": MetricRecord(facts)})
    return Message(content, reply_to=message)
