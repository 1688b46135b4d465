"""A ClientApp that says who answered."""

from __future__ import annotations

import os

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    said = {"partition": context.node_config["partition-id"], "process": os.getpid()}
    return Message(RecordDict({"said": ConfigRecord(said)}), reply_to=message)
