"""Bits and speed of the entropy coder on codes of N(0, 1), beside zstandard where that is installed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedllm.codecs import CodecContext
from fedllm.codecs.base import Buffer, Reader
from fedllm.codecs.stages.bits import Codes
from fedllm.codecs.stages.entropy import Entropy, Packed
from fedllm.codecs.stages.quantize import Quantize
from fedllm.extras import installed

__all__ = ["run"]

VALUES = 2_000_000
REPEATS = 5


def run() -> dict[str, dict[str, Any]]:
    """Code what stochastic quantisation of N(0, 1) gives, and four symbols of which 2 % are not zero.

    Returns:
        By codes: ``entropy`` and ``ans``, bits a code; ``encode_m_s`` and ``decode_m_s``, millions of codes a
        second; ``zstd_1_bytes``, ``zstd_1_packed`` and ``zstd_9``, bits a code, the last the better of the
        two, None without zstandard (``pip install 'fedllm[bench]'``).
    """
    draw = np.random.default_rng(0)
    x = draw.standard_normal((1, VALUES), dtype=np.float32)
    drawn = {f"{2**bits - 1} levels": (_quantised(x, bits), 1 << bits) for bits in (2, 4, 8)}
    rare = draw.integers(1, 4, VALUES) * (draw.random(VALUES) < 0.02)
    drawn["4 symbols, 2 % not zero"] = (rare.astype(np.uint8), 4)
    return {name: _row(codes, alphabet) for name, (codes, alphabet) in drawn.items()}


def _quantised(x: np.ndarray, bits: int) -> Codes:
    caught: list[Codes] = []

    class Catch(Packed):
        def encode(self, codes: Codes, alphabet: int) -> Sequence[Buffer]:
            caught.append(codes)
            return []

    list(Quantize(bits, stochastic=True).encode([x], Catch(), CodecContext()))
    return np.concatenate([codes.ravel() for codes in caught])


def _row(codes: Codes, alphabet: int) -> dict[str, Any]:
    shares = np.bincount(codes) / codes.size
    shares = shares[shares > 0]
    body = b"".join(Entropy().encode(codes, alphabet))
    assert (Entropy().decode(Reader(body), codes.size, alphabet) == codes).all()
    return {
        "entropy": float(-(shares * np.log2(shares)).sum()),
        "ans": 8 * len(body) / codes.size,
        "encode_m_s": codes.size / 1e6 / _seconds(lambda: Entropy().encode(codes, alphabet)),
        "decode_m_s": codes.size
        / 1e6
        / _seconds(lambda: Entropy().decode(Reader(body), codes.size, alphabet)),
        **_zstandard(codes, alphabet),
    }


def _seconds(job: Callable[[], object]) -> float:
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        job()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _zstandard(codes: Codes, alphabet: int) -> dict[str, float | None]:
    if not installed("zstandard"):
        return dict.fromkeys(("zstd_1_bytes", "zstd_1_packed", "zstd_9"))
    import zstandard

    forms = [codes.tobytes(), b"".join(Packed().encode(codes, alphabet))]

    def bits(level: int) -> list[float]:
        coder = zstandard.ZstdCompressor(level=level)
        return [8 * len(coder.compress(form)) / codes.size for form in forms]

    first = bits(1)
    return {"zstd_1_bytes": first[0], "zstd_1_packed": first[1], "zstd_9": min(bits(9))}
