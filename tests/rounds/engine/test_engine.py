"""A run from its first message to its result, and what the engine does when replies go wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, Error, Message, RecordDict
from flwr.common.serde import recorddict_to_proto
from safetensors import safe_open

from client.node import CONFIG_KEY, FOLDER_KEY
from fedllm.config import CodecConfig, RunConfig
from fedllm.errors import RunFailed
from fedllm.protocol import wire
from fedllm.runs import checkpoint
from fedllm.runs.reader import Run
from server.rounds.conduct import conduct
from server.rounds.round_log import RoundLog
from simulations.engines.loopback import LoopbackGrid, loopback
from simulations.results.report import render
from strategies.session import Session
from tests.parts import quick
from tests.rounds.federation import Fault, configuration, run


@pytest.fixture(scope="module")
def config(tiny_encoder: Path, tiny_texts: Path) -> RunConfig:
    return configuration(tiny_encoder, tiny_texts)


@pytest.fixture(scope="module")
def undisturbed(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(config, folder)
    return folder


def sha(folder: Path) -> str:
    return str(json.loads((folder / "summary.json").read_text())["state_sha256"])


def test_a_run_ends_with_numbers_and_an_adapter(undisturbed: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["metrics"]["accuracy"] > 0.6
    assert summary["passes"] == {"forward": 30.0, "backward": 30.0}
    assert summary["failures"] == summary["rejected"] == 0
    assert (undisturbed / "adapter" / "adapter_model.safetensors").is_file()
    rounds = [json.loads(line) for line in (undisturbed / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in rounds] == [0, 1, 2, 3, 4, 5]
    assert [line["participants"] for line in rounds] == [0, 3, 3, 3, 3, 3]
    assert 0.0 <= rounds[0]["accuracy"] < rounds[-1]["accuracy"] == summary["metrics"]["accuracy"]
    assert summary["metrics"]["warm_accuracy"] is None


def test_every_text_is_held_by_one_client_or_held_out(
    config: RunConfig, undisturbed: Path, tiny_texts: Path
) -> None:
    written = [json.loads(line)["text"] for line in tiny_texts.read_text().splitlines()]
    told = Run(undisturbed).partition
    held_out = set(told["held_out"])
    training = [number for number in range(len(written)) if number not in held_out]
    held = [training[index] for client in told["clients"] for index in client["indices"]]
    assert sorted([*held, *held_out]) == list(range(len(written)))
    # They are what the run itself tested and trained on.
    train, test = Session(config).split
    assert [written[number] for number in sorted(held_out)] == test.texts
    assert [written[number] for number in sorted(held)] == train.texts


def test_going_back_to_a_checkpoint_forgets_what_came_later(
    config: RunConfig, undisturbed: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    before, stored = Run(folder).rounds(), Run(folder)
    stored.go_on_from(4)
    assert stored.rounds() == before
    assert stored.status == "finished"
    assert run(config, folder)["state_sha256"] == sha(undisturbed)
    after = stored.rounds()
    assert after[:5] == before[:5]
    assert after[5].finished_at > before[5].finished_at
    assert len(after) == len(before)
    assert stored.goes_on_from is None
    scores = [record.metrics["accuracy"] for record in after]
    best = {scores[: reached + 1].index(max(scores[: reached + 1])) for reached in (4, 5)}
    assert checkpoint.numbers(folder / "checkpoints") == sorted({4, 5} | best)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits(config: RunConfig, undisturbed: Path, tmp_path: Path) -> None:
    run(config, tmp_path / "again")
    assert sha(tmp_path / "again") == sha(undisturbed)


@pytest.mark.slow
def test_another_seed_gives_others(config: RunConfig, undisturbed: Path, tmp_path: Path) -> None:
    run(config.model_copy(update={"seed": 1}), tmp_path / "other")
    assert sha(tmp_path / "other") != sha(undisturbed)


class ReversingGrid(LoopbackGrid):
    """Hands all waiting replies over at once, newest first."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies: list[Message] = []
        while batch := list(super().pull_messages(message_ids)):
            replies += batch
        return replies[::-1]


