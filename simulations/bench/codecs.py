"""Speed, size and error of the update codecs, beside bitsandbytes, an EDEN reference and memcpy.

All is timed in one process, codec and peer in turn, so that what else the machine does hits both. Times are
wall-clock medians; MB/s count float32 values. ``codecs`` are whole messages, with frame, checksum and checks
for finite values; ``ratios`` set the one stage that a peer has against that peer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedllm.codecs import CodecContext, measure, parse
from fedllm.codecs.base import Reader, one_thread
from fedllm.codecs.chain import Quantizer
from fedllm.codecs.stages.entropy import Packed
from fedllm.codecs.stages.floats import NormalFloat4
from fedllm.codecs.stages.quantize import Quantize
from fedllm.codecs.stages.rotate import Rotate
from fedllm.extras import installed, require
from fedllm.tensors import Tensors, spec_of
from simulations.bench import coders
from simulations.bench.peer import eden
from simulations.bench.reply_fuzz import payloads

__all__ = ["draw", "run"]

VALUES = 1 << 22
REPEATS = 7

TIMED = [
    "none",
    "quantize(bits=8)",
    "quantize(bits=8, stochastic=true)",
    "quantize(bits=4)",
    "nf4",
    "sign",
    "rotate",
    "rotate | quantize(bits=1)",
    "rotate | quantize(bits=2)",
    "rotate | quantize(bits=4)",
    "quantize(bits=4) | entropy",
    "top_k(fraction=0.01) | quantize(bits=8)",
    "random_k(fraction=0.1) | quantize(bits=8, stochastic=true)",
]

CURVES = {
    "quantize": [f"quantize(bits={bits})" for bits in (1, 2, 3, 4, 5, 6, 8)],
    "quantize | entropy": [f"quantize(bits={bits}) | entropy" for bits in (2, 3, 4, 5, 6, 8)],
    "rotate | quantize": [f"rotate | quantize(bits={bits})" for bits in (1, 1.5, 2, 2.5, 3, 3.5, 4)],
    "the same in error_feedback": [
        f"error_feedback(rotate | quantize(bits={bits}))" for bits in (1, 2, 3, 4)
    ],
    "nf4": ["nf4"],
    "top_k | quantize(8)": [
        f"top_k(fraction={share}) | quantize(bits=8)" for share in (0.01, 0.05, 0.1, 0.25)
    ],
}

Jobs = dict[str, Callable[[], object]]


def run(fuzz: int = 0) -> dict[str, Any]:
    """Measure everything; with ``fuzz`` also decode that many mutated payloads.

    Returns:
        ``codecs``: MB/s each way, bits a value and NMSE for N(0, 1). ``peers``: MB/s. ``ratios``: codec over
        peer, each with its target. ``low_rank``: seconds. ``coders``: the entropy coder beside zstandard.
        ``curves``: bits against NMSE. ``fuzz``: counts.
    """
    x = torch.randn(VALUES, generator=torch.Generator().manual_seed(0))
    peers: Jobs = {"memcpy": x.clone, **_eden(x), **_bitsandbytes(x)}
    jobs: Jobs = {**peers, **_stages(x)}
    for text in TIMED:
        jobs |= _jobs(text, {"x": x})
    speed = {name: 4 * VALUES / 1e6 / seconds for name, seconds in _interleaved(jobs).items()}
    low_rank = _low_rank()
    return {
        "threads": torch.get_num_threads(),
        "values": VALUES,
        "codecs": {text: _row(text, speed) for text in TIMED},
        "peers": {name: speed[name] for name in peers},
        "ratios": _ratios(speed, low_rank),
        "low_rank": low_rank,
        "coders": coders.run(),
        "curves": {name: [_quality(text) for text in texts] for name, texts in CURVES.items()},
        "fuzz": payloads.fuzz(fuzz) if fuzz else None,
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the rate-distortion curves of a result beside the Gaussian bound 4^-bits, as PNG."""
    require("matplotlib", "a plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in result["curves"].items():
        axes.plot([point["bits"] for point in points], [point["nmse"] for point in points], "o-", label=name)
    rates = [0.1 * step for step in range(1, 81)]
    axes.plot(rates, [4**-rate for rate in rates], "k:", label="bound for N(0, 1)")
    axes.set(xlabel="bits per value", ylabel="squared error / squared norm", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _interleaved(jobs: Jobs) -> dict[str, float]:
    """Return the median seconds of every job, run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(REPEATS + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def _jobs(text: str, message: Tensors) -> Jobs:
    codec, context, spec = parse(text), CodecContext(), spec_of(message)
    payload, _ = codec.encode(message, {}, context)
    return {
        f"{text} encode": lambda: codec.encode(message, {}, context),
        f"{text} decode": lambda: codec.decode(payload, spec, {}, context),
    }


def _stages(x: torch.Tensor) -> Jobs:
    """Return what the peers do, as our stages do it."""
    rows, context, coder = [x.numpy()[None]], CodecContext(), Packed()
    jobs: Jobs = {"stage rotation": partial(_alone, Rotate().encode, rows, context)}
    quantizers: dict[str, Quantizer] = {"int8": Quantize(8), "int4": Quantize(4), "nf4": NormalFloat4()}
    for name, quantizer in quantizers.items():
        body = b"".join(quantizer.encode(rows, coder, context))
        jobs[f"stage {name} encode"] = partial(_alone, quantizer.encode, rows, coder, context)
        jobs[f"stage {name} decode"] = partial(_decoded, quantizer, body, (1, x.numel()), context)
    return jobs


def _decoded(quantizer: Quantizer, body: bytes, shape: tuple[int, int], context: CodecContext) -> object:
    return _alone(quantizer.decode, Reader(body), [shape], Packed(), context)


def _alone(stage: Callable[..., object], *arguments: object) -> object:
    """Call a stage the way a codec does, on one thread."""
    with one_thread():
        return stage(*arguments)


def _eden(x: torch.Tensor) -> Jobs:
    signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(1)) * 2.0 - 1
    jobs: Jobs = {"EDEN rotation": lambda: eden.rotate(x, signs)}
    for bits in (1, 4):
        jobs[f"EDEN {bits} bits encode"] = partial(eden.encode, x, bits, signs)
    return jobs


def _bitsandbytes(x: torch.Tensor) -> Jobs:
    """Return the peer's jobs; none where it is not installed (``pip install 'fedllm[bench]'``)."""
    if not installed("bitsandbytes"):
        return {}
    import bitsandbytes.functional as peer

    int8, int8_state = peer.quantize_blockwise(x, blocksize=4096)
    nf4, nf4_state = peer.quantize_4bit(x, blocksize=64, quant_type="nf4")
    return {
        "bitsandbytes int8 encode": lambda: peer.quantize_blockwise(x, blocksize=4096),
        "bitsandbytes int8 decode": lambda: peer.dequantize_blockwise(int8, int8_state),
        "bitsandbytes nf4 encode": lambda: peer.quantize_4bit(x, blocksize=64, quant_type="nf4"),
        "bitsandbytes nf4 decode": lambda: peer.dequantize_4bit(nf4, nf4_state),
    }


def _low_rank(size: int = 1024, rank: int = 16) -> dict[str, float]:
    """Time rank 16 of a 1024 x 1024 matrix by power iteration and by the full SVD, both on one thread."""
    values = torch.arange(1, size + 1).pow(-1.0)
    x = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(2)))[0] * values
    message, context = {"x": x}, CodecContext()
    codec = parse(f"low_rank(rank={rank}, method=power)")
    codec.encode(message, {}, context)

    def power() -> object:
        return codec.encode(message, {}, context)

    def full() -> object:
        with one_thread():
            return torch.linalg.svd(x, full_matrices=False)

    seconds: dict[str, list[float]] = {"power": [], "svd": []}
    for _ in range(5):
        for name, job in (("power", power), ("svd", full)):
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    optimum = float(values[rank:].square().sum().sqrt() / values.square().sum().sqrt())
    return {
        "power_s": statistics.median(seconds["power"]),
        "svd_s": statistics.median(seconds["svd"]),
        "error_over_optimum": measure(codec, message, context).error / optimum,
    }


