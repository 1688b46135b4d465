"""The Flower ClientApp: a thin process that hands each message to the worker.

On a device Flower starts a new process for every message, so nothing here imports torch: the message goes to
the resident worker behind a Unix socket. Without one - in a simulation - the worker runs in this process.
"""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.device.journal import log_of, news
from client.device.screen import say
from client.node import CONFIG_KEY, NodeContext
from fedllm.certificates import Holder, reply_statement
from fedllm.errors import FedllmError, WireError
from fedllm.protocol import claims, wire
from fedllm.protocol.wire import STALE, Instruction, Reply

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer one instruction, of whatever kind; the instruction itself says what to do."""
    place = NodeContext.of(context)
    config = str(context.run_config[CONFIG_KEY])
    socket = context.node_config.get("worker-socket")
    if socket is None:
        from client.worker import answer

        reply = _signed(answer(message.content, config, place), message.content, place)
        return Message(reply, reply_to=message)
    reply = _answer(message.content, config, place, str(socket))
    if lines := news(log_of(Path(place.folder))):
        wire.add_log(reply, lines)
    return Message(reply, reply_to=message)


def _answer(content: RecordDict, config: str, place: NodeContext, socket: str) -> RecordDict:
    """Have the worker answer; what keeps it from that is said to the server and on the device's screen."""
    from client.resident import ask

    instruction = Instruction("", "")
    try:
        instruction = wire.unpack_instruction(content)
        reply = _signed(wire.decode(ask(socket, _request(content, config, place))), content, place)
    except FedllmError as error:
        reason = str(error) or repr(error)
        reply = wire.pack_reply(Reply(instruction.round, instruction.index, error=reason))
    if said := _outcome(instruction, wire.failure_of(reply), str(json.loads(config).get("name", ""))):
        say(said)
    return reply


def _signed(reply: RecordDict, asked: RecordDict, place: NodeContext) -> RecordDict:
    """Sign a device's reply with its bundle's key, so that nobody else's counts for it."""
    if not place.bundle or wire.failure_of(reply):
        return reply
    instruction = wire.unpack_instruction(asked)
    try:
        digest = wire.digest(wire.unpack_reply(reply), instruction.run, place.node)
    except WireError:
        return reply  # which the server rejects, and says for what
    holder = Holder.read(Path(place.bundle))
    signature = holder.sign(reply_statement(instruction.kind, digest))
    wire.add_signature(reply, signature, holder.shown if instruction.kind == "describe" else b"")
    return reply


def _request(content: RecordDict, config: str, place: NodeContext) -> bytes:
    """Serialize an instruction with all that the worker needs to answer it."""
    envelope = {"config": ConfigRecord({"json": config}), "place": place.to_record()}
    return wire.encode(RecordDict({**content, **envelope}))


def _outcome(instruction: Instruction, failure: str, run: str) -> str:
    """Say in a sentence what kept this device from taking part in a run; empty where nothing did.

    Args:
        instruction: what the server asked; of no kind where it cannot be read.
        failure: why this device cannot do it, as it answers.
        run: the run's name.
    """
    if failure and failure != STALE:
        if instruction.kind in ("", "describe"):
            return f"this device cannot take part in the run {run}: {failure}"
        return f"this device could not do its work in round {instruction.round} of the run {run}: {failure}"
    refused = instruction.arguments.get(wire.REFUSED)
    if isinstance(refused, str):
        return f"the server does not take this device into the run {run}: {claims.text(refused)}"
    return ""
