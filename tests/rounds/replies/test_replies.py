"""One reply must not kill the server: whatever a node sends is taken in or rejected with a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

import strategies.base
from fedllm.errors import RunFailed, WireError
from fedllm.protocol import claims, wire
from fedllm.protocol.wire import Instruction, Reply
from fedllm.runs.reader import Run
from server.rounds.roster import Member, Roster
from simulations.bench.reply_fuzz.replies import CONFIGS, HONEST, LIARS, Answerer, conduct, fuzz
from strategies.lora.method import Lora, LoraAccumulator
from tests.parts import quick

LIAR = 3
EVERYBODY = {"retries": 0}


def lying(change: Callable[[Reply], RecordDict | Error], kind: str = "fit") -> Answerer:
    """Let client 3 lie in every round, or when it introduces itself."""

    def answer(asked: Instruction, node: int, honest: Reply) -> RecordDict | Error:
        if node == LIAR and asked.kind == kind:
            return change(honest)
        return wire.pack_reply(honest)

    return answer


def without(node: int) -> Answerer:
    return lying(lambda honest: Error(0, "boom"))


def metrics(**numbers: float) -> Callable[[Reply], RecordDict]:
    return lambda honest: wire.pack_reply(replace(honest, metrics={**honest.metrics, **numbers}))


def examples(number: int) -> Callable[[Reply], RecordDict]:
    return lambda honest: wire.pack_reply(replace(honest, examples=number))


def record(name: str, content: Any) -> Callable[[Reply], RecordDict]:
    def change(honest: Reply) -> RecordDict:
        made = wire.pack_reply(honest)
        made.pop(name, None)
        made[name] = content
        return made

    return change


LIES: dict[str, tuple[Callable[[Reply], RecordDict | Error], str]] = {
    "a memory that no database holds": (
        metrics(peak_rss_bytes=1e30),
        "peak_rss_bytes is 1e+30, outside of 0",
    ),
    "a time before the start": (metrics(seconds=-1.0), "seconds is -1, outside of 0 to 1e+09"),
    "a loss that no sum holds": (metrics(loss=1e300), "loss is 1e+300, outside"),
    "2^40 texts": (examples(2**40), "number of examples is 1.09951e+12; right is a whole number"),
    "2^62 texts": (examples(2**62), "number of examples is 4.61169e+18"),
    "fewer than no texts": (examples(-1), "number of examples is -1"),
    "more texts than it has": (examples(10**6), "claims 1000000 examples, but introduced itself with 53"),
    "numbers that are lists": (record("m", MetricRecord({"loss": [1.0, 2.0]})), "loss is not one number"),
    "a name of a metric": (record("m", MetricRecord({"\x1b[2J": 1.0})), "a metric is named"),
    "facts that are numbers": (record("f", ConfigRecord({"log": 7})), "fact log is not a text"),
    "another kind of record": (record("m", ConfigRecord({"a": 1})), "another kind of record"),
    "one record more": (record("zzz", ArrayRecord()), "a reply holds no record 'zzz'"),
}


@pytest.fixture(scope="module")
def without_the_liar(tmp_path_factory: pytest.TempPathFactory) -> list[str | None]:
    return conduct("mixed ranks", tmp_path_factory.mktemp("without") / "run", without(LIAR), **EVERYBODY)


@pytest.mark.parametrize("name", quick(LIES, "a memory that no database holds", "one record more"))
def test_a_number_out_of_range_is_rejected_and_the_run_is_as_without_it(
    name: str, without_the_liar: list[str | None], tmp_path: Path
) -> None:
    change, reason = LIES[name]
    found = conduct("mixed ranks", tmp_path / "run", lying(change), **EVERYBODY)
    assert found == without_the_liar
    rows = Run(tmp_path / "run").nodes(node=LIAR)
    assert {row.status for row in rows} == {"rejected"}
    assert all(reason in str(row.reason) for row in rows)


INTRODUCTIONS = {
    99: "there is no client 99 in a run with clients = 16",
    16: "there is no client 16",
    -1: "metric node is -1, outside of 0",
    1e300: "metric node is 1e+300, outside",
    2.5: "the client's number is 2.5; right is a whole number",
    2: "client number 2 is already taken",
}


@pytest.mark.parametrize("number", quick(INTRODUCTIONS, -1, 2))
def test_a_client_has_a_number_of_the_run_or_stays_outside(number: float, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    conduct("mixed ranks", folder, lying(metrics(node=number), "describe"), deadline_s=0.2)
    (refused,) = {e.message for e in Run(folder).events() if e.kind == "refused"}
    assert INTRODUCTIONS[number] in refused
    assert refused.startswith(f"node {number} " if number in (99, 16, 2) else "a node ")
    assert LIAR not in {row.node for row in Run(folder).nodes()}


KEYS = {node + 1: node for node in range(HONEST + LIARS)}
"""Flower id and number of every client that is what it says."""


@pytest.mark.parametrize("claimed", quick([2, 12, 99], 12))
def test_a_number_that_the_key_does_not_prove_is_refused_by_name(claimed: int, tmp_path: Path) -> None:
    """Whoever comes first: the client whose number it is takes part."""
    folder = tmp_path / "run"
    change = metrics(node=claimed)
    conduct("averaged", folder, lying(change, "describe"), proven=lambda: KEYS, deadline_s=0.2)
    (refused,) = [event for event in Run(folder).events() if event.kind == "refused"]
    assert refused.message == (
        f"node 3 was not admitted: its key is that of node 3, and it says that it is client {claimed}; "
        "bundle.toml on the device must say node = 3"
    )
    assert refused.fields["node"] == LIAR
    took_part = {row.node for row in Run(folder).nodes()}
    assert took_part == set(range(HONEST + LIARS)) - {LIAR}


def test_a_key_of_nobody_takes_no_number(tmp_path: Path) -> None:
    known = {flower_id: node for flower_id, node in KEYS.items() if node != LIAR}
    folder = tmp_path / "run"
    conduct("averaged", folder, lying(wire.pack_reply), proven=lambda: known, deadline_s=0.2)
    (refused,) = [event for event in Run(folder).events() if event.kind == "refused"]
    assert refused.message == (
        "a node was not admitted: it says that it is client 3, and its key is none that may join"
    )


def test_a_refused_node_is_told_why_when_it_is_asked_again_which_is_at_once(tmp_path: Path) -> None:
    told: list[object] = []

    def answer(asked: Instruction, node: int, honest: Reply) -> RecordDict | Error:
        if node == LIAR and asked.kind == "describe":
            told.append(asked.arguments.get(wire.REFUSED))
            if len(told) == 1:
                return metrics(node=99)(honest)
        return wire.pack_reply(honest)

    conduct("averaged", tmp_path / "run", answer, deadline_s=60.0)
    assert told == [None, INTRODUCTIONS[99] + ", numbered from 0"]
    assert LIAR in {row.node for row in Run(tmp_path / "run").nodes()}


def test_each_reason_of_a_refusal_is_one_event(tmp_path: Path) -> None:
    claims = iter([99, 98, 98, 98])
    change = lying(lambda honest: metrics(node=next(claims, 98))(honest), "describe")
    conduct("averaged", tmp_path / "run", change, proven=lambda: KEYS, deadline_s=0.2)
    refused = [event for event in Run(tmp_path / "run").events() if event.kind == "refused"]
    assert [event.fields["node"] for event in refused] == [LIAR] * len(refused)
    assert [event.message.partition(" that it is ")[2].partition(";")[0] for event in refused] == [
        "client 99",
        "client 98",
    ]


@pytest.mark.parametrize("kind", quick(["describe", "fit"], "fit"))
def test_no_reason_names_a_class_of_ours(kind: str, tmp_path: Path) -> None:
    """What Flower makes of an exception in an older device's app."""
    said = "<class 'client.resident.WorkerError'>:<'the worker died 3 times over this request'>"
    server = {"deadline_s": 0.5} if kind == "describe" else EVERYBODY
    conduct("averaged", tmp_path / "run", lying(lambda h: Error(2, said), kind), **server)
    run = Run(tmp_path / "run")
    reasons = [e.message for e in run.events() if e.kind == "refused"]
    reasons += [str(row.reason) for row in run.nodes(node=LIAR) if row.status == "failed"]
    assert reasons
    assert all(reason.endswith(": the worker died 3 times over this request") for reason in reasons)


