"""``fedllm bench memory``: what a step needs above the loaded model, and what batching directions gains.

Each estimator runs in a process of its own, so that no peak hides behind another's. Inference is the stock
``model(ids, labels=ids)`` under ``no_grad`` with the same attention.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fedllm import models
from fedllm.config import ModelConfig, RunConfig, TrainingConfig, TuningConfig
from fedllm.data import Batch
from fedllm.directions import Direction
from fedllm.forward import antithetic, batch_loss, jvp, settled
from fedllm.models import Model

__all__ = ["CASES", "memory", "run", "throughput"]

CASES = ("inference", "chunked_inference", "antithetic", "jvp", "backprop", "checkpointed_backprop")
_BATCH = (4, 128)


def run() -> dict[str, object]:
    """Measure both; about two minutes on two idle cores, the first time more: SmolLM2 is converted once."""
    return {"memory": memory(), "throughput": throughput()}


def memory() -> dict[str, dict[str, float]]:
    """Return each case's peak above the loaded model in bytes, and as a multiple of inference."""
    found: dict[str, float] = {}
    for case in CASES:
        command = [sys.executable, "-m", "simulations.bench.memory", case]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
        found[case] = float(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])
    return {
        case: {"peak_bytes": peak, "of_inference": peak / found["inference"]} for case, peak in found.items()
    }


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


def measure(case: str) -> dict[str, float]:
    """Run one case in this process and return its peak above the loaded model."""
    checkpointed = case == "checkpointed_backprop"
    model = models.load(
        RunConfig(
            model=ModelConfig(name="smollm2", task="causal"),
            tuning=TuningConfig(targets=("q_proj", "v_proj")),
            training=TrainingConfig(gradient_checkpointing=checkpointed),
        ),
        (),
    )
    texts, tokens = _BATCH
    small, full = (_random_batch(model, *shape, None) for shape in ((1, 2), (texts, tokens)))
    step = _STEPS[case]
    step(model, small)  # thread pools and lazily loaded code are not the step's own
    return {"peak_bytes": float(_peak_above(lambda: step(model, full)))}


def _inference(model: Model, batch: Batch) -> None:
    stock: Any = model.module.backbone
    with settled(model.module):
        stock(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)


def _chunked_inference(model: Model, batch: Batch) -> None:
    with settled(model.module):
        batch_loss(model, batch)(_values(model))


def _antithetic(model: Model, batch: Batch) -> None:
    with settled(model.module):
        antithetic(batch_loss(model, batch), _values(model), [Direction(0, 1, 0, 0)])


def _jvp(model: Model, batch: Batch) -> None:
    with settled(model.module):
        jvp(batch_loss(model, batch), _values(model), [Direction(0, 1, 0, 0)], parallel=1)


def _backprop(model: Model, batch: Batch) -> None:
    loss = model.loss(batch)
    assert loss is not None
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped


_STEPS: Mapping[str, Callable[[Model, Batch], None]] = {
    "inference": _inference,
    "chunked_inference": _chunked_inference,
    "antithetic": _antithetic,
    "jvp": _jvp,
    "backprop": _backprop,
    "checkpointed_backprop": _backprop,
}


def _values(model: Model) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.trainable().items()}


def _random_batch(model: Model, texts: int, tokens: int, labels: torch.Tensor | None) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(200, 20_000, (texts, tokens), generator=generator)
    return Batch(ids, torch.ones_like(ids), ids if labels is None else labels)


def _peak_above(step: Callable[[], None]) -> int:
    """Bytes by which resident memory rises while ``step`` runs; the kernel's own high-water mark."""
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
    print(json.dumps(measure(sys.argv[1])))
