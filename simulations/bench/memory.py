"""``fedllm bench memory``: what a step needs above the loaded model, and what batching directions gains.

Each sample is taken in a process of its own, so that no peak hides behind another's. Inference is the stock
``model(ids, labels=ids)`` under ``no_grad`` with the same attention. ``antithetic`` evaluates that same loss
twice; cases named ``chunked`` make logits for 64 tokens at a time, as
:func:`strategies.forward.slopes.batch_loss` does.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from fedllm.config import ModelConfig, RunConfig, TrainingConfig, TuningConfig
from fedllm.data.tokens import Batch
from fedllm.host.allocator import give_back_large_blocks
from fedllm.models import model as models
from fedllm.models.model import Model
from strategies.forward.directions import Direction
from strategies.forward.slopes import Loss, antithetic, batch_loss, jvp, settled

__all__ = ["CASES", "memory", "run", "throughput"]

CASES = (
    "inference",
    "antithetic",
    "chunked_inference",
    "chunked_antithetic",
    "chunked_jvp",
    "lean_backprop",
    "checkpointed_backprop",
    "backprop",
)
_KEEPS: Mapping[str, Literal["checkpoint", "lean"]] = {
    "checkpointed_backprop": "checkpoint",
    "lean_backprop": "lean",
}
_SPARING = ("antithetic", "chunked_inference", "chunked_antithetic")
"""As the methods do that probe by two evaluations, these give freed memory back."""
_BATCH = (4, 128)


def run() -> dict[str, object]:
    """Measure both; some minutes on two idle cores, the first time more: SmolLM2 is converted once."""
    return {"memory": memory(), "throughput": throughput()}


def memory(samples: int = 3) -> dict[str, dict[str, Any]]:
    """Measure every case, in turn so that a busy machine disturbs all alike.

    Returns:
        By case: ``peak_bytes`` above the loaded model (median, and all ``samples``), the same as a multiple
        of inference's (``of_inference``), and the medians of ``seconds`` and ``cpu_seconds``.
    """
    taken: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(samples):
        for case, found in taken.items():
            found.append(_in_a_process(case))
    peaks = {case: [sample["peak_bytes"] for sample in found] for case, found in taken.items()}
    unit = statistics.median(peaks["inference"])
    return {
        case: {
            "peak_bytes": statistics.median(peaks[case]),
            "of_inference": statistics.median(peaks[case]) / unit,
            "seconds": statistics.median(sample["seconds"] for sample in found),
            "cpu_seconds": statistics.median(sample["cpu_seconds"] for sample in found),
            "samples": peaks[case],
        }
        for case, found in taken.items()
    }


def _in_a_process(case: str) -> dict[str, float]:
    command = [sys.executable, "-m", "simulations.bench.memory", case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def throughput(directions: int = 8, repeats: int = 5) -> dict[str, dict[str, float]]:
    """Time ``directions`` slopes on MiniLM side by side and one after another; medians, taken in turn."""
    config = RunConfig(tuning=TuningConfig(targets=("query", "value")))
    model = models.load(config, ("a", "b", "c", "d", "e"))
    names = [Direction(0, 1, 0, i) for i in range(directions)]
    return {
        f"{texts}x{tokens}": _compare(model, texts, tokens, names, repeats)
        for texts, tokens in ((8, 64), (2, 32))
    }


def _compare(model: Model, texts: int, tokens: int, names: list[Direction], repeats: int) -> dict[str, float]:
    batch = _random_batch(model, texts, tokens, torch.arange(texts) % 5)
    loss, values = batch_loss(model, batch), _values(model)

    def seconds(parallel: int) -> float:
        started = time.perf_counter()
        jvp(loss, values, names, parallel=parallel)
        return time.perf_counter() - started

    with settled(model.module):
        seconds(len(names))  # warms up
        taken = [(seconds(1), seconds(len(names))) for _ in range(repeats)]
    one, side = (statistics.median(column) for column in zip(*taken, strict=True))
    return {"one_by_one_s": one, "batched_s": side, "speedup": one / side}


def measure(case: str, dtype: Literal["float32", "bfloat16"] = "float32") -> dict[str, float]:
    """Run one case in this process.

    Args:
        case: one of :data:`CASES`.
        dtype: of the frozen part.

    Returns:
        ``peak_bytes`` above the loaded model, ``model_bytes`` that its tensors take, ``seconds``, and
        ``cpu_seconds``, which a busy machine disturbs less.
    """
    model = models.load(
        RunConfig(
            model=ModelConfig(name="smollm2", task="causal", dtype=dtype),
            tuning=TuningConfig(targets=("q_proj", "v_proj")),
            training=TrainingConfig(memory=_KEEPS.get(case, "plain")),
        ),
        (),
    )
    texts, tokens = _BATCH
    small, full = (_random_batch(model, *shape, None) for shape in ((1, 2), (texts, tokens)))
    full.attention_mask[0, -1] = 0  # most batches have padding, and with it attention takes more
    if case in _SPARING:
        give_back_large_blocks()
    step = _STEPS[case]
    step(model, small)  # thread pools and lazily loaded code are not the step's own
    size = sum(p.numel() * p.element_size() for p in model.module.parameters())
    started, worked = time.perf_counter(), time.process_time()
    peak = _peak_above(lambda: step(model, full))
    return {
        "peak_bytes": float(peak),
        "model_bytes": float(size),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - worked,
    }


def _stock(model: Model, batch: Batch) -> Loss:
    """Return the model's own loss; it reads the trained tensors where they live."""
    stock: Any = model.module.backbone

    def loss(values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        value: torch.Tensor = stock(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
        return value

    return loss


def _inference(make: Callable[[Model, Batch], Loss], model: Model, batch: Batch) -> None:
    with settled(model.module):
        make(model, batch)(_values(model))


def _antithetic(make: Callable[[Model, Batch], Loss], model: Model, batch: Batch) -> None:
    with settled(model.module):
        antithetic(make(model, batch), _values(model), [Direction(0, 1, 0, 0)])


def _jvp(model: Model, batch: Batch) -> None:
    with settled(model.module):
        jvp(batch_loss(model, batch), _values(model), [Direction(0, 1, 0, 0)], parallel=1)


def _backprop(model: Model, batch: Batch) -> None:
    model.loss(batch).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped


_STEPS: Mapping[str, Callable[[Model, Batch], None]] = {
    "inference": partial(_inference, _stock),
    "antithetic": partial(_antithetic, _stock),
    "chunked_inference": partial(_inference, batch_loss),
    "chunked_antithetic": partial(_antithetic, batch_loss),
    "chunked_jvp": _jvp,
    "lean_backprop": _backprop,
    "checkpointed_backprop": _backprop,
    "backprop": _backprop,
}


def _values(model: Model) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.trainable().items()}


def _random_batch(model: Model, texts: int, tokens: int, labels: torch.Tensor | None) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(200, 20_000, (texts, tokens), generator=generator)
    return Batch(ids, torch.ones_like(ids), ids if labels is None else labels)


def _peak_above(step: Callable[[], None]) -> int:
    """Bytes by which resident memory rises while ``step`` runs; the kernel's own high-water mark.

    What the allocator holds of memory freed earlier goes back to the kernel first; the step would run in it
    unseen.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}; this benchmark needs Linux")


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))  # type: ignore[arg-type]  # CASE [DTYPE]
