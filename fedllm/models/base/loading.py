"""The base model and its tokenizer as their makers meant them, or one sentence that says what is wrong.

transformers fills what a checkpoint lacks with random numbers, makes up a tokenizer of five tokens where a
folder has none, and lets an encoder predict tokens that it has seen. Here its reports are read, and a few
tokens are sent through the model, before anything is trained on it.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from fedllm.config import RunConfig
from fedllm.data.bundled import MODELS, require_whole
from fedllm.errors import FedllmError, ModelError
from fedllm.host.accelerator import converts_bfloat16
from fedllm.models.base.converted import converted
from fedllm.models.base.quantisation import keep_layout, quantization
from fedllm.models.base.soundness import account, check_length, check_vocabulary, one_line, positions, try_out

__all__ = ["Base", "open_base", "open_shapes", "open_tokenizer", "quiet"]

_UNNAMED = re.compile(r"LABEL_\d+")
"""What transformers calls classes that nobody named."""

logger = logging.getLogger(__name__)


@dataclass
class Base:
    """A plain transformers model.

    Attributes:
        model: without an adapter.
        heads: modules that are trained and saved whole: its own classification head, empty without one.
        positions: tokens it can take; ``None`` where nothing bounds them.
        notes: what a reader of the run should know of how it was loaded.
    """

    model: Any
    positions: int | None
    heads: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Log something and keep it for the run's record."""
        logger.info(text)
        self.notes.append(text)


def open_tokenizer(source: str, config: RunConfig) -> Any:
    """Return the tokenizer of a model, with a padding token.

    Raises:
        ModelError: there is none, it knows no words, or it has nothing to pad with.
    """
    from transformers import AutoTokenizer

    require_whole(source, config.model.name)
    with _explained(config):
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    absent = Path(source).is_dir() and not any((Path(source) / name).exists() for name in files)
    if absent or tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise ModelError(
            f"model.name = {config.model.name!r} comes without a tokenizer, and a made-up one would know no "
            f"word: put its files ({', '.join(sorted(files))}) beside the weights"
        )
    if tokenizer.pad_token_id is None:
        _pad_with_end(tokenizer, config, "no padding token")
    return tokenizer


def open_base(
    source: str,
    config: RunConfig,
    labels: Sequence[str],
    pooling: str,
    tokenizer: Any,
    device: torch.device,
) -> Base:
    """Load a plain transformers model whose every weight comes from the checkpoint, but for a fresh head.

    Args:
        source: what ``from_pretrained`` takes.
        config: the run.
        labels: class names in the order of the logits.
        pooling: what a prediction is made from; see :class:`fedllm.models.network.Network`.
        tokenizer: from :func:`open_tokenizer`; a padding token that the model lacks is replaced.
        device: where a quantised model is put as it loads; others stay on the CPU.

    Raises:
        ModelError: the model cannot be read, lacks weights, does not fit the tokenizer or the task.
    """
    with _explained(config):
        kind, settings = _settings(source, config, pooling)
    named = dict(settings.id2label)
    notes = [note] if (note := _fit_padding(settings, tokenizer, config)) else []
    if pooling == "own":
        settings.num_labels = len(labels)
        settings.id2label = dict(enumerate(labels))
        settings.label2id = {label: index for index, label in enumerate(labels)}
    with _explained(config):
        model, report = _read(kind, source, settings, config, device)
    keep_layout(model)
    _fit(model, config)
    base = Base(model, positions(model), notes=notes)
    fresh = account(model, report, config, pooling)
    if pooling == "own":
        base.heads = _heads(model, fresh)
        _order_classes(base, fresh, named, labels, config)
    if (attention := model.config._attn_implementation) != "sdpa":
        base.note(
            f"{config.model.name}: transformers has no fused attention (sdpa) for {type(model).__name__}, "
            f"so attention is computed by {attention!r}, which takes more time and memory"
        )
    if model.dtype == torch.bfloat16 and converts_bfloat16(device):
        base.note(
            'model.dtype = "bfloat16": this processor computes it by converting every number, which takes '
            'several times as long as "float32" and half its memory'
        )
    check_vocabulary(model, tokenizer, config)
    check_length(base.positions, config)
    try_out(model, tokenizer, config, pooling)
    return base


