"""Whole runs: the masked sum is the plain one, bit by bit, whoever drops out at which step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from flwr.app import Message

from fedllm.config import RunConfig
from fedllm.errors import RunFailed
from fedllm.protocol import wire
from fedllm.protocol.wire import Instruction
from fedllm.runs.reader import Run
from fedllm.runs.totals import node_totals
from tests.parts import quick
from tests.rounds.federation import FaultyGrid, configuration, run

SECURE = {"secure_aggregation": True, "threshold": 0.5}
EVERYBODY = {"quorum": 3}


class Asking(FaultyGrid):
    """Remembers what each client was asked last."""

    asked: ClassVar[dict[int, Instruction]] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Note each question on its way."""
        sent = list(messages)
        for message in sent:
            self.asked[message.metadata.dst_node_id] = wire.unpack_instruction(message.content)
        return super().push_messages(sent)


def losing(nodes: Collection[int], step: str) -> Callable[[Message], Message | None]:
    """Lose what some clients answer in one step of each round."""

    def fault(reply: Message) -> Message | None:
        kind = Asking.asked[reply.metadata.src_node_id].kind
        return None if kind == step and reply.metadata.src_node_id - 1 in nodes else reply

    return fault


def config_of(encoder: Path, texts: Path, **sections: Any) -> RunConfig:
    return configuration(encoder, texts, **{"rounds": 2, "server": EVERYBODY, **sections})


