"""Layers that take turns: each round trains one group of them, and moves nothing else.

HiFT (Liu et al., EMNLP 2024, algorithm 1) updates one group of layers at a time, so that gradients and
moments of that group alone are held. In a federation a group's turn is a round: clients train the same group,
send its changes, and take up its means; all other tensors stay as everybody holds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from fedllm.codecs import Codecs
from fedllm.config import RunConfig
from fedllm.errors import ConfigError, WireError
from fedllm.randomness import stream
from fedllm.tensors import Tensors, pack, spec_of, unpack
from strategies.base import Exchange, Replay

__all__ = ["Blocks", "groups", "turns"]

_KEY = "block"
_LAYER = re.compile(r"(.*?)\.(\d+)(?:\.|$)")
_BOTTOM = re.compile(r"embed|\b(?:wte|wpe|shared)\b")
_HEAD = re.compile(r"(?:^|\.)(?:head|classifier|pre_classifier|score)(?:\.|$)")


def groups(names: Iterable[str], count: int) -> list[frozenset[str]]:
    """Split tensors by their layers into groups of as equal numbers of layers as can be, the lowest first.

    Embeddings belong to the lowest group, what stands above the layers to the highest. A head, which is new,
    belongs to every group: it is small, and no layer learns much below one that guesses.

    Args:
        names: of all that is trained, as ``Model.trainable`` calls it.
        count: of groups.

    Raises:
        ConfigError: there are not so many layers.

    >>> [sorted(group) for group in groups(["h.0.w", "h.1.w", "embed", "norm", "head.bias"], 2)]
    [['embed', 'h.0.w', 'head.bias'], ['h.1.w', 'head.bias', 'norm']]
    """
    layers: dict[tuple[bool, str, int], set[str]] = {}
    bottom: set[str] = set()
    top: set[str] = set()
    every: set[str] = set()
    for name in names:
        if _HEAD.search(name):
            every.add(name)
        elif match := _LAYER.match(name):
            # An encoder's layers come before its decoder's.
            layers.setdefault(("decoder" in match[1], match[1], int(match[2])), set()).add(name)
        else:
            (bottom if _BOTTOM.search(name) else top).add(name)
    if len(layers) < count:
        raise ConfigError(
            f"tuning.blocks = {count} groups cannot be made of {len(layers)} layers, which is how many have "
            "something to train; lower it"
        )
    order = sorted(layers)
    ends = [round(len(order) * place / count) for place in range(count + 1)]
    found = [{name for key in order[start:end] for name in layers[key]} for start, end in pairwise(ends)]
    found[0] |= bottom
    found[-1] |= top
    return [frozenset(group | every) for group in found]


def turns(config: RunConfig) -> Blocks | None:
    """Return the turns of a run's groups; None where all is trained in each round.

    Raises:
        ConfigError: something else that the run asks for cannot go with them.
    """
    if config.tuning.blocks == 1:
        return None
    _require_possible(config)
    return Blocks(config.tuning.blocks, config.tuning.block_order, config.seed)


@dataclass(frozen=True)
class Blocks:
    """The turns of a run's groups."""

    count: int
    order: Literal["up", "down", "random"]
    seed: int

    def exchange(self, version: int) -> Exchange:
        """Return the exchange that leads to the version after this one."""
        return Exchange("fit", {_KEY: self._turn(version)})

    def _turn(self, version: int) -> int:
        cycle, place = divmod(version, self.count)
        if self.order == "random":
            return int(stream(self.seed, "blocks", cycle).permutation(self.count)[place])
        return place if self.order == "up" else self.count - 1 - place

    def of(self, tensors: Mapping[str, object], arguments: Mapping[str, object]) -> frozenset[str]:
        """Return the names that an exchange trains: all, where it names no group."""
        block = arguments.get(_KEY)
        return frozenset(tensors) if block is None else groups(tensors, self.count)[int(str(block))]

    def step(self, tensors: Tensors, version: int, changes: Tensors) -> Replay:
        """Server: return the step of a round that changes one group: its number, and its new values."""
        after = {name: tensors[name] + change for name, change in changes.items()}
        return Replay(bytes([self._turn(version)]) + pack(after))

    def replay(self, tensors: Tensors, record: bytes) -> Tensors:
        """Both sides: put the new values of a group in the place of the old.

        Raises:
            WireError: the record is of no group, or of another length.
        """
        if not record or record[0] >= self.count:
            raise WireError(f"a record names no group of {self.count}")
        names = self.of(tensors, {_KEY: record[0]})
        spec = {name: one for name, one in spec_of(tensors).items() if name in names}
        return tensors | unpack(record[1:], spec)


def _require_possible(config: RunConfig) -> None:
    server, codec = config.server, config.codec
    said = f"tuning.blocks = {config.tuning.blocks}"
    if not server.plain:
        raise ConfigError(f"{said} lets clients take up the mean of a group itself: {server.PLAINLY}")
    if codec.down != "none":
        raise ConfigError(f'{said} sends a group\'s new values as they are: codec.down must be "none"')
    if Codecs.of(codec).up.stateful:
        raise ConfigError(
            f"{said} sends other tensors in each round, so codec.up = {codec.up!r} would keep what it left "
            "out for a turn that comes much later: leave error feedback out"
        )