@pytest.mark.parametrize("spoken", [2, 0, "x" * 999])
def test_another_format_is_refused_by_which_side_to_upgrade(spoken: int | str) -> None:
    """A message of another version: seen by a device, then by a server; what is no number is no newer one."""
    older = ("device", "server") if spoken == 2 else ("server", "device")
    asked = wire.pack_instruction(Instruction("run", "fit"))
    told = wire.pack_reply(Reply(1, 0))
    for content in (asked, told):
        content["h"]["v"] = spoken  # type: ignore[call-overload]
    shown = str(spoken)[:20]
    with pytest.raises(WireError) as caught:
        wire.unpack_instruction(asked)
    assert str(caught.value) == (
        f"the server speaks format {shown} and this device format 1: upgrade fedllm on the {older[0]}"
    )
    with pytest.raises(WireError) as caught:
        wire.unpack_reply(told)
    assert str(caught.value) == (
        f"the device speaks format {shown} and this server format 1: upgrade fedllm on the {older[1]}"
    )


@pytest.mark.parametrize(
    "method", ["strategies.lora.method.Lora.fold", "fedllm.protocol.uplink.Uplink.receive"]
)
def test_what_nobody_foresaw_rejects_the_reply_alone(method: str, tmp_path: Path) -> None:
    """A fault of ours that one client's reply sets off."""
    with (
        mock.patch(method, side_effect=IndexError("tuple index out of range")),
        pytest.raises(RunFailed, match="missed its quorum"),
    ):
        conduct("averaged", tmp_path / "run", lambda asked, node, honest: wire.pack_reply(honest), retries=0)
    rows = Run(tmp_path / "run").nodes()
    assert {row.reason for row in rows if row.status == "rejected"} == {
        "the server failed over it, which is no fault of the client "
        "(IndexError: tuple index out of range); see its log"
    }


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(MemoryError(), marks=pytest.mark.slow),
        RuntimeError("can't allocate memory"),
        pytest.param(KeyError("w"), marks=pytest.mark.slow),
    ],
)
def test_a_fault_of_the_servers_is_told_as_its_own_and_the_run_goes_on(
    error: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Over client 3 the server fails in a fold; all others count as if it had not been there."""
    plain = Lora.fold

    def fold(self: Lora, acc: LoraAccumulator, kind: str, reply: strategies.base.Reply) -> LoraAccumulator:
        if reply.node == LIAR:
            raise error
        return plain(self, acc, kind, reply)

    with mock.patch.object(Lora, "fold", fold):
        found = conduct("averaged", tmp_path / "run", lying(wire.pack_reply), **EVERYBODY)
    assert found == conduct("averaged", tmp_path / "other", without(LIAR), **EVERYBODY)
    rows = Run(tmp_path / "run").nodes(node=LIAR)
    assert {row.status for row in rows} == {"rejected"}
    (reason,) = {row.reason for row in rows}
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    assert reason == f"the server failed over it, which is no fault of the client ({what}); see its log"
    (told, *_) = [record for record in caplog.records if record.exc_info]
    assert told.exc_info is not None
    assert told.exc_info[1] is error


def test_a_fault_over_an_introduction_is_the_servers_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Roster.admit

    def admit(self: Roster, member: Member, online: Iterable[int]) -> str:
        if member.node == LIAR:
            raise MemoryError
        return plain(self, member, online)

    with mock.patch.object(Roster, "admit", admit):
        conduct("averaged", tmp_path / "run", lying(wire.pack_reply), deadline_s=0.5)
    (refused,) = {event.message for event in Run(tmp_path / "run").events() if event.kind == "refused"}
    assert refused.endswith(
        "the server failed over it, which is no fault of the client (MemoryError); see its log"
    )
    assert any(record.exc_info for record in caplog.records)


def test_words_of_a_client_reach_no_terminal_as_commands(tmp_path: Path) -> None:
    conduct("averaged", tmp_path / "run", lying(lambda h: Error(0, "\x1b[2J" + "x" * 9000)), **EVERYBODY)
    (reason, *_) = [str(row.reason) for row in Run(tmp_path / "run").nodes(node=LIAR)]
    assert "\x1b" not in reason
    assert len(reason) < 2100


def test_what_flower_cannot_read_is_no_record() -> None:
    """A value that says nothing: Flower looks for the type of None."""
    hollow = RecordDictProto()
    item = hollow.items.add(key="h")
    item.config_record.items.add(key="at")
    with pytest.raises(WireError, match="not a serialized record: AttributeError"):
        wire.decode(hollow.SerializeToString())


def test_bounds_hold_at_both_ends() -> None:
    assert claims.metrics({"node": 2.0**31 - 1, "seconds": 0.0, "loss": -1e100}) != {}
    assert claims.metrics({"loss": float("nan"), "other": float("inf")}) == {}
    for name, value in (("node", 2.0**31), ("seconds", 1.1e9), ("loss", 1.1e100), ("forward", -1e-9)):
        with pytest.raises(WireError, match=f"metric {name} is"):
            claims.metrics({name: value})


@pytest.mark.parametrize("version", ["0.1.0", "1.2.0rc1+local.7", "0"])
def test_a_version_is_read_and_an_older_node_has_none(version: str) -> None:
    assert claims.facts({"fedllm": version, "python": "3.11"}) == {"fedllm": version, "python": "3.11"}
    assert claims.facts({"python": "3.11"}) == {"python": "3.11"}


@pytest.mark.parametrize("version", ["", "latest", "1" * 41, "0.1 <b>", "0.1\n"])
def test_what_is_no_version_is_refused(version: str) -> None:
    with pytest.raises(WireError, match=r"fact fedllm is .*, which is no version"):
        claims.facts({"fedllm": version})


_FUZZED = ["averaged", "mixed ranks", "estimates", "start", "updates and slopes"]


@pytest.mark.parametrize("name", quick(_FUZZED, "averaged"))
def test_hostile_replies_neither_end_nor_bend_a_run(name: str) -> None:
    found = fuzz(100, 50, configs=[name])
    assert isinstance(found["sent"], dict)
    assert sum(found["sent"].values()) >= 150
    assert found["became"]["rejected"] > 40  # type: ignore[index]


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_hostile_replies() -> None:
    found = fuzz(100_000, 10_000, configs=tuple(CONFIGS))
    assert found["slowest_s"] < 5.0  # type: ignore[operator]
