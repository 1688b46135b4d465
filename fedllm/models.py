"""Base models, what is trained on top of them, and how it is read, written, evaluated and saved."""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from fedllm import small_adapters
from fedllm.bundled import MODELS, model_source
from fedllm.config import RunConfig
from fedllm.data import Batch, Tokens
from fedllm.errors import ModelError
from fedllm.network import Network, Output
from fedllm.randomness import derive
from fedllm.tensors import Tensors

__all__ = ["Around", "Model", "Network", "Output", "evaluate", "load", "save"]

Around = Callable[[np.ndarray], AbstractContextManager[None]]
"""Opens something around the pass of a batch, given which of the texts are in it."""


@dataclass(eq=False)
class Model:
    """A base model with what is trained on it.

    Attributes:
        module: callable as ``module(input_ids=, attention_mask=, labels=)``; see :class:`Network`.
        tokenizer: the base model's own.
        task: ``classification`` or ``causal``.
        labels: class names, in the order of the logits.
        config: what the model was loaded from.
    """

    module: Network
    tokenizer: Any
    task: str
    labels: tuple[str, ...]
    config: RunConfig

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

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> Output:
        """Run one batch; ``loss`` is the mean over texts, or over predicted tokens of a causal model."""
        ids, mask, labels = (tensor.to(self.device) for tensor in batch)
        output: Output = self.module(
            input_ids=ids,
            attention_mask=mask,
            labels=labels,
            output_hidden_states=hidden_states,
            output_attentions=attentions,
        )
        return output

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the task loss of one batch, 0-dim."""
        value = self.forward(batch).loss
        assert value is not None  # every batch carries labels
        return value


def load(config: RunConfig, labels: tuple[str, ...]) -> Model:
    """Load the base model and attach what is trained.

    The trained tensors are a function of ``config.model``, ``config.tuning`` and ``config.seed`` only, and
    the process's own random state is left as it was. The module comes in training mode.

    Args:
        config: the run.
        labels: class names in the order of the label numbers; ignored by causal models.

    Raises:
        ModelError: the model cannot be found or read, or the adapter does not fit it.
    """
    if config.model.task == "classification" and len(labels) < 2:
        have = ", ".join(labels) or "none"
        raise ModelError(f"classification needs at least two classes; the data has {have}")
    with torch.random.fork_rng(), _quiet():
        # A first-time conversion draws random numbers too, so the seed comes after it.
        source = model_source(config.model.name)
        torch.manual_seed(derive(config.seed, "model") % 2**63)
        tokenizer = _tokenizer(source, config)
        module = _network(source, config, labels, tokenizer)
    if config.model.quantize == "none":  # bitsandbytes has placed its matrices already
        module.to(_device())
    return Model(module.train(), tokenizer, config.model.task, labels, config)


def evaluate(
    model: Model, tokens: Tokens, batch_size: int, around: Around = lambda indices: nullcontext()
) -> dict[str, float]:
    """Score the model without dropout: ``loss``, and ``accuracy`` or (causal) ``perplexity``.

    The loss is the mean over all texts, or over all predicted tokens; it does not depend on ``batch_size``
    beyond rounding. Texts of similar length share a batch, so that little is spent on padding.

    Args:
        model: as it stands.
        tokens: the texts.
        batch_size: texts at a time.
        around: opened around each batch's pass with the batch's indices, as
            :meth:`fedllm.activation_cache.Shelf.around`, which spares the frozen layers.
    """
    if not len(tokens):
        raise ModelError("there is no text to evaluate on")
    order = tokens.lengths.argsort(kind="stable")
    training = model.module.training
    model.module.eval()
    loss, correct, count = 0.0, 0, 0
    try:
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                indices = order[start : start + batch_size]
                batch = tokens.batch(indices)
                with around(indices):
                    output = model.forward(batch)
                assert output.loss is not None
                causal = model.task == "causal"
                weight = int((batch.labels[:, 1:] != -100).sum()) if causal else len(batch.labels)
                loss += float(output.loss) * weight
                count += weight
                if not causal:
                    correct += int((output.logits.argmax(-1).cpu() == batch.labels).sum())
    finally:
        model.module.train(training)
    loss /= max(count, 1)
    if model.task == "causal":
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    return {"loss": loss, "accuracy": correct / count}


def save(model: Model, folder: Path) -> Path:
    """Write the result under ``folder`` and return where: ``adapter/``, or ``model/`` for a full model.

    ``adapter/`` loads with ``peft.PeftModel.from_pretrained(base, folder / "adapter")``, or with
    :func:`fedllm.small_adapters.load` where it is one of ours; ``model/`` with transformers'
    ``from_pretrained``. A linear head of ours stands beside either as ``head.safetensors``; ``fedllm.json``
    says how to pool for it.
    """
    backbone: Any = model.module.backbone
    adapter = model.config.tuning.peft != "full"
    place = Path(folder) / ("adapter" if adapter else "model")
    place.mkdir(parents=True, exist_ok=True)
    with _quiet():
        if hasattr(backbone, "small_adapter"):
            small_adapters.save(backbone, place)
        elif adapter:
            backbone.save_pretrained(str(place), save_embedding_layers=False)
        else:
            backbone.save_pretrained(place)
            model.tokenizer.save_pretrained(place)
    description = {
        "base": model.config.model.name,
        "task": model.task,
        "pooling": model.module.pooling,
        "labels": list(model.labels),
        "max_length": model.config.data.max_length,
    }
    if model.module.head is not None:
        description["head"] = "logits = head(v / |v| * sqrt(width)), v pooled from the last hidden states"
        head = {name: p.detach().cpu().contiguous() for name, p in model.module.head.named_parameters()}
        save_file(head, place / "head.safetensors")
    (place / "fedllm.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return place


def _network(source: str, config: RunConfig, labels: tuple[str, ...], tokenizer: Any) -> Network:
    pooling: Any = "causal" if config.model.task == "causal" else config.model.pooling
    backbone, heads = _base(source, config, labels, pooling, tokenizer)
    base = backbone
    if config.tuning.peft != "full":
        from fedllm.adapters import attach

        tasks = {"causal": "CAUSAL_LM", "own": "SEQ_CLS"}
        backbone = attach(backbone, config, tasks.get(pooling, "FEATURE_EXTRACTION"), heads)
    if config.training.gradient_checkpointing:
        enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    head = nn.Linear(int(base.config.hidden_size), len(labels)) if pooling in ("mean", "cls") else None
    network = Network(backbone, pooling, head)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if getattr(getattr(backbone, "active_peft_config", None), "is_prompt_learning", False):
        _try_out(network, config)
    return network


def _try_out(network: Network, config: RunConfig) -> None:
    """Prompts and prefixes attach to any model, but not every model takes them: find out before the run."""
    token = torch.ones(1, 1, dtype=torch.int64)
    try:
        with torch.no_grad():
            network.eval()(input_ids=token, attention_mask=token)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise ModelError(
            f"tuning.peft = {config.tuning.peft!r} does not work on {config.model.name} "
            f"with model.pooling = {network.pooling!r}: {' '.join(str(error).split())[:300]}"
        ) from error


def _check_length(settings: Any, config: RunConfig) -> None:
    longest = getattr(settings, "max_position_embeddings", None)
    if longest is not None and config.data.max_length > longest:
        raise ModelError(
            f"data.max_length = {config.data.max_length} exceeds the {longest} tokens "
            f"that model.name = {config.model.name!r} can take"
        )


def _base(
    source: str, config: RunConfig, labels: tuple[str, ...], pooling: str, tokenizer: Any
) -> tuple[Any, list[str]]:
    """Return the plain transformers model and the modules of it that no checkpoint filled."""
    import transformers

    kind: Any = {
        "causal": transformers.AutoModelForCausalLM,
        "own": transformers.AutoModelForSequenceClassification,
    }.get(pooling, transformers.AutoModel)
    with _explained(config):
        settings = transformers.AutoConfig.from_pretrained(source)
        _check_length(settings, config)
        _set_dropout(settings, config.model.dropout)
        settings.use_cache = False
        if settings.pad_token_id is None:
            settings.pad_token_id = tokenizer.pad_token_id
        if pooling == "own":
            settings.num_labels = len(labels)
            settings.id2label = dict(enumerate(labels))
            settings.label2id = {label: index for index, label in enumerate(labels)}
        full = config.tuning.peft == "full"
        model, report = kind.from_pretrained(
            source,
            config=settings,
            dtype=torch.float32 if full else getattr(torch, config.model.dtype),
            attn_implementation="sdpa",
            ignore_mismatched_sizes=pooling == "own",
            output_loading_info=True,
            **_quantization(config),
        )
    if "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
        # The pooler feeds only the heads of pre-training; here it would be dead weight, sent every round.
        model.pooler = None
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = config.model.dropout
    fresh = [*report["missing_keys"], *(item[0] for item in report["mismatched_keys"])]
    return model, sorted({name.rpartition(".")[0] for name in fresh}) if pooling == "own" else []


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _quantization(config: RunConfig) -> dict[str, Any]:
    """Return what makes ``from_pretrained`` quantise the base as it loads (Dettmers et al., NeurIPS 2023)."""
    if config.model.quantize == "none":
        return {}
    if config.tuning.peft == "full":
        raise ModelError(
            f'model.quantize = "{config.model.quantize}" freezes the base, which is to be trained'
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f'model.quantize = "{config.model.quantize}" needs bitsandbytes, which is not installed: '
            "pip install fedllm[quantize], or set model.quantize to none"
        )
    from transformers import BitsAndBytesConfig

    four = config.model.quantize == "nf4"
    settings = BitsAndBytesConfig(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        load_in_4bit=four,
        load_in_8bit=not four,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, config.model.dtype),
    )
    return {"quantization_config": settings, "device_map": {"": _device()}}


def _set_dropout(settings: Any, probability: float) -> None:
    """Set every dropout probability: some models read them in functions, where no module shows them."""
    for name, value in settings.to_dict().items():
        if isinstance(value, float) and ("drop" in name or name.endswith("pdrop")) and "layer" not in name:
            setattr(settings, name, probability)


def _tokenizer(source: str, config: RunConfig) -> Any:
    from transformers import AutoTokenizer

    with _explained(config):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            name = config.model.name
            raise ModelError(f"model.name = {name!r}: its tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def _explained(config: RunConfig) -> Iterator[None]:
    name = config.model.name
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"model.name = {name!r} cannot be loaded for {config.model.task} (wanted is a bundled name "
            f"({', '.join(MODELS)}), a local transformers folder, a GGUF file or a hub name): {reason[:300]}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the loading bars and reports, whose content we check ourselves; restore afterwards.

    So are bitsandbytes' hints at kernels that it could download.
    """
    from transformers.utils import logging as chatter_of_transformers

    chatter: Any = chatter_of_transformers
    hints = logging.getLogger("bitsandbytes")
    hinted = hints.level
    hints.setLevel(logging.ERROR)
    level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity(chatter.CRITICAL)
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        hints.setLevel(hinted)
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()
