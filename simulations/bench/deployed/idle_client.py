"""Answers every message with what it was sent: the floor under any deployed round."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Send the message back."""
    return Message(message.content, reply_to=message)
