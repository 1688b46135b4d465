"""What a node remembers of a run: versioned, on disk, never written over.

The state after exchange (round, index) lies beside the state before it. The server names the newest reply of
this node that counted; the node starts from that state and only then drops the others. So a server that
comes back at round k finds nodes that can be at k, and what a reply held is neither lost nor applied twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from fedllm.errors import StoreError
from fedllm.runs.durable import disk_errors, replace_file
from fedllm.tensors import Tensors

__all__ = ["START", "GlobalMemory", "Local", "NodeMemory"]

START = (0, 0)
"""The state before any exchange: empty."""


@dataclass(frozen=True)
class Local:
    """What a node keeps of its own, by whose it is.

    Attributes:
        method: what the method keeps, such as a private teacher.
        codec: what the uplink's codec carries from one update to the next.
    """

    method: Tensors = field(default_factory=dict)
    codec: Tensors = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether nobody keeps anything."""
        return not self.method and not self.codec

    def save(self) -> bytes:
        """Serialise, each tensor under its owner's name."""
        parts = {"method": self.method, "codec": self.codec}
        return _serialize({f"{owner}/{name}": t for owner, part in parts.items() for name, t in part.items()})

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read what :meth:`save` wrote; ``None`` if it is not there.

        Raises:
            StoreError: the file cannot be read, or holds what this version keeps for nobody.
        """
        found = _read(path)
        if found is None:
            return None
        local = cls()
        parts = {"method": local.method, "codec": local.codec}
        for key, tensor in found.items():
            owner, _, name = key.partition("/")
            if owner not in parts:
                raise StoreError(f"{path} holds {key!r}, which this fedllm does not know: upgrade it here")
            parts[owner][name] = tensor
        return local


class NodeMemory:
    """One node's own durable state and its stored replies, for one run.

    Args:
        folder: holds ``local-ROUND-INDEX.safetensors`` and ``reply-ROUND-INDEX.bin``.
        keep_replies: answer a repeated instruction from the disk; a simulation recomputes instead.
    """

    def __init__(self, folder: Path, *, keep_replies: bool) -> None:
        self.folder = folder
        self.keep_replies = keep_replies

    def local(self, at: tuple[int, int]) -> Local | None:
        """Return the state after exchange ``at``: empty if it never had any, ``None`` if it was lost."""
        if at == START or self._empty(at).exists():
            return Local()
        found = Local.load(self._local(at))
        # Whoever never kept anything has lost nothing, however far back the server goes.
        return Local() if found is None and self._keeps_nothing() else found

    def _keeps_nothing(self) -> bool:
        kept = [path.suffix for path in self.folder.glob("local-*")]
        return ".empty" in kept and ".safetensors" not in kept

    def reply(self, at: tuple[int, int], digest: int) -> bytes | None:
        """Return the stored reply of exchange ``at``, if it was answered from the same global tensors."""
        path = self._reply(at)
        if not self.keep_replies or not path.exists():
            return None
        stored = path.read_bytes()
        return stored[8:] if stored[:8] == digest.to_bytes(8, "little") else None

    def remember(self, at: tuple[int, int], local: Local, *, reply: bytes, digest: int) -> None:
        """Write the state after ``at``, then the reply: a reply is only ever sent once its state is safe."""
        if not local.empty:
            _write(self._local(at), local.save())
        elif self.keep_replies:
            _write(self._empty(at), b"")
        else:
            # A simulation has many clients that keep nothing: this is not worth waiting for the disk.
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._empty(at).touch()
        if self.keep_replies:
            _write(self._reply(at), digest.to_bytes(8, "little") + reply)

    def forget_all_but(self, at: tuple[int, int]) -> None:
        """Drop every state and reply but those of exchange ``at``."""
        keep = {self._local(at), self._reply(at), self._empty(at)}
        for path in self.folder.glob("*-*-*.*"):
            if path not in keep:
                path.unlink(missing_ok=True)

    def _local(self, at: tuple[int, int]) -> Path:
        return self.folder / f"local-{at[0]}-{at[1]}.safetensors"

    def _empty(self, at: tuple[int, int]) -> Path:
        return self.folder / f"local-{at[0]}-{at[1]}.empty"

    def _reply(self, at: tuple[int, int]) -> Path:
        return self.folder / f"reply-{at[0]}-{at[1]}.bin"


class GlobalMemory:
    """The global tensors by version, so that increments can be applied to the version a node has.

    Virtual clients of one host share one folder; the newest tensors also stay in memory, by their digest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._newest: tuple[int, Tensors] | None = None
        self._written: dict[int, int] = {}
        """Digests of what this process has put on disk, by version."""

    def newest(self, digest: int) -> Tensors | None:
        """Return the tensors last put, if they are the ones with this digest; never change them in place."""
        return self._newest[1] if self._newest is not None and self._newest[0] == digest else None

    def get(self, version: int) -> Tensors | None:
        """Return the tensors of ``version`` if they were put as durable."""
        return _read(self._path(version))

    def put(self, version: int, digest: int, tensors: Tensors, *, durable: bool) -> None:
        """Keep ``version`` in memory and, if the server may send increments to it, on disk."""
        self._newest = (digest, tensors)
        # A file that is there may be of a course that the run has left since.
        if durable and self._written.get(version) != digest:
            _write(self._path(version), _serialize(tensors))
            self._written[version] = digest

    def forget_below(self, version: int) -> None:
        """Drop the versions that no increment will start from any more."""
        for path in self.folder.glob("global-*.safetensors"):
            if (older := int(path.stem.partition("-")[2])) < version:
                path.unlink(missing_ok=True)
                self._written.pop(older, None)

    def _path(self, version: int) -> Path:
        return self.folder / f"global-{version}.safetensors"


def _read(path: Path) -> Tensors | None:
    try:
        return dict(load_file(path)) if path.exists() else None
    except (SafetensorError, OSError) as error:
        raise StoreError(
            f"cannot read {path}: {error}; delete it and the node starts that state anew"
        ) from error


def _serialize(tensors: Tensors) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def _write(path: Path, data: bytes) -> None:
    """Write for this user alone: teachers and residuals tell of the texts they were trained on."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    replace_file(path, data, mode=0o600)
