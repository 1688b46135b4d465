"""A run's result in the formats of other runtimes, and whether it says there what it said in the run."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedllm.data.tokens import Tokens
from fedllm.errors import ConfigError, RunFailed
from fedllm.extras import require
from fedllm.models.base.loading import quiet
from fedllm.models.evaluation import evaluate
from fedllm.models.model import Model
from fedllm.models.network import Network
from fedllm.models.readback import difference, read_back, scores, tolerance
from fedllm.models.saving import save_merged
from fedllm.runs.provenance.card import write_card
from fedllm.runs.reader import Run
from simulations.results.options import Format, Which
from simulations.results.predict import Restored, answering, segmented, sentences
from simulations.results.shipping import gguf_files, graphs, llama
from strategies.session import open_session

__all__ = ["Comparison", "ship"]


@dataclass(frozen=True)
class Comparison:
    """A result beside the run's own model, on the run's test set.

    Attributes:
        metric: what ``score`` is.
        score: of what was written, in its own runtime.
        run_score: of the run's own model, in torch.
        difference: of the logits of a batch, relative to their norm.
        megabytes: of the weights' file or files.
        seconds: a text, evaluating the test set.
        run_seconds: the same for the run's own model.
    """

    metric: str
    score: float
    run_score: float
    difference: float
    megabytes: float
    seconds: float
    run_seconds: float


@dataclass(frozen=True)
class _Form:
    """How a network is written in a format, and opened again in the format's own runtime.

    Attributes:
        folder: what it is written into, beside whatever else the run left.
        weights: the files that hold them.
        needs: packages.
        write: from a network on the CPU without adapters.
        open: what was written.
        close: how far its logits may be off, relative to their norm, where the run's own precision explains
            less; ``None`` where weights were quantised, which has no bound.
        require: refuses a model that the format does not hold.
    """

    folder: str
    weights: str
    needs: tuple[str, ...]
    write: Callable[[Model, Network, Path], object]
    open: Callable[[Path, Model], Network]
    close: float | None
    require: Callable[[Model, str], None]


def _require_one_graph(model: Model, form: str) -> None:
    if model.module.pooling == "seq2seq":
        raise ConfigError(
            f"--format {form} writes one graph, and an encoder-decoder is two: take --format merged"
        )
    if segmented(model):
        raise ConfigError(
            f"--format {form} writes a graph of tokens and their mask, and this model is also told which of "
            "two texts a token is in: take --format merged"
        )


_HALF = 1e-2
"""What float16 explains: of weights, and of what llama.cpp multiplies them with."""


def _graph(write: Callable[[Model, Network, Path], None], close: float | None) -> _Form:
    packages = ("onnx", "onnxscript", "onnxruntime")
    return _Form("onnx", graphs.GRAPH, packages, write, graphs.Session, close, _require_one_graph)


def _gguf(write: Callable[[Model, Network, Path], None], close: float | None) -> _Form:
    packages = ("gguf", "cyllama")
    return _Form("gguf", gguf_files.FILE, packages, write, llama.Llama, close, gguf_files.require_llama)


_FORMS: dict[Format, _Form] = {
    "merged": _Form("model", "*.safetensors", (), save_merged, read_back, 0.0, lambda model, form: None),
    "onnx": _graph(graphs.write, 0.0),
    "int8": _graph(graphs.write_eight_bits, None),
    "int4": _graph(graphs.write_four_bits, None),
    "gguf": _gguf(gguf_files.write, _HALF),
    "gguf-q8_0": _gguf(gguf_files.write_eight_bits, None),
    "gguf-q4_k": _gguf(gguf_files.write_four_bits, None),
}


def ship(
    folder: Path, out: Path, form: Format, round: Which = None, *, check: bool = False
) -> tuple[Path, Comparison | None]:
    """Write a run's result in a format of others; return where, and how it compares where that is asked for.

    Args:
        folder: of the run.
        out: a new folder.
        form: which format; what differs by more than rounding, unless it was quantised, is not left behind.
        round: as for :func:`simulations.results.predict.restore`.
        check: load what was written in its own runtime and score it on the run's test set.

    Raises:
        ConfigError: the format does not fit the model, or needs a package that is not installed.
        RunFailed: what was written is not the run's model.
        StoreError: as :func:`simulations.results.predict.restore`.
    """
    kind = _FORMS[form]
    for package in kind.needs:
        require(package, f"--format {form}")
    found = answering(folder, round)
    kind.require(found.model, form)
    network = _merged(found, form)
    place = out / kind.folder
    if place.exists():
        raise ConfigError(f"{place} exists already; choose a folder that holds none")
    place.mkdir(parents=True)
    try:
        kind.write(found.model, network, place)
        shipped = kind.open(place, found.model)
        shipped.task = found.model.task
        off = _difference(found.model, shipped)
        if kind.close is not None and not off <= max(tolerance(found.model), kind.close):
            raise RunFailed(
                f"{place} would not be the run's model: its scores are {off:.1%} off; export the run "
                "without --format"
            )
        compared = _compared(found, shipped, place.glob(kind.weights), off) if check else None
    except BaseException:
        shutil.rmtree(place)
        with suppress(OSError):  # what else lies there is not ours
            out.rmdir()
        raise
    write_card(Run(folder), place, found.round)
    return place, compared


def _merged(found: Restored, form: Format) -> Network:
    """Return the run's model as plain libraries load it, on the CPU, its adapter in the base's weights."""
    config = found.model.config
    if config.model.quantize != "none":
        raise ConfigError(
            f"--format {form} needs a base that is not quantised, and the run's has model.quantize = "
            f'"{config.model.quantize}", into which an adapter cannot be merged: export without --format'
        )
    with tempfile.TemporaryDirectory() as place, quiet():
        saved = found.method.save(found.model, found.tensors, Path(place))
        network = read_back(saved, found.model)
    backbone: Any = network.backbone
    if saved.name.startswith("adapter"):
        try:
            network.backbone = backbone.merge_and_unload(safe_merge=True)
        except (AttributeError, NotImplementedError, ValueError) as error:
            raise ConfigError(
                f'--format {form} merges the adapter into the base, and tuning.peft = "{config.tuning.peft}" '
                "is none that a base's weights can hold: export without --format"
            ) from error
    return network.to("cpu").eval() if form == "merged" else network.to("cpu", torch.float32).eval()


def _difference(model: Model, shipped: Network) -> float:
    """Return how far off the logits of a few texts are, relative to their norm."""
    batch = sentences(model)
    ours = scores(model.module, batch, model.device)
    theirs = scores(shipped, batch, torch.device("cpu"))
    return difference(ours, theirs)


def _compared(found: Restored, shipped: Network, weights: Iterable[Path], off: float) -> Comparison:
    """Score the run's test set with both."""
    config = found.model.config
    test = open_session(config.to_json()).test_tokens
    silent = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"generate": 0})})
    run_scores, run_seconds = _timed(replace(found.model, config=silent), test)
    own_scores, seconds = _timed(replace(found.model, config=silent, module=shipped), test)
    metric = config.metric if config.metric in own_scores else "loss"
    return Comparison(
        metric=metric,
        score=own_scores[metric],
        run_score=run_scores[metric],
        difference=off,
        megabytes=sum(path.stat().st_size for path in weights) / 1e6,
        seconds=seconds,
        run_seconds=run_seconds,
    )


def _timed(model: Model, test: Tokens) -> tuple[dict[str, float], float]:
    """Return scores, and seconds a text."""
    began = time.perf_counter()
    found = evaluate(model, test, model.config.evaluation.batch_size)
    return found, (time.perf_counter() - began) / len(test)
