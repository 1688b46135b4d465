"""The only place where instructions and replies become Flower records, and back.

A message carries one configuration record with the header and at most one array with the payload, whose
bytes Flower never interprets. Whatever arrives is checked for presence, type and range before use;
nothing is unpickled. This module does not import torch, so that a device's thin client process stays thin.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from fedllm.certificates import MOST_CERTIFICATE, MOST_SIGNATURE
from fedllm.errors import WireError
from fedllm.protocol import claims
from fedllm.protocol.claims import MOST_EXAMPLES, MOST_TEXT

__all__ = [
    "DENSE",
    "LOG",
    "ONCE",
    "REFUSED",
    "SESSION",
    "STALE",
    "TASK",
    "VERSION",
    "Instruction",
    "Reply",
    "Scalar",
    "add_log",
    "add_signature",
    "decode",
    "digest",
    "encode",
    "failure_of",
    "has_gone",
    "pack_instruction",
    "pack_reply",
    "size",
    "sizes",
    "unpack_instruction",
    "unpack_reply",
]

Scalar = bool | int | float | str

VERSION = 1
"""Of this format; a peer that speaks another one is refused."""

STALE = "stale"
"""``Reply.error`` of a client that does not hold the version that the increments start from."""

DENSE = -1
"""``Instruction.start`` of a payload that holds the global tensors whole."""

LOG = "log"
"""The fact that holds lines of a node's own log."""

ONCE = "forward_once"
"""The metric that says how many of a reply's forward passes a simulated device makes once in a run."""

SESSION = ("keys", "shares", "agree", "unmask")
"""Kinds of the exchanges that secure aggregation holds around one of a method's; ``agree`` is for devices."""

TASK = "task"
"""The fact of a masked answer by which it tells what it answers: see :func:`fedllm.secagg.rules.task`."""

REFUSED = "refused"
"""The argument of ``describe`` that says why the server did not take the node's last introduction."""

_MOST_ROUNDS = 2**31 - 1
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_HEADER, _ARGUMENTS, _METRICS, _FACTS, _ARRAYS, _PAYLOAD = "h", "a", "m", "f", "p", "x"
_REPLY = {_HEADER, _METRICS, _FACTS, _ARRAYS}
_NAMES = {"h": "header", "a": "arguments", "m": "metrics", "f": "facts", "p": "payload"}


@dataclass(frozen=True)
class Instruction:
    """What the server asks of one client.

    Attributes:
        run: identity of the run; client state of other runs is never touched.
        kind: ``describe``, ``setup``, ``fit`` or ``evaluate``, or one of :data:`SESSION`.
        round, index, attempt: the round, the exchange within it, and how often the round was begun.
            The answer is a function of (run, round, index), never of the attempt.
        base: version of the global tensors to work on.
        start: version that the payload's increments start from; ``DENSE`` for whole tensors.
        sizes: bytes of each increment, in order; together they are the payload.
        oldest: global versions below this one will not be named again.
        digest: of the tensors at ``base`` as this client must hold them; see :func:`fedllm.tensors.digest`.
        counted: (round, index) of this client's newest reply that counted; (0, 0) if none did.
        progress: share of the rounds that is done, in [0, 1).
        arguments: the method's own.
        session: what secure aggregation says, see :mod:`fedllm.secagg`; empty where there is none.
    """

    run: str
    kind: str
    round: int = 0
    index: int = 0
    attempt: int = 0
    base: int = 0
    start: int = 0
    sizes: tuple[int, ...] = ()
    oldest: int = 0
    digest: int = 0
    counted: tuple[int, int] = (0, 0)
    progress: float = 0.0
    arguments: Mapping[str, Scalar] = field(default_factory=dict)
    payload: bytes = b""
    session: bytes = b""


@dataclass(frozen=True)
class Reply:
    """What a client answers.

    Attributes:
        examples: texts that stand behind the answer: its weight in an average.
        metrics: numbers about the work, by name.
        facts: texts about the device, by name: in answers to ``describe``, and lines of its ``log`` in any.
        error: empty unless the client could not do the work; ``STALE`` asks for the global tensors whole.
        signature: a device's, under :func:`fedllm.certificates.reply_statement`; empty where it has no key.
        certificate: of that key, in answers to ``describe``.
    """

    round: int
    index: int
    examples: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    payload: bytes = b""
    error: str = ""
    signature: bytes = b""
    certificate: bytes = b""


