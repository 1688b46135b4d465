"""Hidden states below the lowest trained layer, computed once per text.

When only the top K of L layers are trained, what the lower layers make of a text never changes: each
further forward pass costs K / L of the model: a client's probes (:class:`ActivationCache`, in memory within
a budget, then in files) and the server's evaluations (:class:`FeatureCache`).
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedllm.config import RunConfig
from fedllm.data.tokens import Tokens
from fedllm.models.anatomy import longest_stack, plain
from fedllm.models.model import Model
from strategies.base import Passes
from strategies.forward.slopes import settled

__all__ = ["ActivationCache", "Activations", "FeatureCache", "Shortcut", "Stack", "stack_of"]

_TEXTS_AT_ONCE = 32


@dataclass(frozen=True)
class Stack:
    """A model's layers and how many of the lowest are frozen throughout.

    Attributes:
        layers: all of them, in order.
        frozen: layers whose output cannot change while the trained tensors do; 0 rules caching out.
        embeddings: what makes the lowest layer's input, where that is known; frozen as well.
    """

    layers: tuple[nn.Module, ...]
    frozen: int
    embeddings: nn.Module | None = None

    @property
    def share(self) -> float:
        """Share of the layers that still has to run."""
        return 1.0 - self.frozen / len(self.layers)

    @contextmanager
    def resumed(self, hidden: torch.Tensor) -> Iterator[None]:
        """Let embeddings and frozen layers hand on ``hidden`` [b, t, width] instead of computing."""

        def cached(*args: Any, **kwargs: Any) -> torch.Tensor:
            return hidden

        idle = [*self.layers[: self.frozen], *([] if self.embeddings is None else [self.embeddings])]
        for module in idle:
            module.__dict__["forward"] = cached
        try:
            yield
        finally:
            for module in idle:
                del module.__dict__["forward"]


def stack_of(module: nn.Module) -> Stack:
    """Find the longest list of layers and the lowest that holds a trained parameter.

    Anything trained outside the layers and the linear head (prompts, embeddings) could reach the lowest
    layer, so that nothing may be cached then.
    """
    found = longest_stack(module)
    if found is None:
        return Stack((module,), 0)
    prefix, layers = found
    frozen = len(layers)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad or name.startswith("head."):
            continue
        inside = name.startswith(prefix + ".")
        frozen = min(frozen, int(name[len(prefix) + 1 :].split(".")[0]) if inside else 0)
    return Stack(tuple(layers), frozen, _embeddings(module) if frozen else None)


def _embeddings(network: nn.Module) -> nn.Module | None:
    """Return an encoder's embeddings, which look tokens, positions and segments up and normalise their sum.

    Of other models they are a table alone, and of some (ALBERT, ELECTRA) not as wide as the layers.
    """
    base: Any = plain(getattr(network, "backbone", network)).base_model
    found = getattr(base, "embeddings", None)
    if not isinstance(found, nn.Module):
        return None
    tables = [part for part in found.modules() if isinstance(part, nn.Embedding)]
    as_wide = all(table.embedding_dim == base.config.hidden_size for table in tables)
    return found if tables and as_wide else None


@dataclass(frozen=True)
class Activations:
    """Hidden states of one client's texts.

    Attributes:
        rows: [tokens of all texts, width] float32, in memory or mapped from a file.
        starts: each text's first row.
        lengths: each text's number of tokens.
    """

    rows: npt.NDArray[np.float32]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    def batch(self, indices: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return [b, t, width], zero beyond each text's end, t the longest length of the batch."""
        lengths = self.lengths[indices]
        out = np.zeros((len(indices), int(lengths.max()), self.rows.shape[1]), dtype=np.float32)
        for place, (start, length) in enumerate(zip(self.starts[indices], lengths, strict=True)):
            out[place, :length] = self.rows[start : start + length]
        return torch.from_numpy(out)


@dataclass(frozen=True)
class Shortcut:
    """A client's texts, ready to enter the model above its frozen layers where there are any.

    Attributes:
        stack: the model's layers.
        entry: what leaves the frozen ones, or ``None`` where nothing may be cached.
        computed: texts that had to be run through the frozen layers for it.
    """

    stack: Stack
    entry: Activations | None
    computed: int

    @contextmanager
    def resumed(self, indices: npt.NDArray[np.int64]) -> Iterator[None]:
        """Let the model see the cached states of these texts, which must be the next batch."""
        if self.entry is None:
            yield
            return
        first = next(self.stack.layers[0].parameters())
        with self.stack.resumed(self.entry.batch(indices).to(first.device, first.dtype)):
            yield

    def passes(self, batches: float, batch_size: int) -> float:
        """Passes through the whole model that ``batches`` cost, with what was computed for the cache.

        >>> Shortcut(Stack((nn.Identity(),) * 4, 3), None, computed=40).passes(10, batch_size=8)
        6.25
        """
        share = self.stack.share
        return batches * share + self.computed / batch_size * (1.0 - share)

    def cost(self, batches: float, config: RunConfig) -> Passes:
        """Return the passes that ``batches`` cost; of a simulated device as if it had cached nothing."""
        size = config.training.batch_size
        if config.simulation.profile is None:
            return Passes(self.passes(batches, size))
        texts = 0 if self.entry is None else len(self.entry.lengths)
        afresh = replace(self, computed=texts)
        return Passes(afresh.passes(batches, size), once=afresh.passes(0.0, size))


