"""Every byte of a payload has a name: in what is recorded of it, and in what is said when it is cut short."""

from __future__ import annotations

import re

import pytest
import torch

from fedllm.codecs import parse
from fedllm.codecs.base import CodecContext
from fedllm.errors import CodecError, ConfigError
from fedllm.tensors import Tensors, spec_of

PARTS: dict[str, set[str]] = {
    "none": {"header", "dense"},
    "quantize(bits=8)": {"header", "scales", "codes"},
    "quantize(bits=3)": {"header", "scales", "codes"},
    "sign": {"header", "scales", "codes"},
    "nf4": {"header", "scales", "codes"},
    "quantize(bits=4) | entropy": {"header", "scales", "codes", "frequencies"},
    "top_k(fraction=0.1) | quantize(bits=8)": {"header", "indices", "scales", "codes"},
    "low_rank(rank=2)": {"header", "ranks", "values"},
}


def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {"m": torch.randn(40, 30, generator=generator), "v": torch.randn(70, generator=generator)}


def context() -> CodecContext:
    return CodecContext(0, ("up", 1, 0, 0), 0.0)


@pytest.mark.parametrize("text", PARTS)
def test_the_parts_of_a_payload_are_named_and_add_up(text: str) -> None:
    codec, update = parse(text), tensors()
    payload, _ = codec.encode(update, {}, context())
    _, _, parts = codec.inspect(payload, spec_of(update), {}, context())
    assert set(parts) == PARTS[text]
    assert sum(parts.values()) == len(payload)


@pytest.mark.parametrize("text", PARTS)
def test_a_payload_cut_short_is_refused_by_the_part_that_misses(text: str) -> None:
    codec, update = parse(text), tensors()
    payload, _ = codec.encode(update, {}, context())
    named = "|".join(PARTS[text])
    for length in range(0, len(payload), max(1, len(payload) // 40)):
        with pytest.raises(CodecError) as caught:
            codec.decode(payload[:length], spec_of(update), {}, context())
        assert re.search(rf"inside its ({named})\b|checksum|damaged", str(caught.value)), str(caught.value)


@pytest.mark.parametrize("name", ["quantize", "nf4", "sign"])
def test_a_block_out_of_range_is_named_with_its_codec(name: str) -> None:
    for block in (7, 2**20 + 1):
        given = f"{name}(bits=4, block={block})" if name == "quantize" else f"{name}(block={block})"
        with pytest.raises(ConfigError, match=rf"^{name} takes block from 8 to 1048576, got {block}$"):
            parse(given)
    for block in (8, 2**20):
        parse(f"{name}(bits=4, block={block})" if name == "quantize" else f"{name}(block={block})")


def test_a_coded_payload_of_no_tensors_is_refused() -> None:
    codec, update = parse("quantize(bits=4) | entropy"), tensors()
    payload, _ = codec.encode(update, {}, context())
    for nothing in ({}, {"a": torch.empty(0)}):
        with pytest.raises(CodecError, match=r"^payload is coded, but there is nothing to decode$"):
            codec.decode(payload, spec_of(nothing), {}, context())