def pack_instruction(instruction: Instruction) -> RecordDict:
    """Lay an instruction out as a Flower record."""
    header = ConfigRecord(
        {
            "v": VERSION,
            "run": instruction.run,
            "kind": instruction.kind,
            "at": [instruction.round, instruction.index, instruction.attempt],
            "global": [
                instruction.base,
                instruction.start,
                instruction.oldest,
                instruction.digest,
                *instruction.sizes,
            ],
            "counted": list(instruction.counted),
            "progress": float(instruction.progress),
        }
    )
    if instruction.session:
        header["session"] = instruction.session
    content = RecordDict({_HEADER: header})
    if instruction.arguments:
        content[_ARGUMENTS] = ConfigRecord(dict(instruction.arguments))
    _add_payload(content, instruction.payload)
    return content


def unpack_instruction(content: RecordDict) -> Instruction:
    """Invert :func:`pack_instruction`; raises ``WireError`` for anything else."""
    header = _header(content, sender="server", receiver="device")
    base, start, oldest, digest, *sizes = _integers(header, "global", at_least=4)
    round, index, attempt = _integers(header, "at", exactly=3)
    counted = _integers(header, "counted", exactly=2)
    payload = _payload(content)
    if min(sizes, default=0) < 0 or sum(sizes) != (len(payload) if sizes else 0):
        raise WireError(f"increments of {sum(sizes)} bytes announced, payload holds {len(payload)}")
    progress = header.get("progress")
    if not isinstance(progress, float) or not 0.0 <= progress <= 1.0:
        raise WireError(f"progress must be a number in [0, 1], got {progress!r}")
    arguments = content.get(_ARGUMENTS, ConfigRecord())
    if not isinstance(arguments, ConfigRecord):
        raise WireError("the arguments are not a configuration record")
    session = header.get("session", b"")
    if not isinstance(session, bytes):
        raise WireError("header field session is malformed")
    run = _text(header, "run")
    if not _RUN.fullmatch(run):  # clients name folders after it
        raise WireError(f"run {run[:40]!r} is not a plain name")
    return Instruction(
        run=run,
        kind=_text(header, "kind"),
        round=round,
        index=index,
        attempt=attempt,
        base=base,
        start=start,
        sizes=tuple(sizes),
        oldest=oldest,
        digest=digest,
        counted=(counted[0], counted[1]),
        progress=progress,
        arguments={
            key: value for key, value in arguments.items() if isinstance(value, bool | int | float | str)
        },
        payload=payload,
        session=session,
    )


def pack_reply(reply: Reply) -> RecordDict:
    """Lay a reply out as a Flower record."""
    header = ConfigRecord({"v": VERSION, "at": [reply.round, reply.index, reply.examples]})
    if reply.error:
        header["error"] = reply.error[:MOST_TEXT]
    header.update(_proof(reply.signature, reply.certificate))
    content = RecordDict({_HEADER: header})
    if reply.metrics:
        content[_METRICS] = MetricRecord({key: float(value) for key, value in reply.metrics.items()})
    if reply.facts:
        content[_FACTS] = ConfigRecord({key: value[:MOST_TEXT] for key, value in reply.facts.items()})
    _add_payload(content, reply.payload)
    return content


def unpack_reply(content: RecordDict) -> Reply:
    """Invert :func:`pack_reply`; raises ``WireError`` for anything else."""
    header = _header(content, sender="device", receiver="server")
    if unknown := sorted(content.keys() - _REPLY):
        raise WireError(f"a reply holds no record {claims.text(unknown[0])[:40]!r}")
    at = _integers(header, "at", exactly=3)
    limits = {"round": _MOST_ROUNDS, "index": _MOST_ROUNDS, "number of examples": MOST_EXAMPLES}
    round, index, examples = map(claims.whole, limits, at, limits.values())
    metrics = content.get(_METRICS, MetricRecord())
    facts = content.get(_FACTS, ConfigRecord())
    if not isinstance(metrics, MetricRecord) or not isinstance(facts, ConfigRecord):
        raise WireError("the metrics or the facts of a reply are another kind of record")
    return Reply(
        round=round,
        index=index,
        examples=examples,
        facts=claims.facts(facts),
        metrics=claims.metrics(metrics),
        payload=_payload(content),
        error=claims.text(_text(header, "error")) if "error" in header else "",
        signature=_bytes(header, "signature", MOST_SIGNATURE),
        certificate=_bytes(header, "certificate", MOST_CERTIFICATE),
    )


def digest(reply: Reply, run: str, node: int) -> str:
    """Return what a client and its server call a reply by, SHA-256: all of it but signature, facts and log.

    Args:
        reply: as it was read from its record.
        run: identity of the run.
        node: the client's number.
    """
    told = [run, node, reply.round, reply.index, reply.examples, dict(reply.metrics)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode() + b"\0" + reply.payload).hexdigest()


def has_gone(message: Message) -> bool:
    """Whether Flower answers in a node's place, since the node is not there any more."""
    return message.has_error() and message.error.code == ErrorCode.NODE_UNAVAILABLE