@dataclass
class ActivationCache:
    """Activations by content: the frozen weights, the texts and the number of layers name an entry.

    Attributes:
        budget_bytes: held in memory; what comes after goes to files in a folder that ends with
            the cache.
    """

    budget_bytes: int
    _entries: dict[str, Activations | None] = field(default_factory=dict)
    _held: int = 0
    _folder: Path | None = None
    _weights: tuple[tuple[Any, ...], str] = ((), "")

    def open(self, model: Model, tokens: Tokens, *, use: bool = True) -> Shortcut:
        """Return the shortcut for a client's texts; without ``use``, one that spares nothing."""
        stack = stack_of(model.module)
        if not use or not stack.frozen or not tokens.single:
            return Shortcut(Stack(stack.layers, 0), None, 0)
        entry, computed = self.get(model, stack, tokens)
        return Shortcut(stack if entry else Stack(stack.layers, 0), entry, computed)

    def get(self, model: Model, stack: Stack, tokens: Tokens) -> tuple[Activations | None, int]:
        """Return the activations below the first trained layer, and how many texts had to be computed.

        There are none where layers hand on more than hidden states (DeBERTa).

        All of a client's texts are computed at the first call, in fixed groups, so that the values do
        not depend on which batches are drawn.
        """
        key = self._key(model.module, stack, tokens)
        if key in self._entries:
            return self._entries[key], 0
        self._entries[key] = found = self._compute(model, stack, tokens, key)
        return found, len(tokens) if found else 0

    def _key(self, module: nn.Module, stack: Stack, tokens: Tokens) -> str:
        digest = hashlib.sha256(self._fingerprint(module).encode())
        digest.update(repr(stack.frozen).encode())
        digest.update(np.ascontiguousarray(tokens.lengths).tobytes())
        for start, length in zip(tokens.starts, tokens.lengths, strict=True):
            digest.update(tokens.flat[start : start + length].tobytes())
            if tokens.segments is not None:
                digest.update(tokens.segments[start : start + length].tobytes())
        return digest.hexdigest()

    def _fingerprint(self, module: nn.Module) -> str:
        """Hash the frozen weights; hashed again only after one of them was written to or replaced."""
        versions = _versions(module)
        if versions != self._weights[0]:
            digest = hashlib.sha256()
            for parameter in _frozen(module):
                raw = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
                digest.update(raw.numpy().tobytes())
            self._weights = (versions, digest.hexdigest())
        return self._weights[1]

    def _compute(self, model: Model, stack: Stack, tokens: Tokens, key: str) -> Activations | None:
        ends = np.cumsum(tokens.lengths)
        starts = ends - tokens.lengths
        rows: npt.NDArray[np.float32] | None = None
        for first in range(0, len(tokens), _TEXTS_AT_ONCE):
            indices = np.arange(first, min(first + _TEXTS_AT_ONCE, len(tokens)))
            hidden = _below(model, stack, tokens, indices)
            if hidden is None:
                return None
            if rows is None:
                rows = self._allocate((int(ends[-1]), hidden.shape[-1]), key)
            for index, values in zip(indices, hidden, strict=True):
                rows[starts[index] : ends[index]] = values[: tokens.lengths[index]]
        assert rows is not None
        return Activations(rows, starts, tokens.lengths)

    def _allocate(self, shape: tuple[int, int], key: str) -> npt.NDArray[np.float32]:
        size = 4 * shape[0] * shape[1]
        if self._held + size <= self.budget_bytes:
            self._held += size
            return np.empty(shape, dtype=np.float32)
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="fedllm-activations-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return np.memmap(self._folder / key, dtype=np.float32, mode="w+", shape=shape)


@dataclass
class FeatureCache:
    """What leaves the frozen layers, by batch, of one set of texts that is scored again and again.

    A batch's states are those of its own first pass, so that every later pass has the same bits.

    Attributes:
        budget_bytes: batches beyond it go through all layers each time.
    """

    budget_bytes: int
    _states: dict[bytes, torch.Tensor] = field(default_factory=dict)
    _held: int = 0
    _weights: tuple[Any, ...] = ()

    @contextmanager
    def around(self, model: Model, indices: npt.NDArray[np.int64]) -> Iterator[None]:
        """Let the one pass inside resume from this batch's states, or keep them for the next time."""
        stack, weights, key = stack_of(model.module), _versions(model.module), indices.tobytes()
        if weights != self._weights:
            self._states, self._held, self._weights = {}, 0, weights
        if not stack.frozen:
            yield
        elif key in self._states:
            with stack.resumed(self._states[key]):
                yield
        else:
            with _caught(stack) as caught:
                yield
            if caught and self._held + caught[0].nbytes <= self.budget_bytes:
                self._held += caught[0].nbytes
                self._states[key] = caught[0]


def _frozen(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if not parameter.requires_grad]


def _versions(module: nn.Module) -> tuple[Any, ...]:
    """Return what changes once a frozen weight is written to or replaced."""
    return tuple((parameter.data_ptr(), parameter._version) for parameter in _frozen(module))


@contextmanager
def _caught(stack: Stack) -> Iterator[list[torch.Tensor]]:
    """Collect what leaves the last frozen layer, where that is hidden states and nothing else."""
    caught: list[torch.Tensor] = []
    last = stack.layers[stack.frozen - 1]

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            caught.append(output)

    hook = last.register_forward_hook(keep)
    try:
        yield caught
    finally:
        hook.remove()


def _below(
    model: Model, stack: Stack, tokens: Tokens, indices: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32] | None:
    """Run texts through the model and catch what leaves the last frozen layer."""
    with _caught(stack) as caught, settled(model.module):
        model.module(**tokens.batch(indices).to(model.device).inputs())
    return caught[0].float().cpu().numpy() if caught else None
