"""A base model with what is trained on top of it, and how that is read and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedllm import tasks
from fedllm.config import RunConfig
from fedllm.config.model import pruning
from fedllm.data.bundled import model_source
from fedllm.data.corpus import Corpus
from fedllm.data.partition import Indices
from fedllm.data.tokens import Batch, Tokens
from fedllm.errors import DataError, ModelError
from fedllm.host.accelerator import chosen_device
from fedllm.host.allocator import give_back_large_blocks
from fedllm.models.base.loading import Base, open_base, open_shapes, open_tokenizer, quiet
from fedllm.models.base.soundness import require_both_ways
from fedllm.models.compression.masks import prune
from fedllm.models.network import PEFT, Network, Output
from fedllm.models.vocabulary import Ending, ending_of, loss_in_parts, rows_at_once
from fedllm.randomness import derive
from fedllm.tasks.base import PerToken, Task
from fedllm.tensors import Tensors

__all__ = ["Model", "Network", "Output", "load", "mask_whole"]

_LOGITS = 1 << 25
"""Logits of a vocabulary that one pass makes where nothing is learnt from them: 128 MiB in float32."""


@dataclass(eq=False)
class Model:
    """A base model with what is trained on it.

    Attributes:
        module: callable as ``module(input_ids=, attention_mask=, labels=)``; see :class:`Network`.
        tokenizer: the base model's own.
        task: what it is asked to do.
        labels: class names, in the order of the logits.
        config: what the model was loaded from.
        notes: what a reader of the run should know of how the base model was loaded.
        embeddings: rows of its token embeddings; ``None`` where nobody asked.
        positions: tokens it can take behind those of an adapter; ``None`` where nothing bounds them.
        ending: where the loss is computed in parts, how logits are made of the output matrix's product.
    """

    module: Network
    tokenizer: Any
    task: Task
    labels: tuple[str, ...]
    config: RunConfig
    notes: tuple[str, ...] = ()
    embeddings: int | None = None
    positions: int | None = None
    ending: Ending | None = None

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.module.parameters()).device

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters themselves, sorted by name."""
        return dict(sorted((n, p) for n, p in self.module.named_parameters() if p.requires_grad))

    def read(self) -> Tensors:
        """Return the trained tensors' values: float32 copies on the CPU, sorted by name."""
        return {n: p.detach().to("cpu", torch.float32, copy=True) for n, p in self.trainable().items()}

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the trained tensors in place.

        Raises:
            ModelError: a name is missing or unknown, or a shape differs; nothing was changed then.
        """
        parameters = self.trainable()
        if odd := sorted(parameters.keys() ^ tensors.keys()):
            kind = "missing" if odd[0] in parameters else "unknown"
            raise ModelError(
                f"cannot write the trained tensors: {odd[0]} is {kind} ({len(odd)} names differ)"
            )
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape:
                given, wanted = tuple(tensors[name].shape), tuple(parameter.shape)
                raise ModelError(f"cannot write {name}: its shape is {wanted}, not {given}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    def tokenise(self, corpus: Corpus, max_length: int | None = None) -> Tokens:
        """Turn texts into tokens as the task does, at most ``data.max_length`` each.

        Raises:
            DataError: as there, or a text holds a special token for which the base model has no embedding.
        """
        found = self.task.encode(corpus, self.tokenizer, max_length or self.config.data.max_length)
        if self.embeddings is not None and found.flat.max(initial=0) >= self.embeddings:
            place = int(np.flatnonzero(found.flat >= self.embeddings)[0])
            row = int(np.searchsorted(found.starts, place, side="right")) - 1
            index = row if found.owners is None else int(found.owners[row])
            token = self.tokenizer.convert_ids_to_tokens(int(found.flat[place]))
            raise DataError(
                f"text {index} holds the token {token!r}, for which model.name = {self.config.model.name!r} "
                f"has no embedding: {corpus.texts[index][:60]!r}"
            )
        return found

    def batches(self, tokens: Tokens, most: int) -> Iterator[Indices]:
        """Yield the texts' numbers, shortest first, in batches for passes that make all of their logits.

        Texts of similar length share a batch, so that little is spent on padding. Logits of a vocabulary take
        no more than 128 MiB (with ``training.memory = "lean"`` 16), unless one text has more.

        Args:
            tokens: the texts.
            most: of them in a batch.
        """
        order = tokens.lengths.argsort(kind="stable")
        room = self._tokens_at_once()
        start = 0
        while start < len(order):
            widths = tokens.lengths[order[start : start + most]].astype(np.int64)
            fits = int((widths * np.arange(1, len(widths) + 1) <= room).sum())
            yield order[start : start + max(1, fits)]
            start += max(1, fits)

    def _tokens_at_once(self) -> int:
        if self.embeddings is None or not isinstance(self.task, PerToken):
            return 2**62
        return rows_at_once(self.embeddings) if self.ending is not None else _LOGITS // self.embeddings

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> Output:
        """Run one batch; ``loss`` is the task's."""
        here = batch.to(self.device)
        output: Output = self.module(
            **here.inputs(),
            labels=here.labels,
            output_hidden_states=hidden_states,
            output_attentions=attentions,
        )
        return output

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the task loss of one batch, 0-dim; see ``training.memory``."""
        if self.ending is not None:
            here = batch.to(self.device)
            return loss_in_parts(self.module, self.ending, here.labels, here.inputs())
        value = self.forward(batch).loss
        assert value is not None  # every batch carries labels
        return value


def load(config: RunConfig, labels: tuple[str, ...]) -> Model:
    """Load the base model and attach what is trained.

    The trained tensors are a function of ``config.model``, ``config.tuning`` and ``config.seed`` only, and
    the process's own random state is left as it was. The module comes in training mode.

    Under ``torch.device("meta")`` no weights are read: the model has shapes alone, which show what it takes.

    Args:
        config: the run.
        labels: class names in the order of the label numbers; none where the task has no classes.

    Raises:
        ModelError: the model cannot be found or read, or the adapter does not fit it.
    """
    if config.model.dtype == "auto":
        raise ModelError(
            'model.dtype = "auto" is settled by fedllm simulate and fedllm run as they start a run; here '
            'it has to be "float32" or "bfloat16"'
        )
    device = chosen_device()
    if config.training.memory == "lean" and torch.get_default_device().type != "meta":
        give_back_large_blocks()
    task = tasks.of(config)
    if task.classed and len(labels) < 2:
        have = ", ".join(labels) or "none"
        raise ModelError(f"{task.name} needs at least two classes; the data has {have}")
    with torch.random.fork_rng(), quiet():
        # A first-time conversion draws random numbers too, so the seed comes after it.
        source = model_source(config.model.name)
        torch.manual_seed(derive(config.seed, "model") % 2**63)
        tokenizer = open_tokenizer(source, config)
        shapes = torch.get_default_device().type == "meta"
        if shapes:
            base = open_shapes(source, config, task.classes(labels), task.pooling)
        else:
            base = open_base(source, config, task.classes(labels), task.pooling, tokenizer, device)
        if task.both_ways and not shapes:
            require_both_ways(base.model, config)
        # Before an adapter may wrap the table.
        vocabulary = base.model.get_input_embeddings().num_embeddings
        module = _network(base, config, task, task.outputs(labels))
        if config.tuning.start == "residual" and not shapes:
            _start_from_residual(module, config, source, tokenizer, labels)
    if config.model.prune != "none":
        mask_whole(module, config)
    if config.model.quantize == "none" and not shapes:  # bitsandbytes has placed its matrices already
        module.to(device)
    return Model(
        module.train(),
        tokenizer,
        task,
        labels,
        config,
        tuple(base.notes),
        vocabulary,
        _positions(base, module, config),
        _ending(module, config),
    )


def mask_whole(module: Network, config: RunConfig) -> None:
    """Mask what ``model.prune`` says, in a model that is tuned whole.

    Raises:
        ModelError: it is not, or has nothing to mask.
    """
    if config.tuning.peft != "full":
        raise ModelError(
            f'model.prune = "{config.model.prune}" masks weights that are trained, and tuning.peft = '
            f'"{config.tuning.peft}" trains others: take method = "fedavg", or a base that has zeros'
        )
    prune(module.backbone, pruning(config.model.prune), config.model.name)


def _start_from_residual(
    module: Network, config: RunConfig, source: str, tokenizer: Any, labels: tuple[str, ...]
) -> None:
    """Let LoRA begin as what quantising the base took away.

    Raises:
        ModelError: the base is not quantised, or the adapter is no LoRA.
    """
    tuning, packed = config.tuning, config.model.quantize
    if packed == "none" or tuning.peft not in ("lora", "rslora") or tuning.options.get("use_dora"):
        raise ModelError(
            'tuning.start = "residual" makes up for a quantised base by LoRA; here model.quantize = '
            f'"{packed}" and tuning.peft = "{tuning.peft}"'
        )
    from fedllm.models.compression.residual import start_from_residual

    plainly = config.model.model_copy(update={"quantize": "none", "dtype": "float32"})
    task, whole = tasks.of(config), config.model_copy(update={"model": plainly})
    base = open_base(source, whole, task.classes(labels), task.pooling, tokenizer, torch.device("cpu"))
    start_from_residual(module.backbone, base.model, config.seed)


def _ending(module: Network, config: RunConfig) -> Ending | None:
    """Return what it takes to compute a language model's loss in parts, where that is asked for."""
    if config.training.memory != "lean" or module.pooling not in ("causal", "seq2seq"):
        return None
    ending = ending_of(module) if isinstance(module.task, PerToken) else None
    if ending is None:
        raise ModelError(
            f'training.memory = "lean" makes logits in parts, and what {config.model.name} does behind its '
            f'output matrix for model.task = "{config.model.task}" is unknown; take "checkpoint"'
        )
    return ending


