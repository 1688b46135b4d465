"""One graph for ONNX Runtime: written, quantised, opened again."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from fedllm.models.anatomy import plain
from fedllm.models.base.loading import quiet
from fedllm.models.model import Model
from fedllm.models.network import Network, Output
from fedllm.models.saving import describe, unbounded

__all__ = ["GRAPH", "Session", "write", "write_eight_bits", "write_four_bits"]

GRAPH = "model.onnx"
_INPUTS = ("input_ids", "attention_mask")
_ROWS, _LENGTH = 2, 8
"""Of the example that a graph is traced with; neither is a size it is bound to."""
_BLOCK = 32
"""Weights that share a scale in four bits."""


class _Graph(nn.Module):
    """A network as a function of two arrays, as graphs have them."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        plain(network.backbone).config.use_cache = False

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(input_ids, attention_mask).logits
        return logits


def write(model: Model, network: Network, place: Path) -> None:
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
            place / GRAPH,
            input_names=list(_INPUTS),
            output_names=["logits"],
            dynamic_shapes=(free, free),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    unbounded(model.tokenizer).save_pretrained(place)
    describe(model, place, None, runtime="onnxruntime")


def write_eight_bits(model: Model, network: Network, place: Path) -> None:
    """Write the graph with weights and products in eight bits, scales of the inputs found as they come."""
    from onnxruntime.quantization import quantize_dynamic

    write(model, network, place)
    with _silence():
        # Seven bits of weights: processors without VNNI add products of eight in 16 bits, which overflow.
        quantize_dynamic(place / GRAPH, place / GRAPH, per_channel=True, reduce_range=True)


def write_four_bits(model: Model, network: Network, place: Path) -> None:
    """Write the graph with weights, the embeddings' too, in four bits, 32 to a scale; products in float32."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    _untie(network)
    write(model, network, place)
    with _silence():
        packing = MatMulNBitsQuantizer(
            str(place / GRAPH),
            bits=4,
            block_size=_BLOCK,
            is_symmetric=True,
            op_types_to_quantize=("MatMul", "Gather"),
        )
        packing.process()
        packing.model.save_model_to_file(str(place / GRAPH), False)


def _untie(network: Network) -> None:
    """Give the output matrix values of its own: shared ones are packed for the embeddings alone."""
    backbone = plain(network.backbone)
    last = backbone.get_output_embeddings()
    if last is not None and last.weight is backbone.get_input_embeddings().weight:
        last.weight = nn.Parameter(last.weight.detach().clone())


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


class Session(Network):
    """A graph in ONNX Runtime, in a network's place; one thread, as torch is set to."""

    def __init__(self, place: Path, model: Model) -> None:
        import onnxruntime

        # One parameter, to say where it computes.
        super().__init__(nn.ParameterList([torch.zeros(())]), model.module.pooling)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(
            place / GRAPH, options, providers=["CPUExecutionProvider"]
        )

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