def _read(
    kind: Any, source: str, settings: Any, config: RunConfig, device: torch.device
) -> tuple[Any, dict[str, Any]]:
    """Return a model and transformers' report of what its checkpoint held."""
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    asked: dict[str, Any] = {
        "config": settings,
        "dtype": _precision(config),
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
    }
    concrete = kind._model_mapping[type(settings)]  # which an Auto class tells by the source alone
    plain = config.model.quantize == "none" and isinstance(concrete, type)
    if plain and (weights := converted(source, _precision(config))) is not None:
        model, report = concrete.from_pretrained(None, state_dict=weights, **asked)
        if model.can_generate() and (Path(source) / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(source)
        return model, report
    model, report = kind.from_pretrained(source, **asked, **quantization(config, device))
    return model, report


def open_shapes(source: str, config: RunConfig, labels: Sequence[str], pooling: str) -> Base:
    """Return the model that :func:`open_base` would load, made from its configuration; no weights are read.

    Call it under ``torch.device("meta")``: it then takes no memory, and knows shapes alone.

    Raises:
        ModelError: there is no such model, it does not fit the task, or is to be quantised.
    """
    if config.model.quantize != "none":
        raise ModelError(
            f'model.quantize = "{config.model.quantize}" packs weights as they are read, which shapes alone '
            'do not show; take "none"'
        )
    with _explained(config):
        kind, settings = _settings(source, config, pooling)
        if pooling == "own":
            settings.num_labels = len(labels)
        model = kind.from_config(settings, dtype=_precision(config))
    _fit(model, config)
    return Base(model, positions(model), _heads(model, ()) if pooling == "own" else [])


def _precision(config: RunConfig) -> torch.dtype:
    """Return what weights are kept in as they are read; what is trained becomes float32 later."""
    found: torch.dtype = getattr(torch, "float32" if config.tuning.peft == "full" else config.model.dtype)
    return found


def _fit(model: Any, config: RunConfig) -> None:
    """Leave out what only pre-training needs, and set dropout."""
    if "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
        # The pooler feeds only the heads of pre-training; here it would be dead weight, sent every round.
        model.pooler = None
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = config.model.dropout


def _settings(source: str, config: RunConfig, pooling: str) -> tuple[Any, Any]:
    """Return the right one of transformers' Auto classes and the model's configuration."""
    import transformers

    kind: Any = transformers.AutoModel
    known: Any = transformers.MODEL_MAPPING
    if pooling == "causal":
        kind, known = transformers.AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    elif pooling == "seq2seq":
        kind = transformers.AutoModelForSeq2SeqLM
        known = transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    elif pooling == "own":
        kind = transformers.AutoModelForSequenceClassification
        known = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    settings: Any = transformers.AutoConfig.from_pretrained(source)
    name = f"model.name = {config.model.name!r}"
    if settings.get_text_config() is not settings:
        raise ModelError(
            f"{name} is {settings.model_type!r}, a model of text among other things "
            f"({', '.join(sorted(settings.sub_configs))}); take a checkpoint of the language model alone"
        )
    if type(settings) not in known:
        wanted = f'model.task = "{config.model.task}"' if pooling != "own" else 'model.pooling = "own"'
        raise ModelError(
            f"{name} is {settings.model_type!r}, of which transformers has no model for {wanted}"
        )
    masks = (
        type(settings) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    )  # encoders, of which some can be decoders
    if pooling == "causal" and masks and not (settings.is_encoder_decoder or settings.is_decoder):
        raise ModelError(
            f"{name} is {settings.model_type!r}, an encoder, which sees the tokens that it would have to "
            'predict: model.task = "causal" takes a decoder (in config.json: is_decoder)'
        )
    if settings.is_encoder_decoder and pooling not in ("own", "causal", "seq2seq"):
        raise ModelError(
            f'{name} is {settings.model_type!r}, an encoder with a decoder, and model.pooling = "{pooling}" '
            'pools an encoder: set model.pooling = "own"'
        )
    _set_dropout(settings, config.model.dropout)
    settings.use_cache = False
    return kind, settings


def _set_dropout(settings: Any, probability: float) -> None:
    """Set every dropout probability: some models read them in functions, where no module shows them."""
    for name, value in settings.to_dict().items():
        if isinstance(value, float) and ("drop" in name or name.endswith("pdrop")) and "layer" not in name:
            setattr(settings, name, probability)


def _fit_padding(settings: Any, tokenizer: Any, config: RunConfig) -> str | None:
    """See to a padding token that the embedding table has a row for; say so where it was another."""
    rows, note = getattr(settings, "vocab_size", None), None
    if rows is not None and tokenizer.pad_token_id >= rows:
        strange = f"the padding token {tokenizer.pad_token!r} beyond its {rows} embeddings"
        _pad_with_end(tokenizer, config, strange)
        note = f"{config.model.name}: {strange} is replaced by {tokenizer.pad_token!r}; padding is masked"
    if getattr(settings, "pad_token_id", None) is None:
        settings.pad_token_id = tokenizer.pad_token_id
    return note


def _pad_with_end(tokenizer: Any, config: RunConfig, why: str) -> None:
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.name = {config.model.name!r}: its tokenizer has {why}, and no end token")
    tokenizer.pad_token = tokenizer.eos_token


def _heads(model: Any, fresh: Iterable[str]) -> list[str]:
    """Return the modules around the base model, and a pooler in it that the checkpoint lacks."""
    base = model.base_model_prefix
    around = {
        name for name, part in model.named_children() if name != base and any(True for _ in part.parameters())
    }
    poolers = {name[: name.index(".pooler") + 7] for name in fresh if name.startswith(f"{base}.pooler")}
    return sorted(around | poolers)


def _order_classes(
    base: Base, fresh: set[str], named: dict[int, str], labels: Sequence[str], config: RunConfig
) -> None:
    """Bring the rows of a checkpoint's own head into the order of the data's classes."""
    layers = [
        (f"{head}.{name}".removesuffix("."), layer)
        for head in base.heads
        for name, layer in base.model.get_submodule(head).named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == len(labels)
    ]
    last, layer = layers[-1]
    theirs = [named[index] for index in sorted(named)]
    what = f"{config.model.name}: its own head"
    if f"{last}.weight" in fresh:
        if not all(map(_UNNAMED.fullmatch, theirs)):
            base.note(
                f"{what} knows {len(theirs)} classes ({', '.join(theirs)}), not these: it starts afresh"
            )
    elif all(map(_UNNAMED.fullmatch, theirs)):
        base.note(
            f"{what} does not name its classes: they are taken to be {', '.join(labels)}, in this order"
        )
    elif set(theirs) != set(labels):
        raise ModelError(
            f"model.name = {config.model.name!r}: its own head tells {', '.join(theirs)} apart, the data's "
            f'classes are {", ".join(labels)}: name them alike, or start a head with model.pooling = "mean"'
        )
    elif theirs != list(labels):
        order = [theirs.index(label) for label in labels]
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(parameter[order].clone())
        base.note(f"{what} is put into the order of the data's classes: {', '.join(labels)}")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' loading bars and reports, whose content is checked here; restore afterwards.

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


@contextmanager
def _explained(config: RunConfig) -> Iterator[None]:
    """Turn what transformers says of a model into one sentence; its readers raise whatever they meet."""
    name = config.model.name
    try:
        yield
    except FedllmError:
        raise
    except SafetensorError as error:
        raise ModelError(
            f"model.name = {name!r}: a file of weights is damaged or cut short ({error}); fetch it again"
        ) from error
    except Exception as error:
        wanted = (
            f"a bundled name ({', '.join(MODELS)}), a local transformers folder, a GGUF file or a hub name"
        )
        raise ModelError(
            f"model.name = {name!r} cannot be loaded for {config.model.task} (wanted is {wanted}): "
            f"{one_line(error)}"
        ) from error
