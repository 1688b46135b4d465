"""A run's result in the formats of other runtimes, and whether it says there what it said in the run."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedllm.data.tokens import Tokens
from fedllm.errors import ConfigError, RunFailed
from fedllm.extras import require
from fedllm.models.anatomy import plain
from fedllm.models.base.loading import quiet
from fedllm.models.evaluation import evaluate
from fedllm.models.model import Model
from fedllm.models.network import Network, Output
from fedllm.models.readback import difference, read_back, scores, tolerance
from fedllm.models.saving import describe, save_merged, unbounded
from fedllm.runs.provenance.card import write_card
from fedllm.runs.reader import Run
from fedllm.tasks.base import Pooling
from simulations.results.options import Format, Which
from simulations.results.predict import Restored, answering, sentences
from strategies.session import open_session

__all__ = ["Comparison", "ship"]

_GRAPH = "model.onnx"
_INPUTS = ("input_ids", "attention_mask")
_ROWS, _LENGTH = 2, 8
"""Of the example that a graph is traced with; neither is a size it is bound to."""


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


def ship(
    folder: Path, out: Path, form: Format, round: Which = None, *, check: bool = False
) -> tuple[Path, Comparison | None]:
    """Write a run's result in a format of others; return where, and how it compares where that is asked for.

    Args:
        folder: of the run.
        out: a new folder.
        form: which format; what differs by more than the order of summation, unless it was quantised, is
            not left behind.
        round: as for :func:`simulations.results.predict.restore`.
        check: load what was written in its own runtime and score it on the run's test set.

    Raises:
        ConfigError: the format does not fit the model, or needs a package that is not installed.
        RunFailed: what was written is not the run's model.
        StoreError: as :func:`simulations.results.predict.restore`.
    """
    if form != "merged":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package, f"--format {form}")
    found = answering(folder, round)
    network = _merged(found, form)
    place = out / ("model" if form == "merged" else "onnx")
    if place.exists():
        raise ConfigError(f"{place} exists already; choose a folder that holds none")
    place.mkdir(parents=True)
    try:
        shipped: Network
        if form == "merged":
            save_merged(found.model, network, place)
            shipped = read_back(place, found.model)
        else:
            _write_graph(found.model, network, place, quantised=form == "int8")
            shipped = _Session(place / _GRAPH, found.model.module.pooling)
        shipped.task = found.model.task
        off = _difference(found.model, shipped)
        if form != "int8" and not off <= tolerance(found.model):
            raise RunFailed(
                f"{place} would not be the run's model: its scores are {off:.1%} off; export the run "
                "without --format"
            )
        compared = _compared(found, shipped, place, off) if check else None
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
    if form != "merged" and found.model.module.pooling == "seq2seq":
        raise ConfigError(
            f"--format {form} writes one graph, and an encoder-decoder is two: take --format merged"
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


class _Graph(nn.Module):
    """A network as a function of two arrays, as graphs have them."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        plain(network.backbone).config.use_cache = False

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(input_ids, attention_mask).logits
        return logits


def _write_graph(model: Model, network: Network, place: Path, *, quantised: bool) -> None:
    """Write ``model.onnx``, int64 ids and mask of any size to float32 logits, and the tokenizer beside it."""
    example = (
        torch.full((_ROWS, _LENGTH), int(model.tokenizer.pad_token_id or 0)),
        torch.ones(_ROWS, _LENGTH, dtype=torch.int64),
    )
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with _silence():
        torch.onnx.export(
            _Graph(network).eval(),
            example,
            place / _GRAPH,
            input_names=list(_INPUTS),
            output_names=["logits"],
            dynamic_shapes=(free, free),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        if quantised:
            from onnxruntime.quantization import quantize_dynamic

            # Seven bits of weights: processors without VNNI add products of eight in 16 bits, which overflow.
            quantize_dynamic(place / _GRAPH, place / _GRAPH, per_channel=True, reduce_range=True)
    unbounded(model.tokenizer).save_pretrained(place)
    describe(model, place, None, runtime="onnxruntime")


@contextmanager
def _silence() -> Iterator[None]:
    """Keep exporters from telling what they miss, of which nothing is needed here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Session(Network):
    """A graph in ONNX Runtime, in a network's place; one thread, as torch is set to."""

    def __init__(self, path: Path, pooling: Pooling) -> None:
        import onnxruntime

        super().__init__(nn.ParameterList([torch.zeros(())]), pooling)  # one, to say where it computes
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **extra: torch.Tensor,
    ) -> Output:
        """Answer as :class:`Network` does; a graph has no hidden states."""
        arrays = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        logits = torch.from_numpy(self._session.run(["logits"], arrays)[0])
        loss = None if labels is None or self.task is None else self.task.loss(logits, labels, extra)
        return Output(loss, logits)


def _difference(model: Model, shipped: Network) -> float:
    """Return how far off the logits of a few texts are, relative to their norm."""
    batch = sentences(model)
    ours = scores(model.module, batch, model.device)
    theirs = scores(shipped, batch, torch.device("cpu"))
    return difference(ours, theirs)


def _compared(found: Restored, shipped: Network, place: Path, off: float) -> Comparison:
    """Score the run's test set with both."""
    config = found.model.config
    test = open_session(config.to_json()).test_tokens
    silent = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"generate": 0})})
    run_scores, run_seconds = _timed(replace(found.model, config=silent), test)
    own_scores, seconds = _timed(replace(found.model, config=silent, module=shipped), test)
    metric = config.metric if config.metric in own_scores else "loss"
    weights = [*place.glob("*.safetensors"), *place.glob(_GRAPH)]
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
