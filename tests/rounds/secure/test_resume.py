"""A server that is killed between two steps and comes back: the same bits, and no mask serves twice."""

from __future__ import annotations

import signal
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import ClassVar

import pytest
from flwr.app import Context, Message

from client import secure
from fedllm.errors import RunFailed
from fedllm.protocol import wire
from fedllm.runs.reader import Run
from server.federation.provision import authority, provision, signer
from server.rounds.conduct import Transport
from strategies.session import forget_sessions
from tests.parts import quick
from tests.rounds.federation import DeviceGrid, Killed, run
from tests.rounds.killed import conducted
from tests.rounds.secure.test_runs import SECURE, Asking, config_of

LAST = 2
"""The round in which the server is killed."""


class Devices(Asking, DeviceGrid):
    """Devices with keys: each has a state folder and a bundle of its own."""

    bundles: ClassVar[list[Path]] = []

    def context(self, node: int) -> Context:
        """Let a device know where its keys are."""
        context = super().context(node)
        context.node_config["bundle"] = str(self.bundles[node])
        return context

    @classmethod
    def transport(cls) -> Transport:
        """Return what the server of a deployment knows: whose each reply is."""
        folder = cls.bundles[0].parents[1]
        proven = {1 + node: node for node in range(len(cls.bundles))}
        return Transport(
            lambda: (None, None), lambda: proven, lambda most: None, signer(folder), authority(folder)
        )


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return provision(tmp_path_factory.mktemp("federation") / "f", "localhost", 6)


def killing(step: str, seen: list[bytes], *, after: int = 3) -> Callable[[Message], Message]:
    """Kill the server at some reply of a step in the last round; notes what client 0 sends masked."""
    left = [after]

    def fault(reply: Message) -> Message:
        node = reply.metadata.src_node_id
        asked = Asking.asked[node]
        if asked.kind == "fit" and node == 1 and asked.round == LAST:
            seen.append(wire.unpack_reply(reply.content).payload)
        if asked.kind == step and asked.round == LAST:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
        return reply

    return fault


@pytest.mark.parametrize(
    ("step", "devices"),
    quick(
        [*product(["keys", "shares", "fit", "unmask"], [False, True]), ("agree", True)],
        ("agree", True),
    ),
)
def test_the_same_bits_after_a_kill(
    step: str, devices: bool, bundles: list[Path], tiny_encoder: Path, tiny_texts: Path, tmp_path: Path,
) -> None:  # fmt: skip
    Devices.bundles = bundles
    grid, transport = (Devices, Devices.transport()) if devices else (Asking, None)
    plain = run(config_of(tiny_encoder, tiny_texts), tmp_path / "plain" / "run")
    config, folder = config_of(tiny_encoder, tiny_texts, privacy=SECURE), tmp_path / "run"
    seen: list[bytes] = []
    with pytest.raises(Killed):
        run(config, folder, killing(step, seen), grid, transport)
    forget_sessions()
    secure._read_identity.cache_clear()
    again = run(config, folder, killing("", seen), grid, transport)
    assert again["state_sha256"] == plain["state_sha256"]
    assert len(Run(folder).rounds()) == 3
    if step in (
        "fit",
        "agree",
        "unmask",
    ):  # the same update went out twice, under other masks
        assert len(seen) == 2
        assert seen[0] != seen[1]


def test_a_device_asked_in_the_clear_answers_nothing(
    bundles: list[Path], tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    Devices.bundles = bundles
    answers = []

    class Bare(Devices):
        """Leaves the session out of what it asks for."""

        def push_messages(self, messages):  # type: ignore[no-untyped-def]
            sent = list(messages)
            for message in sent:
                if wire.unpack_instruction(message.content).kind == "fit":
                    del message.content["h"]["session"]
            return super().push_messages(sent)

    def note(reply: Message) -> Message:
        answers.append(wire.failure_of(reply.content))
        return reply

    config = config_of(tiny_encoder, tiny_texts, privacy=SECURE, server={"quorum": 3, "retries": 0})
    with pytest.raises(RunFailed, match="0 clients answered in step 'fit'"):
        run(config, tmp_path / "run", note, Bare, Devices.transport())
    assert sum("outside of a session of secure aggregation" in answer for answer in answers) == 6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_same_bits_after_a_kill_9_at_each_step(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    plain = run(config_of(tiny_encoder, tiny_texts, rounds=4), tmp_path / "plain")
    config = config_of(tiny_encoder, tiny_texts, privacy=SECURE, rounds=4)
    folder = tmp_path / "run"
    for reply in (3, 9, 15, 21, 34):  # of each round's 24: keys, shares, fit, unmask; and of the one after
        assert conducted(config, folder, f"reply:{reply}") == -signal.SIGKILL
    assert conducted(config, folder) == 0
    assert Run(folder).summary["state_sha256"] == plain["state_sha256"]