def _positions(base: Base, module: Network, config: RunConfig) -> int | None:
    """Return how many tokens of a text fit behind the virtual tokens of a prompt."""
    adapter = getattr(module.backbone, "active_peft_config", None)
    virtual = int(getattr(adapter, "num_virtual_tokens", None) or 0)
    if base.positions is None:
        return None
    if virtual and config.data.max_length + virtual > base.positions:
        raise ModelError(
            f"data.max_length = {config.data.max_length} and the {virtual} virtual tokens of "
            f"tuning.peft = {config.tuning.peft!r} exceed the {base.positions} tokens that "
            f"model.name = {config.model.name!r} can take"
        )
    return base.positions - virtual


def _network(opened: Base, config: RunConfig, task: Task, outputs: int) -> Network:
    base = backbone = opened.model
    if config.tuning.peft != "full":
        from fedllm.models.tuning.adapters import attach

        backbone = attach(backbone, config, PEFT.get(task.pooling, "FEATURE_EXTRACTION"), opened.heads)
    if config.training.recomputes:
        enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    ours = task.headed and task.pooling != "own"
    head = nn.Linear(int(base.config.hidden_size), outputs) if ours else None
    network = Network(backbone, task.pooling, head, task)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if getattr(getattr(backbone, "active_peft_config", None), "is_prompt_learning", False):
        _try_out(network, config)
    return network


def _try_out(network: Network, config: RunConfig) -> None:
    """Prompts and prefixes attach to any model, but not every model takes them: find out before the run."""
    token = torch.ones(1, 1, dtype=torch.int64)
    answer = {"answer_ids": token} if network.pooling == "seq2seq" else {}
    try:
        with torch.no_grad():
            network.eval()(input_ids=token, attention_mask=token, **answer)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise ModelError(
            f"tuning.peft = {config.tuning.peft!r} does not work on {config.model.name} "
            f"with model.pooling = {network.pooling!r}: {' '.join(str(error).split())[:300]}"
        ) from error
