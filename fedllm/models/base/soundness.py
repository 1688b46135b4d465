"""Whether a base model is what its checkpoint, its tokenizer and its task say: read off it before training.

transformers reports what a checkpoint lacks and goes on with random numbers; the report is read here. What no
report tells, a few tokens show that are sent through the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedllm.config import RunConfig
from fedllm.errors import ModelError

__all__ = [
    "account",
    "check_length",
    "check_vocabulary",
    "one_line",
    "positions",
    "require_both_ways",
    "try_out",
]

_NEVER_TRAINED = {
    "position_ids",
    "token_type_ids",
    "inv_freq",
    "masked_bias",
    "causal_mask",
    "embed_positions",
}
"""Buffers that older releases of transformers stored among the weights and newer ones compute."""


def account(model: Any, report: Any, config: RunConfig, pooling: str) -> set[str]:
    """Return the weights of a fresh head; refuse anything else that model and checkpoint do not share.

    A checkpoint may hold heads that are not wanted here. Of the base model it must hold every weight, and
    none that the model has no place for: layers that the configuration does not count, for one.
    """
    inner = model.base_model
    prefix = "" if inner is model else f"{model.base_model_prefix}."
    parts = {name.partition(".")[0] for name in inner.state_dict()}

    def replaceable(name: str) -> bool:
        pooler = "pooler" in name.split(".")
        return pooler if pooling != "own" else pooler or not name.startswith(prefix)

    def wanted(name: str) -> bool:
        own = name.removeprefix(prefix).partition(".")[0] in parts
        return own and name.rpartition(".")[2] not in _NEVER_TRAINED and "pooler" not in name.split(".")

    missing = set(report["missing_keys"])
    reshaped = {item[0]: item[1:] for item in report["mismatched_keys"]}
    faults = []
    if lost := sorted(name for name in missing if not replaceable(name)):
        ending = "." + lost[0].removeprefix(prefix)
        there = sorted(name for name in report["unexpected_keys"] if name.endswith(ending))
        faults.append(f"lacks {_some(lost)}" + (f" (there is a {there[0]})" if there else ""))
    if odd := sorted(name for name in reshaped if not replaceable(name)):
        stored, here = (tuple(shape) for shape in reshaped[odd[0]])
        faults.append(f"holds {_some(odd)} in another shape ({stored}, not {here})")
    if over := sorted(name for name in report["unexpected_keys"] if wanted(name)):
        faults.append(f"holds {_some(over)}, for which the model has no place")
    if faults:
        raise ModelError(
            f"model.name = {config.model.name!r}: its checkpoint {' and '.join(faults)}; "
            f"config.json and weights must belong together and to {type(model).__name__}, "
            "or part of the model would be random numbers"
        )
    return missing | set(reshaped)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def check_vocabulary(model: Any, tokenizer: Any, config: RunConfig) -> None:
    """Refuse words without an embedding; special tokens may lack one as long as no text holds them."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) <= rows:
        return
    special = set(tokenizer.all_special_tokens)
    special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}
    if words := sorted(number for number, token in beyond.items() if token not in special):
        raise ModelError(
            f"model.name = {config.model.name!r}: its tokenizer has token {words[0]} ({beyond[words[0]]!r}), "
            f"its embedding table only {rows} rows: take the tokenizer that belongs to the weights"
        )


def check_length(longest: int | None, config: RunConfig) -> None:
    """Refuse texts of more tokens than the model has positions for."""
    if longest is not None and config.data.max_length > longest:
        raise ModelError(
            f"data.max_length = {config.data.max_length} exceeds the {longest} tokens "
            f"that model.name = {config.model.name!r} can take"
        )


def try_out(model: Any, tokenizer: Any, config: RunConfig, pooling: str) -> None:
    """Send a few tokens through: padding must change nothing, and no prediction may see its answer."""
    longest = min(8, positions(model) or 8)
    sample = tokenizer("one two three four five", truncation=True, max_length=longest - 2)["input_ids"]
    text = torch.tensor([sample if len(sample) > 1 else [0, 1]])
    padding = torch.full((1, 2), tokenizer.pad_token_id)
    ids = torch.cat([text, padding], dim=1)
    mask = (torch.arange(ids.shape[1]) < text.shape[1]).long()[None]
    other = text.clone()
    other[0, -1] = (other[0, -1] + 1) % model.get_input_embeddings().num_embeddings
    exact = model.dtype == torch.float32 and config.model.quantize == "none"
    training = model.training

    def look(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        if pooling == "seq2seq":
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :1]
        raw = model.eval()(**inputs, return_dict=True)
        plain = pooling in ("own", "causal", "seq2seq")
        found: torch.Tensor = raw.logits if plain else raw.last_hidden_state
        return found.float()

    def differ(one: torch.Tensor, two: torch.Tensor, tolerance: float) -> bool:
        return bool((one - two).abs().max() > tolerance * one.abs().max())

    name = f"model.name = {config.model.name!r}"
    try:
        with torch.no_grad():
            alone, padded = look(text, torch.ones_like(text)), look(ids, mask)
            changed = look(other, torch.ones_like(text)) if pooling == "causal" else alone
    except (AttributeError, ImportError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"{name} cannot read a text for {config.model.task}: {one_line(error)}") from error
    finally:
        model.train(training)
    if pooling == "causal" and differ(alone[:, :-1], changed[:, :-1], 1e-5 if exact else 0.02):
        raise ModelError(
            f"{name} sees the tokens that it is to predict: {type(model).__name__} is no model for "
            'model.task = "causal"'
        )
    if pooling != "own":
        padded = padded[:, : alone.shape[1]]
    if differ(alone, padded, 1e-3 if exact else 0.1):
        raise ModelError(
            f"{name} gives a text other answers when it is padded on the right, so they would depend on the "
            f"texts beside it: {type(model).__name__} must mask token {tokenizer.pad_token_id}, its "
            f"tokenizer's padding (config.json says {model.config.pad_token_id})"
        )


def require_both_ways(model: Any, config: RunConfig) -> None:
    """Refuse a model whose first token does not know what stands behind it."""
    texts = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]]) % model.get_input_embeddings().num_embeddings
    training = model.training
    try:
        with torch.no_grad():
            seen = model.eval()(
                input_ids=texts.to(model.device), attention_mask=torch.ones_like(texts).to(model.device)
            )
    finally:
        model.train(training)
    if torch.equal(seen.last_hidden_state[0, 0], seen.last_hidden_state[1, 0]):
        raise ModelError(
            f"model.name = {config.model.name!r}: a token of {type(model).__name__} sees only what stands "
            f'before it, and model.task = "{config.model.task}" decides at the first: take an encoder'
        )


def positions(model: nn.Module) -> int | None:
    """Return how many tokens a transformers model can take; ``None`` where nothing bounds them.

    RoBERTa and its kin number positions from their padding index on, and have that many fewer.
    """
    settings: Any = model.config
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] == "position_embeddings":
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - offset
    longest = getattr(settings, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def one_line(error: Exception) -> str:
    """Return what somebody else's error says, on one line of bounded length."""
    return " ".join(str(error).split())[:300] or type(error).__name__
