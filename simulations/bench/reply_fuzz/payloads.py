"""Mutated payloads: nothing but ``CodecError`` or well-formed tensors may come of them, in bounded memory."""

from __future__ import annotations

import time
import tracemalloc
import zlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from fedllm.codecs import CodecContext, parse
from fedllm.errors import CodecError
from fedllm.tensors import Spec, Tensors, dense_bytes, spec_of

__all__ = ["CODECS", "Sample", "fuzz", "mutate", "samples"]

CODECS = [
    "none",
    "quantize(bits=2.5)",
    "nf4 | entropy",
    "cast(bf16) | entropy",
    "rotate | quantize(bits=1)",
    "top_k(fraction=0.05) | quantize(bits=8)",
    "top_k(fraction=0.5) | sign",
    "random_k(fraction=0.1)",
    "low_rank(energy=0.9) | quantize(bits=8) | entropy",
    "error_feedback(per_tensor(matrices=low_rank(rank=2), vectors=sign))",
    "ef21(rotate | sign)",
]

MEMORY = 1 << 20
"""Bytes of working memory allowed beside 16 times the dense tensors."""

TRACED = 8
"""One round of payloads in so many is decoded under ``tracemalloc``, which is slow."""


@dataclass(frozen=True)
class Sample:
    """A codec and one payload of its making."""

    text: str
    payload: bytes
    spec: Spec


def samples() -> list[Sample]:
    """Return one payload of every codec."""
    generator = torch.Generator().manual_seed(0)
    message: Tensors = {
        "a": torch.randn(40, 3, generator=generator) @ torch.randn(3, 30, generator=generator),
        "b": torch.randn(300, generator=generator).to(torch.bfloat16),
        "c": torch.randn((), generator=generator),
    }
    return [
        Sample(text, parse(text).encode(message, {}, CodecContext())[0], spec_of(message)) for text in CODECS
    ]


def mutate(payload: bytes, random: np.random.Generator) -> bytes:
    """Flip bits, overwrite, cut, insert or repeat; nine times in ten with a checksum that fits."""
    data = bytearray(payload)
    for _ in range(random.integers(1, 5)):
        at, kind = int(random.integers(len(data) + 1)), int(random.integers(6))
        size = int(random.integers(1, 9))
        if kind <= 1 and at < len(data):
            data[at] ^= 1 << int(random.integers(8))
        elif kind == 2:
            data[at : at + size] = random.bytes(size)
        elif kind == 3:
            data[at : at + size] = bytes([int(random.choice([0, 1, 127, 128, 255]))]) * size
        elif kind == 4:
            del data[at : at + size]
        else:
            data[at:at] = data[at : at + size]
    if random.random() < 0.9 and len(data) > 9:
        # Restored, so that what lies behind the checksum is reached.
        data[:5] = payload[:5]
        data[5:9] = zlib.crc32(data[9:], zlib.crc32(data[:5])).to_bytes(4, "little")
    return bytes(data)


def fuzz(count: int, seed: int = 0) -> dict[str, object]:
    """Decode ``count`` mutated payloads.

    Returns:
        How many decoded, how many were refused and with which kinds of sentence, the slowest decode in
        seconds and the largest memory as a multiple of the dense tensors.

    Raises:
        AssertionError: a decode gave other tensors than the spec's, or took memory out of proportion.
        Exception: whatever but ``CodecError`` escaped from a decode.
    """
    random = np.random.Generator(np.random.Philox(seed))
    chosen = samples()
    codecs = [parse(sample.text) for sample in chosen]
    refused: Counter[str] = Counter()
    decoded, slowest, largest = 0, 0.0, 0.0
    for index in range(count):
        sample, codec = chosen[index % len(chosen)], codecs[index % len(chosen)]
        payload = mutate(sample.payload, random)
        traced = index // len(chosen) % TRACED == 0
        if traced:
            tracemalloc.start()
        start = time.perf_counter()
        try:
            tensors, _ = codec.decode(payload, sample.spec, {}, CodecContext())
            assert spec_of(tensors) == sample.spec, f"{sample.text} decodes to other tensors: {payload.hex()}"
            assert all(tensor.isfinite().all() for tensor in tensors.values())
            decoded += 1
        except CodecError as error:
            refused[" ".join(str(error).split()[:4])] += 1
        slowest = max(slowest, time.perf_counter() - start)
        if traced:
            memory, dense = tracemalloc.get_traced_memory()[1], dense_bytes(sample.spec)
            tracemalloc.stop()
            assert memory <= 16 * dense + MEMORY, f"{sample.text} took {memory} bytes for {payload.hex()}"
            largest = max(largest, memory / dense)
    return {
        "payloads": count,
        "decoded": decoded,
        "refused": dict(refused.most_common(12)),
        "slowest_s": slowest,
        "memory_of_dense": largest,
    }
