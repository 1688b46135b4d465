"""The Flower ClientApp: a thin process that hands each message to the worker.

On a device Flower starts a new process for every message, so nothing here imports torch: the message goes to
the resident worker behind a Unix socket. Without one - in a simulation - the worker runs in this process.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.journal import log_of, news
from client.place import CONFIG_KEY, Place
from fedllm import wire

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer one instruction, of whatever kind; the instruction itself says what to do."""
    place = Place.of(context)
    config = str(context.run_config[CONFIG_KEY])
    socket = context.node_config.get("worker-socket")
    if socket is None:
        from client.worker import answer

        return Message(answer(message.content, config, place), reply_to=message)
    from client.resident import ask

    reply = wire.decode(ask(str(socket), _request(message.content, config, place)))
    if lines := news(log_of(Path(place.folder))):
        wire.add_log(reply, lines)
    return Message(reply, reply_to=message)


def _request(content: RecordDict, config: str, place: Place) -> bytes:
    """Serialize an instruction with all that the worker needs to answer it."""
    envelope = {"config": ConfigRecord({"json": config}), "place": place.to_record()}
    return wire.encode(RecordDict({**content, **envelope}))