@pytest.fixture(scope="module")
def in_the_clear(
    tiny_encoder: Path, tiny_texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """Digests of plain runs in which some clients' answers are lost; each conducted once."""
    found: dict[tuple[int, ...], str] = {}

    def digest(*lost: int) -> str:
        if lost not in found:
            folder = tmp_path_factory.mktemp("plain") / "run"
            config = config_of(tiny_encoder, tiny_texts)
            found[lost] = run(config, folder, losing(lost, "fit"), Asking)["state_sha256"]
        return found[lost]

    return digest


@pytest.mark.parametrize(
    ("step", "lost"),
    quick([("", ()), ("keys", (1,)), ("shares", (2,)), ("fit", (0, 4)), ("unmask", (5, 3))], ("fit", (0, 4))),
)
def test_the_same_bits_as_in_the_clear(
    step: str, lost: tuple[int, ...], in_the_clear: Callable[..., str],
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path,
) -> None:  # fmt: skip
    config = config_of(tiny_encoder, tiny_texts, privacy=SECURE)
    secure = run(config, tmp_path / "run", losing(lost, step), Asking)
    assert secure["state_sha256"] == in_the_clear(*() if step == "unmask" else lost)
    assert secure["failures"] == len(lost) * 2


SECTIONS: dict[str, dict[str, Any]] = {
    "fixed": {"codec": {"up": "fixed(bits=6, fraction=10, stochastic=true)"}},
    "clip": {"privacy": {"clip": 0.05}},
    "alike": {
        "codec": {"up": "fixed(bits=12, fraction=12)"},
        "server": {**EVERYBODY, "max_examples": 1},
    },
    "neighbours": {"privacy": {"neighbours": 4}},
    "scaffold": {"method": "scaffold", "training": {"optimizer": "sgd", "local_steps": 2, "batch_size": 8}},
    "mezo": {"method": "mezo", "options": {"candidates": 16}},
    "fwdllm": {"method": "fwdllm", "options": {"directions": 6, "shared": True}},
    "fwdllm chosen": {"method": "fwdllm", "options": {"directions": 6, "shared": True, "candidates": 3}},
    "fwdllm dense": {"method": "fwdllm", "options": {"directions": 6, "upload": "dense"}},
}


@pytest.mark.parametrize("name", quick(SECTIONS, "fixed", "neighbours", "fwdllm"))
def test_the_same_bits_with(name: str, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path) -> None:
    sections = SECTIONS[name]
    given = {key: value for key, value in sections.get("privacy", {}).items() if key == "clip"}
    found = [
        run(config_of(tiny_encoder, tiny_texts, **{**sections, "privacy": privacy}), tmp_path / kind)
        for kind, privacy in {"plain": given, "secure": {**SECURE, **sections.get("privacy", {})}}.items()
    ]
    assert found[0]["state_sha256"] == found[1]["state_sha256"]
    assert not found[1]["failures"]


def test_nothing_of_a_single_client_is_told(tiny_encoder: Path, tiny_texts: Path, tmp_path: Path) -> None:
    run(config_of(tiny_encoder, tiny_texts, privacy=SECURE), tmp_path / "run")
    rows = [row for row in Run(tmp_path / "run").nodes() if row.round]
    assert {row.exchange for row in rows} == {"keys", "shares", "fit", "unmask"}
    for row in rows:
        assert row.loss is None
        assert row.update_norm is None
        assert not {"loss", "update_norm", "error_up"} & row.metrics.keys()
    assert Run(tmp_path / "run").rounds()[1].participants == 6
    assert [total.accepted for total in node_totals(tmp_path / "run")] == [2] * 6


@pytest.mark.slow
def test_simulated_devices_pay_for_its_exchanges(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    taken, digests = [], set()
    for name, privacy in {"plain": {}, "secure": SECURE}.items():
        config = config_of(tiny_encoder, tiny_texts, privacy=privacy, simulation={"profile": "hospital"})
        summary = run(config, tmp_path / name)
        taken.append(summary["seconds"]["simulated"])
        digests.add(summary["state_sha256"])
    assert len(digests) == 1
    assert taken[0] < taken[1]


@pytest.mark.parametrize(
    ("step", "payload", "reason"),
    quick(
        [
            ("keys", bytes(64), "a peer's key is none that can be agreed with"),
            ("keys", b"short", "two public keys are 64 bytes"),
            ("shares", b"short", "payload ends inside its commitment"),
            ("fit", b"short", "masked values are"),
            ("unmask", b"short", "6 shares are 198 bytes, got 5"),
        ],
        ("fit", b"short", "masked values are"),
    ),
)
def test_a_client_that_sends_something_else_is_left_out(
    step: str, payload: bytes, reason: str, in_the_clear: Callable[..., str],
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path,
) -> None:  # fmt: skip
    def lying(reply: Message) -> Message:
        asked = Asking.asked[reply.metadata.src_node_id]
        if reply.metadata.src_node_id == 2 and asked.kind == step:
            told = replace(wire.unpack_reply(reply.content), payload=payload)
            reply.content = wire.pack_reply(told)
        return reply

    config = config_of(tiny_encoder, tiny_texts, privacy=SECURE)
    summary = run(config, tmp_path / "run", lying, Asking)
    assert summary["state_sha256"] == in_the_clear(*() if step == "unmask" else (1,))
    assert summary["rejected"] == 2
    rejected = [row for row in Run(tmp_path / "run").nodes() if row.status == "rejected"]
    assert all(row.node == 1 and row.exchange == step and reason in (row.reason or "") for row in rejected)


def test_below_the_threshold_the_round_fails_closed(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    server = {"quorum": 3, "retries": 0}
    config = config_of(tiny_encoder, tiny_texts, privacy={**SECURE, "threshold": 0.667}, server=server)
    with pytest.raises(
        RunFailed, match=r"4 clients answered in step 'fit' .* takes 5 .*: the sum stays hidden"
    ):
        run(config, tmp_path / "run", losing((1, 2), "fit"), Asking)
    assert not Run(tmp_path / "run").rounds()[1:]


@pytest.mark.parametrize(
    "bend",
    [
        lambda asked: replace(asked, progress=0.9),
        lambda asked: replace(asked, session=asked.session[:16] + b"\x01\0\0\0" + asked.session[20:]),
    ],
    ids=["progress", "texts that count"],
)
def test_a_client_that_is_told_something_else_is_left_out(
    bend: Callable[[Instruction], Instruction], in_the_clear: Callable[..., str],
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """On its way to client 1 an instruction is altered: its masks would never come off the sum."""

    class Bending(Asking):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            sent = list(messages)
            for message in sent:
                asked = wire.unpack_instruction(message.content)
                if asked.kind == "fit" and message.metadata.dst_node_id == 2:
                    message.content = wire.pack_instruction(bend(asked))
            return super().push_messages(sent)

    config = config_of(tiny_encoder, tiny_texts, privacy=SECURE)
    assert run(config, tmp_path / "run", grid_of=Bending)["state_sha256"] == in_the_clear(1)
    rejected = [row for row in Run(tmp_path / "run").nodes() if row.status == "rejected"]
    assert len(rejected) == 2
    assert all(row.node == 1 and "told something else" in (row.reason or "") for row in rejected)
