"""Checkpoints: one folder per round, safetensors and json, complete or absent.

    checkpoints/round-000007/state.json            facts, and the SHA-256 of everything else
    checkpoints/round-000007/<group>.safetensors   named tensors

A checkpoint is written beside its final place and renamed into it, so that a kill at any moment
leaves the older ones as they were. One that was cut short or damaged later is not offered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch

from fedllm.errors import StoreError
from fedllm.runs.durable import disk_errors, sync_folder
from fedllm.tensors import Tensors

__all__ = ["Checkpoint", "forget", "latest", "load", "numbers", "save"]

_SCHEMA = 1
_FOLDER = re.compile(r"round-(\d{6,})")
_GROUP = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_PARTIAL = ".partial-"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after one round: groups of named tensors, and facts that JSON can hold."""

    number: int
    groups: dict[str, Tensors]
    facts: dict[str, Any]


def save(
    folder: Path,
    number: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    facts: Mapping[str, Any],
    *,
    keep: int = 2,
    every: int = 0,
    best: Mapping[int, int] = MappingProxyType({}),
) -> Path:
    """Write ``folder/round-<number>`` atomically and make it the newest checkpoint.

    Checkpoints of later rounds belong to a future that a resumed run has left, so they go, as do
    all but the ``keep`` newest and, where ``every`` is set, those of the rounds that it divides. Beside each
    that is left stays that of the best round of its time, so that a run which goes back has its best one.

    Args:
        folder: the run's ``checkpoints`` folder; made if missing.
        number: the last committed round.
        tensors: groups of tensors, such as ``{"tensors": ..., "memory": ...}``; any shape and dtype.
        facts: what else a resumed run needs; must survive JSON.
        keep: newest checkpoints left afterwards, at least 1.
        every: also leave those of rounds 0, ``every``, 2 ``every``, ...; 0 leaves none of them.
        best: by round, which was the best so far; rounds before the first that was measured are missing.

    Raises:
        StoreError: the disk is full or not writable; older checkpoints are untouched.
    """
    if number < 0 or keep < 1 or every < 0 or not all(_GROUP.fullmatch(name) for name in tensors):
        raise ValueError(f"not a checkpoint: number {number}, keep {keep}, groups {sorted(tensors)}")
    final = folder / f"round-{number:06d}"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder))
        try:
            _write(partial, number, tensors, facts)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(folder)
        _prune(folder, number, keep, every, best)
    return final


def _write(
    folder: Path, number: int, groups: Mapping[str, Mapping[str, torch.Tensor]], facts: Mapping[str, Any]
) -> None:
    checksums = {}
    for name, group in sorted(groups.items()):
        file = f"{name}.safetensors"
        data = safetensors.torch.save(_independent(group))
        _write_synced(folder / file, data)
        checksums[file] = hashlib.sha256(data).hexdigest()
    # Through JSON and back, so that the checksum is over exactly what a reader will parse.
    body = json.loads(
        json.dumps({"schema": _SCHEMA, "number": number, "facts": dict(facts), "files": checksums})
    )
    document = {**body, "sha256": _digest(body)}
    _write_synced(folder / "state.json", json.dumps(document, indent=1).encode())
    sync_folder(folder)


def _independent(group: Mapping[str, torch.Tensor]) -> Tensors:
    """Give each tensor contiguous memory of its own: the format refuses views of shared storage."""
    ready: Tensors = {}
    storages: set[int] = set()
    for name, given in group.items():
        tensor = given.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        ready[name] = tensor
    return ready


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _prune(folder: Path, newest: int, keep: int, every: int, best: Mapping[int, int]) -> None:
    present = numbers(folder)
    reached = [n for n in present if n <= newest]
    kept = {*reached[-keep:], *(n for n in reached if every and n % every == 0)}
    kept |= {best[n] for n in kept if n in best}
    for number in present:
        if number not in kept:
            shutil.rmtree(folder / f"round-{number:06d}")


def forget(folder: Path, after: int) -> None:
    """Delete the checkpoints of later rounds: a run that goes on from ``after`` leaves that future.

    Raises:
        StoreError: they cannot be deleted.
    """
    with disk_errors(folder):
        for number in numbers(folder):
            if number > after:
                shutil.rmtree(folder / f"round-{number:06d}")


def numbers(folder: Path) -> list[int]:
    """Numbers of the checkpoints in a folder, ascending, whether or not they are whole."""
    if not folder.is_dir():
        return []
    matches = (_FOLDER.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def load(folder: Path, number: int) -> Checkpoint:
    """Read one checkpoint, bit for bit as it was saved.

    Raises:
        StoreError: it is missing, incomplete or damaged.
    """
    path = folder / f"round-{number:06d}"
    try:
        document = json.loads((path / "state.json").read_bytes())
        body = {key: document[key] for key in ("schema", "number", "facts", "files")}
        if document["sha256"] != _digest(body) or body["schema"] != _SCHEMA:
            raise StoreError(f"checkpoint {path} is damaged: state.json does not match its checksum")
        groups = {
            file.removesuffix(".safetensors"): _read(path / file, sha) for file, sha in body["files"].items()
        }
    except OSError as error:
        raise StoreError(f"checkpoint {path} is incomplete: {error.strerror} ({error.filename})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"checkpoint {path} is damaged: state.json is not what fedllm writes") from error
    return Checkpoint(body["number"], groups, body["facts"])


def _read(path: Path, sha256: str) -> Tensors:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise StoreError(f"checkpoint {path.parent} is damaged: {path.name} does not match its checksum")
    return safetensors.torch.load(data)


def latest(folder: Path, at_most: int | None = None) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, or None.

    Args:
        folder: the run's ``checkpoints`` folder; may be missing.
        at_most: pass over later rounds.
    """
    for number in reversed(numbers(folder)):
        if at_most is None or number <= at_most:
            with contextlib.suppress(StoreError):
                return load(folder, number)
    return None