def failure_of(content: RecordDict) -> str:
    """Return what a reply says went wrong, whatever else is in it; empty where it says nothing."""
    header = content.get(_HEADER)
    said = header.get("error") if isinstance(header, ConfigRecord) else None
    return said if isinstance(said, str) else ""


def add_log(content: RecordDict, lines: str) -> None:
    """Let lines of the node's own log travel with a reply; of too many the last ones."""
    facts = content.get(_FACTS, ConfigRecord())
    assert isinstance(facts, ConfigRecord)
    content[_FACTS] = ConfigRecord({**facts, LOG: lines[-MOST_TEXT:]})


def add_signature(content: RecordDict, signature: bytes, certificate: bytes = b"") -> None:
    """Sign a reply; with ``certificate`` also show whose the signature is."""
    header = content[_HEADER]
    assert isinstance(header, ConfigRecord)
    content[_HEADER] = ConfigRecord({**header, **_proof(signature, certificate)})


def size(content: RecordDict) -> int:
    """Bytes of the record as serialized protobuf."""
    return sum(sizes(content).values())


def sizes(content: RecordDict) -> dict[str, int]:
    """Bytes of each part of a message as serialized protobuf; with ``envelope`` they sum to the whole."""
    proto = recorddict_to_proto(content)
    parts = {_NAMES.get(item.key, "other"): item.ByteSize() for item in proto.items}
    return {**parts, "envelope": proto.ByteSize() - sum(parts.values())}


def encode(content: RecordDict) -> bytes:
    """Serialize a record, for a worker process behind a socket."""
    return bytes(recorddict_to_proto(content).SerializeToString())


def decode(data: bytes) -> RecordDict:
    """Invert :func:`encode`; raises ``WireError`` for bytes that are not a record."""
    try:
        return recorddict_from_proto(RecordDictProto.FromString(data))
    except Exception as error:  # Flower's reading of a record that holds less than it should fails anyhow
        raise WireError(f"not a serialized record: {type(error).__name__}: {error}") from error


def _proof(signature: bytes, certificate: bytes) -> dict[str, bytes]:
    """Return the fields of a header that prove whose a reply is; none where there is nothing."""
    fields = {"signature": signature, "certificate": certificate}
    return {name: value for name, value in fields.items() if value}


def _bytes(header: ConfigRecord, key: str, most: int) -> bytes:
    value = header.get(key, b"")
    if not isinstance(value, bytes) or len(value) > most:
        raise WireError(f"header field {key} is not as many as {most} bytes")
    return value


def _add_payload(content: RecordDict, payload: bytes) -> None:
    if payload:
        array = Array(dtype="uint8", shape=(len(payload),), stype="raw", data=payload)
        content[_ARRAYS] = ArrayRecord({_PAYLOAD: array})


def _payload(content: RecordDict) -> bytes:
    arrays = content.get(_ARRAYS)
    if arrays is None:
        return b""
    if not isinstance(arrays, ArrayRecord) or list(arrays) != [_PAYLOAD]:
        raise WireError("the payload is not a single array")
    array = arrays[_PAYLOAD]
    if not isinstance(array.data, bytes) or (array.dtype, list(array.shape)) != ("uint8", [len(array.data)]):
        claimed = f"{array.dtype} {list(array.shape)}"
        raise WireError(f"the payload claims to be {claimed} and has {len(array.data)} bytes")
    return array.data


def _header(content: RecordDict, *, sender: str, receiver: str) -> ConfigRecord:
    header = content.get(_HEADER)
    if not isinstance(header, ConfigRecord):
        raise WireError("the message has no header; was it sent by fedllm?")
    spoken = header.get("v")
    if spoken != VERSION:
        newer = isinstance(spoken, int) and spoken > VERSION
        raise WireError(
            f"the {sender} speaks format {str(spoken)[:20]} and this {receiver} format {VERSION}: "
            f"upgrade fedllm on the {receiver if newer else sender}"
        )
    return header


def _integers(header: ConfigRecord, key: str, *, exactly: int = 0, at_least: int = 0) -> list[int]:
    values = header.get(key)
    if (
        not isinstance(values, list)
        or not all(isinstance(value, int) and not isinstance(value, bool) for value in values)
        or len(values) < at_least
        or (exactly and len(values) != exactly)
    ):
        raise WireError(f"header field {key} is missing or malformed")
    return [int(value) for value in values]


def _text(header: ConfigRecord, key: str) -> str:
    value = header.get(key)
    if not isinstance(value, str) or len(value) > MOST_TEXT:
        raise WireError(f"header field {key} is missing or not a short text")
    return value
