"""A node's state is versioned: what a reply held is neither lost nor applied twice."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from client.memory import START, GlobalMemory, NodeMemory
from client.worker import open_globals
from fedllm.config import CodecConfig, RunConfig
from fedllm.runs import Run
from tests.rounds.federation import DeviceGrid, configuration, run


def state(value: float) -> dict[str, torch.Tensor]:
    return {"residual": torch.full((3,), value)}


def test_a_state_never_replaces_the_one_before(tmp_path: Path) -> None:
    memory = NodeMemory(tmp_path, keep_replies=True)
    memory.remember((1, 0), state(1.0), reply=b"one", digest=7)
    memory.remember((2, 0), state(2.0), reply=b"two", digest=8)
    assert memory.local(START) == {}
    assert torch.equal(memory.local((1, 0))["residual"], torch.ones(3))  # type: ignore[index]
    assert torch.equal(memory.local((2, 0))["residual"], torch.full((3,), 2.0))  # type: ignore[index]
    memory.forget_all_but((1, 0))  # the server says that reply 2 never counted
    assert memory.local((2, 0)) is None
    assert memory.local((1, 0)) is not None


def test_a_stored_reply_answers_only_the_same_question(tmp_path: Path) -> None:
    memory = NodeMemory(tmp_path, keep_replies=True)
    memory.remember((3, 0), {}, reply=b"answer", digest=42)
    assert memory.reply((3, 0), 42) == b"answer"
    assert memory.reply((3, 0), 43) is None  # other global tensors: the run took another course
    assert memory.reply((4, 0), 42) is None
    assert memory.local((3, 0)) == {}  # an empty state is a state, not a lost one


@pytest.mark.parametrize("up", ["none", "quantize(bits=8)", "error_feedback(quantize(bits=2))"])
def test_whoever_keeps_no_tensors_has_lost_none(
    up: str, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config = configuration(tiny_encoder, tiny_texts, codec={"up": up}, rounds=3)
    run(config, tmp_path / "run")
    rows = Run(tmp_path / "run").nodes()
    assert len({row.round for row in rows if row.exchange == "fit"}) == 3
    assert [row for row in rows if "state_lost" in row.metrics] == []


def test_global_versions_outlive_the_process(tmp_path: Path) -> None:
    GlobalMemory(tmp_path).put(4, 99, state(4.0), durable=True)
    again = GlobalMemory(tmp_path)
    assert again.newest(99) is None
    assert torch.equal(again.get(4)["residual"], torch.full((3,), 4.0))  # type: ignore[index]
    again.forget_below(5)
    assert again.get(4) is None


FEEDBACK = {"up": "error_feedback(quantize(bits=2))", "down": "error_feedback(quantize(bits=4))"}


@pytest.fixture(scope="module")
def config(tiny_encoder: Path, tiny_texts: Path) -> RunConfig:
    return configuration(tiny_encoder, tiny_texts, codec=FEEDBACK, server={"sample": 3, "deadline_s": 2.0})


@pytest.fixture(scope="module")
def undisturbed(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(config, tmp_path_factory.mktemp("memory") / "run")


@pytest.mark.parametrize("codec", ["ef21(top_k(fraction=0.2))", "error_feedback(top_k(fraction=0.2))"])
def test_what_a_codec_carries_survives_a_restart_of_both_sides(
    codec: str, config: RunConfig, tmp_path: Path
) -> None:
    carried = config.model_copy(update={"codec": CodecConfig(up=codec)})
    undisturbed = run(carried, tmp_path / "undisturbed")
    folder = tmp_path / "run"

    def stop(message: Message) -> Message:
        if message.metadata.group_id == "3":
            Run(folder).post_command("stop", by="test")
        return message

    run(carried, folder, stop)
    assert run(carried, folder)["state_sha256"] == undisturbed["state_sha256"]


def test_lost_replies_neither_lose_nor_double_a_residual(
    config: RunConfig, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """All replies of a round's first attempt are lost, after their clients wrote the state behind them."""
    lost = 0

    def lose(message: Message) -> Message | None:
        nonlocal lost
        if message.metadata.group_id == "3" and lost < 3:
            lost += 1
            return None
        return message

    summary = run(config, tmp_path / "run", lose)
    assert lost == 3
    assert summary["state_sha256"] == undisturbed["state_sha256"]


def test_a_node_that_lost_its_global_tensors_is_sent_them_whole(
    config: RunConfig, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"

    def stop(message: Message) -> Message:
        if message.metadata.group_id == "3":
            Run(folder).post_command("stop", by="test")
        return message

    assert run(config, folder, stop, DeviceGrid)["status"] == "stopped"
    for path in tmp_path.glob("devices/**/global-*"):
        path.unlink()
    open_globals.cache_clear()  # as in a new process
    summary = run(config, folder, grid_of=DeviceGrid)
    assert summary["state_sha256"] == undisturbed["state_sha256"]
    assert summary["bytes"]["down"] > undisturbed["bytes"]["down"]


def test_devices_that_share_nothing_give_the_same_bits_and_bytes(
    config: RunConfig, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    summary = run(config, tmp_path / "run", grid_of=DeviceGrid)
    assert summary["state_sha256"] == undisturbed["state_sha256"]
    assert summary["bytes"] == undisturbed["bytes"]


def test_a_node_that_lost_its_own_state_says_so(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def stop(message: Message) -> Message:
        if message.metadata.group_id == "4":
            Run(folder).post_command("stop", by="test")
        return message

    run(config, folder, stop)
    for path in folder.glob("clients/[0-9]*"):
        shutil.rmtree(path)
    assert run(config, folder)["status"] == "finished"
    rows = Run(folder).nodes(round=5)
    assert any(row.metrics.get("state_lost") == 1.0 for row in rows)