@pytest.mark.slow
def test_the_order_of_replies_does_not_matter(config: RunConfig, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reversed"
    run_config = {CONFIG_KEY: config.to_json(), FOLDER_KEY: str(folder)}
    with loopback(config.clients, run_config):
        conduct(ReversingGrid(config.clients, run_config, None), config, folder)
    assert sha(folder) == sha(undisturbed)


def test_the_ledger_holds_what_protobuf_serializes(config: RunConfig, tmp_path: Path) -> None:
    crossed = 0

    def count(message: Message) -> Message:
        nonlocal crossed
        crossed += len(recorddict_to_proto(message.content).SerializeToString())
        return message

    summary = run(config, tmp_path / "run", count)
    assert summary["bytes"]["up"] == crossed
    header = summary["bytes"]["up"] - summary["bytes"]["dense_up"]
    assert header == 5 * 3 * 9  # without a codec a payload is the tensors as they are, behind 9 bytes
    per_round = [row["bytes"] for row in Run(tmp_path / "run").traffic() if row["direction"] == "up"]
    assert sum(per_round) == crossed


@pytest.mark.slow
@pytest.mark.parametrize("rule", quick(["fedit", "stack", "residual"], "residual"))
def test_an_upload_is_compared_with_its_own_tensors(rule: str, config: RunConfig, tmp_path: Path) -> None:
    ruled = config.model_copy(update={"options": {**config.options, "rule": rule}})
    told = run(ruled, tmp_path / "run")["bytes"]
    # Without a codec nothing is saved: 9 bytes go before the tensors of five rounds and three clients.
    assert told["up"] - told["dense_up"] == 5 * 3 * 9


@pytest.mark.slow
@pytest.mark.parametrize("codec", quick(["none", "quantize(bits=8)"], "quantize(bits=8)"))
def test_references_count_no_download_that_nobody_sends(
    codec: str, config: RunConfig, tiny_encoder: Path, tmp_path: Path
) -> None:
    compressed = config.model_copy(update={"codec": CodecConfig(up=codec, down=codec)})
    told = run(compressed, tmp_path / "run")["bytes"]
    # Five rounds of three clients: everybody uploads in each, and downloads in all but the first.
    ups, downs = 5 * 3, 4 * 3
    with safe_open(tiny_encoder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "pooler" not in name]  # noqa: SIM118
        base = sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    head = 32 * 3 + 3
    assert told["reference_total"] == 4 * (base + head) * (ups + downs)
    # LoRA of rank 2 on query and value of two layers, and the head.
    trained = 2 * 2 * (2 * 32 + 2 * 32) + head
    dense = {
        row["direction"]: row["dense"]
        for row in Run(tmp_path / "run").traffic(("direction", "exchange", "record"))
        if (row["exchange"], row["record"]) == ("fit", "payload")
    }
    framing = 40  # bytes at most that the record around a payload takes
    assert 0 < dense["up"] - 4 * trained * ups < framing * ups
    assert 0 < dense["down"] - 4 * trained * downs < framing * ups


def test_what_the_codecs_did_is_recorded_by_direction(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    codec = {"up": "quantize(bits=4)", "down": "quantize(bits=8)"}
    config = configuration(tiny_encoder, tiny_texts, codec=codec, rounds=2)
    run(config, tmp_path / "run")
    values = sum(tensor.numel() for tensor in Session(config).initial.values())
    for record in Run(tmp_path / "run").rounds()[1:]:
        up, down = record.details["codec"]["up"], record.details["codec"]["down"]
        # Three replies; half a byte a value up, one byte down; blocks of 4096 values share a scale.
        assert up == {"header": 3 * 10, "scales": 3 * 4, "codes": 3 * -(-values // 2)}
        assert down == {"header": 10, "scales": 4, "codes": values}
        # 15 and 255 levels: a step is 1 / 7 and 1 / 127 of the largest value, an error at most half of it.
        assert 0.001 < record.details["error_down"] < 0.05 < record.details["error_up"] < 1.0
    page = render(Run(tmp_path / "run"), {})
    assert "What the codecs made of it" in page
    assert f"{2 * values:,}" in page


def test_an_interrupted_run_continues_with_the_same_bits(
    config: RunConfig, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    seen = 0

    def interrupt(message: Message) -> Message:
        nonlocal seen
        seen += message.metadata.group_id != "describe"
        if seen == 8:  # the second reply of round 3 has been sent, its round is not committed
            raise KeyboardInterrupt
        return message

    with pytest.raises(KeyboardInterrupt):
        run(config, folder, interrupt)
    assert Run(folder).status == "stopped"
    assert Run(folder).rounds()[-1].round == 2
    summary = run(config, folder)
    assert summary["status"] == "finished"
    assert summary["state_sha256"] == sha(undisturbed)
    assert [r.round for r in Run(folder).rounds()] == [0, 1, 2, 3, 4, 5]


def altered(message: Message, **changes: Any) -> Message:
    reply = dataclasses.replace(wire.unpack_reply(message.content), **changes)
    return Message(wire.pack_reply(reply), reply_to=asked(message))


def asked(reply: Message) -> Message:
    """Stand in for the message that was answered."""
    metadata = copy.copy(reply.metadata)
    names = metadata.__dict__
    names["_src_node_id"], names["_dst_node_id"] = names["_dst_node_id"], names["_src_node_id"]
    names["_message_id"] = names["_reply_to_message_id"]
    return Message(metadata=metadata, content=RecordDict())


def nan_payload(message: Message) -> Message:
    """A payload whose checksum is right and whose first value is not a number."""
    payload = bytearray(wire.unpack_reply(message.content).payload)
    payload[9:13] = struct.pack("<f", math.nan)
    payload[5:9] = struct.pack("<I", zlib.crc32(payload[9:], zlib.crc32(payload[:5])))
    return altered(message, payload=bytes(payload))


def claim(message: Message) -> Message:
    """A payload that says it is 16 GB."""
    content = altered(message, payload=b"few").content
    (part,) = [part for part in content.array_records.values() for _ in part]
    (name,) = part
    part[name] = Array(dtype="float64", shape=(2_000_000_000,), stype="raw", data=b"few")
    return Message(content, reply_to=asked(message))


HOSTILE: dict[str, tuple[Fault, str, str]] = {
    "crash": (lambda m: Message(Error(0, "boom"), reply_to=asked(m)), "failed", "boom"),
    "says so": (lambda m: altered(m, error="out of memory"), "failed", "out of memory"),
    "nan": (nan_payload, "rejected", "NaN"),
    "short": (lambda m: altered(m, payload=b"1234"), "rejected", "bytes"),
    "claim": (claim, "rejected", "claims to be float64 [2000000000] and has 3 bytes"),
    "no record": (lambda m: Message(RecordDict(), reply_to=asked(m)), "rejected", "header"),
    "greedy": (lambda m: altered(m, examples=10**9), "rejected", "claims"),
    "wrong round": (lambda m: altered(m, round=99), "rejected", "answers exchange"),
}


@pytest.mark.parametrize("kind", quick(HOSTILE, "nan", "claim", "says so"))
def test_a_bad_reply_is_recorded_and_the_run_goes_on(
    kind: str, config: RunConfig, undisturbed: Path, tmp_path: Path
) -> None:
    fault, status, reason = HOSTILE[kind]
    first = config.model_copy(update={"rounds": 1})

    def spoil_one(message: Message) -> Message:
        group, node = message.metadata.group_id, message.metadata.src_node_id
        return fault(message) if group == "1" and node == victim else message  # type: ignore[return-value]

    victim = min(Run(undisturbed).rounds()[1].details["accepted"]) + 1
    summary = run(first, tmp_path / "run", spoil_one)
    assert summary["status"] == "finished"
    (row,) = [row for row in Run(tmp_path / "run").nodes(round=1) if row.status != "accepted"]
    assert (row.status, row.node) == (status, victim - 1)
    assert reason in str(row.reason)
    assert summary["failures"] + summary["rejected"] == 1


def test_a_round_without_quorum_is_tried_again_and_then_fails(
    config: RunConfig, undisturbed: Path, tmp_path: Path
) -> None:
    server = config.server.model_copy(update={"deadline_s": 1.5, "retries": 1})
    hurried = config.model_copy(update={"server": server})

    def silent(message: Message) -> Message | None:
        return message if message.metadata.group_id in ("describe", "1") else None

    with pytest.raises(RunFailed, match=r"round 2 missed its quorum of 2 in 2 attempts: no reply before"):
        run(hurried, tmp_path / "run", silent)
    failed = Run(tmp_path / "run")
    assert failed.status == "failed"
    assert failed.rounds()[-1].round == 1
    # What became of those who were asked is kept, and so are the bytes that crossed; resuming forgets both.
    lost = sorted((row.attempt, row.status, row.reason) for row in failed.nodes(round=2))
    assert lost == [(attempt, "late", "no reply before the deadline") for attempt in (0, 1) for _ in range(3)]
    (asked,) = [row for row in failed.traffic(("round", "direction"), round=2)]
    assert (asked["direction"], asked["bytes"] > 0) == ("down", True)
    resumed = run(hurried, tmp_path / "run")
    assert resumed["state_sha256"] == sha(undisturbed)
    fit = [
        [row for row in Run(folder).traffic(("round", "direction", "exchange")) if row["exchange"] == "fit"]
        for folder in (tmp_path / "run", undisturbed)
    ]
    assert fit[0] == fit[1]
    assert resumed["failures"] == 0


def test_a_simulated_client_that_waits_its_turn_is_not_slow(undisturbed: Path) -> None:
    rows = Run(undisturbed).nodes()
    assert {row.transfer_seconds for row in rows} == {0.0}
    assert min(row.compute_seconds for row in rows) > 0.0


@pytest.mark.parametrize(("networked", "transfer"), [(True, 3.0), (False, 0.0)])
def test_what_a_reply_took_beyond_computing_is_transfer_where_there_is_a_network(
    networked: bool, transfer: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("server.rounds.round_log.time.monotonic", lambda: clock[0])
    log = RoundLog(1, networked=networked)
    log.crossed("down", 0, "fit", RecordDict(), payload=0, dense=None)
    clock[0] = 105.0
    log.outcome(0, "fit", "accepted", metrics={"seconds": 2.0})
    (row,) = log.nodes
    assert (row.compute_seconds, row.transfer_seconds) == (2.0, transfer)


@pytest.mark.slow
def test_a_round_that_succeeds_at_the_second_attempt_changes_no_bit(
    config: RunConfig, undisturbed: Path, tmp_path: Path
) -> None:
    hurried = config.server.model_copy(update={"deadline_s": 2.0})
    lost = 0

    def lose_six(message: Message) -> Message | None:
        nonlocal lost
        if message.metadata.group_id == "3" and lost < 3:
            lost += 1
            return None
        return message

    summary = run(config.model_copy(update={"server": hurried}), tmp_path / "run", lose_six)
    assert summary["state_sha256"] == sha(undisturbed)
    assert summary["failures"] == 3


@pytest.mark.slow
def test_lost_introductions_are_asked_for_again(config: RunConfig, undisturbed: Path, tmp_path: Path) -> None:
    """Five of six get lost, which leaves less than the quorum of two."""
    met: list[int] = []

    def lose_five(message: Message) -> Message | None:
        if message.metadata.group_id == "describe":
            met.append(message.metadata.src_node_id)
            return message if len(met) > 5 else None
        return message

    hurried = config.server.model_copy(update={"deadline_s": 6.0})
    summary = run(config.model_copy(update={"server": hurried}), tmp_path / "run", lose_five)
    assert summary["state_sha256"] == sha(undisturbed)
    assert sorted(met) == sorted([*met[:5], *range(1, 7)])


@pytest.mark.slow
def test_over_selected_clients_are_not_waited_for(config: RunConfig, tmp_path: Path) -> None:
    generous = config.server.model_copy(update={"over_select": 2})
    summary = run(config.model_copy(update={"server": generous, "rounds": 2}), tmp_path / "run")
    rows = Run(tmp_path / "run").nodes(round=2)
    assert sorted(row.status for row in rows) == ["accepted"] * 3 + ["unused"] * 2
    assert summary["failures"] == 0


@pytest.mark.slow
def test_the_operator_stops_and_quarantines_between_rounds(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def ask_to_stop(message: Message) -> Message:
        if message.metadata.group_id == "2":
            Run(folder).post_command("stop", by="operator")
        return message

    assert run(config, folder, ask_to_stop)["status"] == "stopped"
    assert Run(folder).rounds()[-1].round == 2
    Run(folder).post_command("quarantine", by="operator", node=4)
    assert run(config, folder)["status"] == "finished"
    assert all(4 not in r.details["accepted"] for r in Run(folder).rounds(after=2))


def test_clients_evaluate_on_their_own_held_out_texts(config: RunConfig, tmp_path: Path) -> None:
    data = config.data.model_copy(update={"client_test_fraction": 0.25})
    evaluation = config.evaluation.model_copy(update={"clients": True})
    run(config.model_copy(update={"data": data, "evaluation": evaluation, "rounds": 2}), tmp_path / "run")
    assert 0.0 <= Run(tmp_path / "run").rounds()[-1].details["clients"]["accuracy"] <= 1.0
