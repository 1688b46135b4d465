"""Checkpoints come back bit for bit, or are not offered."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedllm.errors import StoreError
from fedllm.runs import checkpoint


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _everything() -> dict[str, torch.Tensor]:
    generator = np.random.Generator(np.random.Philox(1))
    random_bits = torch.from_numpy(generator.integers(-(2**15), 2**15, size=(7, 5), dtype=np.int16))
    whole = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "bfloat16, any bits, NaNs among them": random_bits.view(torch.bfloat16),
        "float16": random_bits.view(torch.float16),
        "0-dim": torch.tensor(3.25),
        "0-dim bfloat16": torch.tensor(-0.0, dtype=torch.bfloat16),
        "0-dim int64": torch.tensor(2**62 + 1),
        "empty": torch.empty(0, 3),
        "nan payload": torch.tensor([0x7FC00001, -0x003FFFFF], dtype=torch.int32).view(torch.float32),
        "subnormal": torch.tensor([1e-45, -0.0, float("inf")]),
        "bool": torch.tensor([True, False]),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "whole": whole,
        "transposed view": whole.T,
        "slice of another": whole[1],
        "the same again": whole,
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


def test_every_dtype_shape_and_view_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = _everything()
    checkpoint.save(
        tmp_path, 3, {"tensors": tensors, "memory": {}}, {"version": 3, "nested": {"a": [1, None]}}
    )
    found = checkpoint.load(tmp_path, 3)
    assert found.number == 3
    assert found.facts == {"version": 3, "nested": {"a": [1, None]}}
    assert found.groups["memory"] == {}
    assert found.groups["tensors"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        back = found.groups["tensors"][name]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape), name
        assert _bits(back) == _bits(tensor.detach()), name


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for number in range(1, 6):
        checkpoint.save(tmp_path, number, {"tensors": {"a": torch.tensor(number)}}, {})
    assert checkpoint.numbers(tmp_path) == [4, 5]


def test_a_save_after_a_rollback_removes_the_abandoned_future(tmp_path: Path) -> None:
    for number in range(1, 6):
        checkpoint.save(tmp_path, number, {"tensors": {"a": torch.tensor(number)}}, {}, keep=9)
    checkpoint.save(tmp_path, 3, {"tensors": {"a": torch.tensor(33)}}, {}, keep=2)
    assert checkpoint.numbers(tmp_path) == [2, 3]
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.groups["tensors"]["a"].item() == 33


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "missing") is None


def test_at_most_passes_over_later_rounds(tmp_path: Path) -> None:
    for number in (1, 2):
        checkpoint.save(tmp_path, number, {"tensors": {"a": torch.tensor(number)}}, {})
    found = checkpoint.latest(tmp_path, at_most=1)
    assert found is not None
    assert found.number == 1


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def _flip_tensor(folder: Path) -> None:
    _flip(folder / "tensors.safetensors", -1)


def _flip_fact(folder: Path) -> None:
    path = folder / "state.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))


def _cut_tensor(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def _cut_json(folder: Path) -> None:
    path = folder / "state.json"
    path.write_bytes(path.read_bytes()[:40])


def _lose_tensor(folder: Path) -> None:
    (folder / "tensors.safetensors").unlink()


def _lose_json(folder: Path) -> None:
    (folder / "state.json").unlink()


def _not_an_object(folder: Path) -> None:
    (folder / "state.json").write_text(json.dumps([1, 2]))


@pytest.mark.parametrize(
    "damage", [_flip_tensor, _flip_fact, _cut_tensor, _cut_json, _lose_tensor, _lose_json, _not_an_object]
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: Any) -> None:
    for number in (1, 2):
        checkpoint.save(tmp_path, number, {"tensors": {"a": torch.ones(4)}}, {"step": number})
    damage(tmp_path / "round-000002")
    with pytest.raises(StoreError, match=r"round-000002 is (damaged|incomplete)"):
        checkpoint.load(tmp_path, 2)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.number == 1


def test_a_full_disk_is_one_sentence_and_leaves_older_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    for number in (1, 2):
        checkpoint.save(folder, number, {"tensors": {"a": torch.tensor(number)}}, {})
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"^disk full at .*: free space, then fedllm resume .*/run$"):
        checkpoint.save(folder, 3, {"tensors": {"a": torch.tensor(3)}}, {})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in folder.iterdir()) == ["round-000001", "round-000002"]


def test_what_a_killed_save_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"tensors": {"a": torch.ones(1)}}, {})
    shutil.copytree(tmp_path / "round-000001", tmp_path / ".partial-x")
    assert checkpoint.numbers(tmp_path) == [1]
    checkpoint.save(tmp_path, 2, {"tensors": {"a": torch.ones(1)}}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-000001", "round-000002"]


@pytest.mark.parametrize("arguments", [{"number": -1}, {"keep": 0}, {"tensors": {"../x": {}}}])
def test_nonsense_is_refused(tmp_path: Path, arguments: dict[str, Any]) -> None:
    given: dict[str, Any] = {"number": 1, "tensors": {"tensors": {}}, "facts": {}, **arguments}
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoint.save(tmp_path, **given)


def test_later_checkpoints_are_forgotten(tmp_path: Path) -> None:
    for number in (3, 4, 5):
        checkpoint.save(tmp_path, number, {}, {}, keep=3)
    checkpoint.forget(tmp_path, 4)
    assert checkpoint.numbers(tmp_path) == [3, 4]
    checkpoint.forget(tmp_path, -1)
    assert checkpoint.numbers(tmp_path) == []
    checkpoint.forget(tmp_path / "missing", 0)