def _ratios(speed: dict[str, float], low_rank: dict[str, float]) -> dict[str, dict[str, float]]:
    pairs = {
        "int8 encode": ("stage int8 encode", "bitsandbytes int8 encode", 2.0),
        "int8 decode": ("stage int8 decode", "bitsandbytes int8 decode", 1.0),
        "4-bit encode": ("stage int4 encode", "bitsandbytes nf4 encode", 4.0),
        "nf4 encode": ("stage nf4 encode", "bitsandbytes nf4 encode", 4.0),
        "rotation": ("stage rotation", "EDEN rotation", 4.0),
        "rotation and 1 bit": ("rotate | quantize(bits=1) encode", "EDEN 1 bits encode", 4.0),
        "rotation and 4 bits": ("rotate | quantize(bits=4) encode", "EDEN 4 bits encode", 4.0),
    }
    ratios = {
        name: {"ratio": speed[ours] / speed[peer], "target": target}
        for name, (ours, peer, target) in pairs.items()
        if peer in speed
    }
    ratios["power iteration"] = {"ratio": low_rank["svd_s"] / low_rank["power_s"], "target": 20.0}
    return ratios


def _row(text: str, speed: dict[str, float]) -> dict[str, float]:
    encode, decode = speed[f"{text} encode"], speed[f"{text} decode"]
    memcpy = speed["memcpy"]
    return {
        "encode_mb_s": encode,
        "decode_mb_s": decode,
        "encode_of_memcpy": encode / memcpy,
        "decode_of_memcpy": decode / memcpy,
        **_quality(text),
    }


def _quality(text: str) -> dict[str, float]:
    """Return bits a value and NMSE for a million values of N(0, 1)."""
    x = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(3))
    result = measure(parse(text), {"x": x}, CodecContext())
    return {"bits": result.bits, "nmse": result.error**2}
