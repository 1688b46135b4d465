"""Put pieces together in their one legal order, with what goes without saying filled in."""

from __future__ import annotations

from typing import Any

from fedllm.codecs.chain import Chain, spell
from fedllm.codecs.concatenate import Concatenate
from fedllm.codecs.entropy import Packed
from fedllm.codecs.quantize import Float32, Quantize, Sign
from fedllm.codecs.rotate import Eden, Rotate
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
            raise ConfigError(f"{stage.name} is a codec by itself and cannot be a stage of a chain")
        if kind not in _FOLLOWS[stage.kind]:
            raise ConfigError(
                f"{stage.name} takes {_NEEDS[stage.kind]}, but {before} leaves {_LEAVES[kind]}"
                + (": put quantize, nf4, sign or cast between them" if stage.kind == "coder" != kind else "")
            )
        kind, before = stage.kind, stage.name
        pieces[kind].append(stage)
    transforms = tuple(pieces["transform"])
    rotated = bool(transforms) and isinstance(transforms[-1], Rotate)
    return Chain(
        layout=pieces["layout"][0] if pieces["layout"] else Concatenate(),
        transforms=transforms,
        quantizer=_quantizer(pieces["quantizer"][0], rotated) if pieces["quantizer"] else Float32(),
        coder=pieces["coder"][0] if pieces["coder"] else Packed(),
        text=" | ".join(spell(stage) for stage in stages),
    )


def _quantizer(stage: Any, rotated: bool) -> Any:
    """After a rotation the distribution of the values is known, and EDEN's grid is the better one."""
    if rotated and isinstance(stage, Sign):
        return Eden(1, stage.block)
    if rotated and isinstance(stage, Quantize) and stage.bits <= 4 and not stage.stochastic:
        return Eden(stage.bits, stage.block)
    return stage
