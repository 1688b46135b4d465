"""Put pieces together in their one legal order, with what goes without saying filled in."""

from __future__ import annotations

from typing import Any

from fedllm.codecs.base import FramedCodec
from fedllm.codecs.chain import Chain, spell
from fedllm.codecs.stages.concatenate import Concatenate
from fedllm.codecs.stages.entropy import Packed
from fedllm.codecs.stages.quantize import Float32, Quantize, Sign
from fedllm.codecs.stages.rotate import Eden, Rotate
from fedllm.errors import ConfigError

__all__ = ["chain"]

_LEAVES = {"": "tensors", "layout": "floats", "transform": "floats", "quantizer": "codes", "coder": "bytes"}
_NEEDS = {"layout": "tensors", "transform": "floats", "quantizer": "floats", "coder": "codes"}
_FOLLOWS = {
    "layout": ("",),
    "transform": ("", "layout", "transform"),
    "quantizer": ("", "layout", "transform"),
    "coder": ("quantizer",),
}


def chain(*stages: Any) -> Chain:
    """Return the codec that applies ``stages`` one after another.

    >>> str(chain(Rotate(), Quantize(bits=1)))
    'rotate(block=4096) | quantize(bits=1, block=4096, stochastic=false)'

    Raises:
        ConfigError: a stage cannot take what the one before it leaves.
    """
    kind, before = "", "the input"
    pieces: dict[str, list[Any]] = {name: [] for name in _NEEDS}
    for stage in stages:
        if getattr(stage, "kind", None) not in _NEEDS:
            kinds = ", ".join(map(repr, _NEEDS))
            wrong = f"does not say what it is: give its class a kind, one of {kinds}"
            if isinstance(stage, FramedCodec):
                wrong = "is a codec by itself and cannot be a stage of a chain"
            raise ConfigError(f"{getattr(stage, 'name', stage)} {wrong}")
        if kind not in _FOLLOWS[stage.kind]:
            raise ConfigError(
                f"{stage.name} takes {_NEEDS[stage.kind]}, but {before} leaves {_LEAVES[kind]}"
                + (": put quantize, nf4, sign or cast between them" if stage.kind == "coder" != kind else "")
            )
        kind, before = stage.kind, stage.name
        pieces[kind].append(stage)
    transforms = tuple(pieces["transform"])
    rotation = transforms[-1] if transforms and isinstance(transforms[-1], Rotate) else None
    return Chain(
        layout=pieces["layout"][0] if pieces["layout"] else Concatenate(),
        transforms=transforms,
        quantizer=_quantizer(pieces["quantizer"][0], rotation) if pieces["quantizer"] else Float32(),
        coder=pieces["coder"][0] if pieces["coder"] else Packed(),
        text=" | ".join(spell(stage) for stage in stages),
    )


def _quantizer(stage: Any, rotation: Rotate | None) -> Any:
    """After a rotation the distribution of the values is known, and EDEN's grid is the better one."""
    if rotation and isinstance(stage, Sign):
        return Eden(1, _within(stage.block, rotation))
    if rotation and isinstance(stage, Quantize) and stage.bits <= 4 and not stage.stochastic:
        return Eden(stage.bits, _within(stage.block, rotation))
    return stage


def _within(block: int, rotation: Rotate) -> int:
    """Let no scale span two rotations: what is large in one would be shrunk to swell what is small."""
    return min(1 << block.bit_length() - 1, rotation.block)
