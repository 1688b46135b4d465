"""A client on its own: what it scales, what it checks before it works, what it keeps of earlier rounds."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import torch
from flwr.app import Context, RecordDict

from client.node import NodeContext
from client.worker import answer
from fedllm.codecs import parse
from fedllm.codecs.base import CodecContext
from fedllm.config import RunConfig
from fedllm.protocol import wire
from fedllm.protocol.wire import DENSE, STALE, Instruction, Reply
from fedllm.runs import checkpoint
from fedllm.tensors import Tensors, digest, pack, spec_of
from strategies.session import open_session
from tests.rounds.federation import configuration, run


@pytest.fixture(scope="module")
def config(tiny_encoder: Path, tiny_texts: Path) -> RunConfig:
    return configuration(tiny_encoder, tiny_texts)


@pytest.fixture(scope="module")
def initial(config: RunConfig) -> Tensors:
    return open_session(config.to_json()).initial


def told(config: RunConfig, folder: Path, **instruction: object) -> Reply:
    """Let client 0 of a run of its own answer round 1."""
    asked = Instruction(**{"run": "alone", "kind": "fit", "round": 1, **instruction})  # type: ignore[arg-type]
    place = NodeContext(0, "", str(folder / "clients" / "0"), str(folder / "clients"), keep_replies=False)
    return wire.unpack_reply(answer(wire.pack_instruction(asked), config.to_json(), place))


def update_of(reply: Reply, initial: Tensors) -> torch.Tensor:
    assert reply.error == ""
    context = CodecContext(0, ("up", 1, 0, 0), 0.0)
    decoded, _ = parse("none").decode(reply.payload, spec_of(initial), {}, context)
    return torch.cat([decoded[name].double().flatten() for name in sorted(decoded)])


def test_clipping_shortens_what_is_longer_and_turns_nothing(
    config: RunConfig, initial: Tensors, tmp_path: Path
) -> None:
    free = told(config, tmp_path / "free", digest=digest(initial))
    update = update_of(free, initial)
    length = float(update.norm())
    assert free.metrics["update_norm"] == pytest.approx(length, rel=1e-6)
    for share in (0.5, 0.9, 1.1, 2.0):
        privacy = config.privacy.model_copy(update={"clip": share * length})
        clipped = config.model_copy(update={"privacy": privacy})
        reply = told(clipped, tmp_path / str(share), digest=digest(initial))
        torch.testing.assert_close(update_of(reply, initial), min(share, 1.0) * update, rtol=1e-5, atol=1e-9)
        assert reply.metrics["update_norm"] == pytest.approx(length, rel=1e-6)  # before clipping


def test_another_run_takes_the_place_of_one_and_the_device_says_so(
    config: RunConfig, initial: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = NodeContext(0, "", str(tmp_path), str(tmp_path), keep_replies=True, keep_runs=1)

    def work(run: str) -> None:
        asked = Instruction(run=run, kind="fit", round=1, digest=digest(initial))
        reply = answer(wire.pack_instruction(asked), config.to_json(), place)
        assert wire.unpack_reply(reply).error == ""

    work("first")
    assert {path.name for path in tmp_path.iterdir()} == {"first"}
    with caplog.at_level("INFO", "fedllm.worker"):
        work("second")
    assert {path.name for path in tmp_path.iterdir()} == {"second"}
    assert "run first" in caplog.text
    assert "--keep-runs is 1" in caplog.text


@pytest.mark.parametrize("start", [0, DENSE])
def test_tensors_that_are_not_the_servers_are_not_worked_on(
    start: int, config: RunConfig, initial: Tensors, tmp_path: Path
) -> None:
    payload = pack(initial) if start == DENSE else b""
    sizes = (len(payload),) if payload else ()
    same = {"start": start, "payload": payload, "sizes": sizes}
    drifted = told(config, tmp_path / "drifted", digest=digest(initial) ^ 1, **same)
    assert (drifted.error, drifted.payload) == (STALE, b"")
    agreed = told(config, tmp_path / "agreed", digest=digest(initial), **same)
    assert agreed.error == ""
    assert agreed.payload


@pytest.mark.slow
def test_a_client_keeps_two_states_of_its_own_and_the_versions_it_may_start_from(
    config: RunConfig, tmp_path: Path
) -> None:
    """The state that counted and the one behind the newest reply; three increments of a byte a value."""
    codec = config.codec.model_copy(
        update={"up": "error_feedback(quantize(bits=8))", "down": "quantize(bits=8)"}
    )
    server = config.server.model_copy(update={"sample": None})
    small = config.model_copy(update={"codec": codec, "server": server, "clients": 2, "rounds": 6})
    run(small, tmp_path / "run")
    states = tmp_path / "run" / "clients"
    for node in (0, 1):
        kept = {path.name for path in states.glob(f"{node}/*/*")}
        assert kept == {f"local-{round}-0.safetensors" for round in (5, 6)}
    saved = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    oldest, newest = saved.facts["first"], saved.facts["version"]
    assert (oldest, newest) == (3, 6)
    held = {int(path.stem.partition("-")[2]) for path in states.glob("*/global-*")}
    assert held == set(range(oldest - 1, newest))  # as the last question named them


@pytest.mark.parametrize("memory", [0, 123_456_789, 1 << 60])
def test_a_device_introduces_itself_with_what_it_may_use(
    memory: int, config: RunConfig, tmp_path: Path
) -> None:
    machine = psutil.virtual_memory().total
    place = NodeContext(0, "", str(tmp_path), str(tmp_path), keep_replies=True, memory=memory)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        asked = wire.pack_instruction(Instruction("alone", "describe"))
        told = wire.unpack_reply(answer(asked, config.to_json(), place))
    finally:
        torch.set_num_threads(threads)
    assert told.metrics["cores"] == threads + 1
    assert told.metrics["memory_bytes"] == {0: machine, 1 << 60: machine}.get(memory, memory)
    assert told.facts["fedllm"] == version("fedllm")
    assert NodeContext.from_record(place.to_record()) == place


def test_a_devices_memory_comes_from_its_own_configuration(tmp_path: Path) -> None:
    config: dict[str, str | int] = {"partition-id": 1, "state-dir": str(tmp_path), "memory": 7_000_000_000}
    context = Context(1, 2, config, RecordDict(), {})  # type: ignore[arg-type]
    assert NodeContext.of(context).memory == 7_000_000_000
    del config["memory"]
    assert NodeContext.of(Context(1, 2, config, RecordDict(), {})).memory == 0  # type: ignore[arg-type]
