"""The stock ClientApp."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from simulations.bench.peer.task import get_weights, load_data, load_model, set_weights
from simulations.bench.peer.task import train as train_fn

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Load model and data, train, return the adapter."""
    model = load_model()
    set_weights(model, message.content.array_records["arrays"].to_torch_state_dict())
    dataset = load_data(int(context.node_config["partition-id"]), int(context.node_config["num-partitions"]))
    loss = train_fn(model, dataset, int(context.run_config["local-steps"]), 1e-3)
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(dataset)})
    return Message(
        RecordDict({"arrays": ArrayRecord(get_weights(model)), "metrics": metrics}), reply_to=message
    )
