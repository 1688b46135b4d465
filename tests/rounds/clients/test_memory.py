"""A node's state is versioned: what a reply held is neither lost nor applied twice."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from safetensors.torch import save_file

from client.memory import START, GlobalMemory, Local, NodeMemory
from client.worker import open_globals
from fedllm.config import CodecConfig, RunConfig
from fedllm.errors import StoreError
from fedllm.runs.reader import Run
from fedllm.tensors import Tensors
from tests.parts import quick
from tests.rounds.federation import DeviceGrid, configuration, run


def state(value: float) -> Tensors:
    return {"residual": torch.full((3,), value)}


def kept(memory: NodeMemory, at: tuple[int, int]) -> Local:
    found = memory.local(at)
    assert found is not None
    return found


def test_a_state_never_replaces_the_one_before(tmp_path: Path) -> None:
    memory = NodeMemory(tmp_path, keep_replies=True)
    memory.remember((1, 0), Local(codec=state(1.0)), reply=b"one", digest=7)
    memory.remember((2, 0), Local(codec=state(2.0)), reply=b"two", digest=8)
    assert kept(memory, START).empty
    assert torch.equal(kept(memory, (1, 0)).codec["residual"], torch.ones(3))
    assert torch.equal(kept(memory, (2, 0)).codec["residual"], torch.full((3,), 2.0))
    memory.forget_all_but((1, 0))  # the server says that reply 2 never counted
    assert memory.local((2, 0)) is None
    assert memory.local((1, 0)) is not None


def test_what_a_node_keeps_is_for_its_user_alone(tmp_path: Path) -> None:
    """Whatever the umask: teachers and residuals tell of private texts."""
    before = os.umask(0)
    try:
        memory = NodeMemory(tmp_path / "state" / "run", keep_replies=True)
        memory.remember((1, 0), Local(state(1.0)), reply=b"one", digest=7)
        GlobalMemory(tmp_path / "state" / "run").put(1, 7, state(1.0), durable=True)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert len(files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "state" / "run").stat().st_mode) == 0o700


def test_a_stored_reply_answers_only_the_same_question(tmp_path: Path) -> None:
    memory = NodeMemory(tmp_path, keep_replies=True)
    memory.remember((3, 0), Local(), reply=b"answer", digest=42)
    assert memory.reply((3, 0), 42) == b"answer"
    assert memory.reply((3, 0), 43) is None  # other global tensors: the run took another course
    assert memory.reply((4, 0), 42) is None
    assert kept(memory, (3, 0)).empty  # an empty state is a state, not a lost one


def test_each_owner_gets_back_what_was_its_own(tmp_path: Path) -> None:
    """Under one name, and one that looks like the other's."""
    memory = NodeMemory(tmp_path, keep_replies=False)
    method = {"w": torch.ones(2), "codec/w": torch.full((2,), 2.0)}
    memory.remember((1, 0), Local(method, {"w": torch.full((2,), 3.0)}), reply=b"", digest=1)
    found = kept(memory, (1, 0))
    assert {name: tensor.tolist() for name, tensor in found.method.items()} == {
        "w": [1.0, 1.0],
        "codec/w": [2.0, 2.0],
    }
    assert {name: tensor.tolist() for name, tensor in found.codec.items()} == {"w": [3.0, 3.0]}


def test_a_memory_of_before_opens_and_one_of_a_later_version_is_refused(tmp_path: Path) -> None:
    memory = NodeMemory(tmp_path, keep_replies=True)
    save_file({"method/teacher/w": torch.ones(2)}, tmp_path / "local-4-0.safetensors")
    assert list(kept(memory, (4, 0)).method) == ["teacher/w"]
    save_file({"privacy/spent": torch.ones(1)}, tmp_path / "local-5-0.safetensors")
    with pytest.raises(StoreError, match=r"local-5-0\.safetensors holds 'privacy/spent', .* upgrade it here"):
        memory.local((5, 0))


FEEDBACK = "error_feedback(quantize(bits=2))"


@pytest.mark.parametrize("up", quick(["none", "quantize(bits=8)", FEEDBACK], FEEDBACK))
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


def test_a_version_of_another_course_is_written_over(tmp_path: Path) -> None:
    GlobalMemory(tmp_path).put(4, 99, state(4.0), durable=True)
    again = GlobalMemory(tmp_path)  # the run went back, and came to another version 4
    again.put(4, 77, state(5.0), durable=True)
    assert torch.equal(again.get(4)["residual"], torch.full((3,), 5.0))  # type: ignore[index]


FEEDBACK = {"up": "error_feedback(quantize(bits=2))", "down": "error_feedback(quantize(bits=4))"}


@pytest.fixture(scope="module")
def config(tiny_encoder: Path, tiny_texts: Path) -> RunConfig:
    return configuration(tiny_encoder, tiny_texts, codec=FEEDBACK, server={"sample": 3, "deadline_s": 2.0})


@pytest.fixture(scope="module")
def undisturbed(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(config, tmp_path_factory.mktemp("memory") / "run")


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_devices_that_share_nothing_give_the_same_bits_and_bytes(
    config: RunConfig, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    summary = run(config, tmp_path / "run", grid_of=DeviceGrid)
    assert {row.status for row in Run(tmp_path / "run").nodes()} == {"accepted"}
    assert summary["state_sha256"] == undisturbed["state_sha256"]
    assert summary["bytes"] == undisturbed["bytes"]


@pytest.mark.slow
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


class SmallDevices(DeviceGrid):
    """Devices that keep the state of one run."""

    def context(self, node: int) -> Context:
        context = super().context(node)
        context.node_config["keep-runs"] = 1
        return context


@pytest.mark.slow
def test_a_collected_run_that_goes_on_is_one_whose_nodes_lost_their_state(
    config: RunConfig, tmp_path: Path
) -> None:
    """Another run takes its place on every device; what follows is as if the state had been wiped by hand."""

    def stop(message: Message) -> Message:
        if message.metadata.group_id == "4":
            Run(message_folder).post_command("stop", by="test")
        return message

    ended = {}
    for name in ("collected", "wiped"):
        message_folder = tmp_path / name / "run"
        assert run(config, message_folder, stop, SmallDevices)["status"] == "stopped"
        devices = [path for path in (tmp_path / name / "devices").iterdir() if any(path.glob("*/local-*"))]
        assert devices
        if name == "collected":
            other = config.model_copy(
                update={"rounds": 1, "server": config.server.model_copy(update={"sample": config.clients})}
            )
            run(other, tmp_path / name / "other", grid_of=SmallDevices)
            kept = {Run(tmp_path / name / "other").identity}
            assert all({path.name for path in device.iterdir()} == kept for device in devices)
        else:
            shutil.rmtree(tmp_path / name / "devices")
        open_globals.cache_clear()
        ended[name] = run(config, message_folder, grid_of=SmallDevices)
        stored = Run(message_folder)
        lost = {row.node for row in stored.nodes(round=5) if row.metrics.get("state_lost") == 1.0}
        said = sorted(event.message for event in stored.events() if event.kind == "lost")
        assert lost
        assert [sentence.partition(" no longer has its state")[0] for sentence in said] == [
            f"client {node}" for node in sorted(lost)
        ]
    assert ended["collected"]["status"] == "finished"
    assert ended["collected"]["state_sha256"] == ended["wiped"]["state_sha256"]
