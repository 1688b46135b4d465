"""What server and clients have to have in common, and that no shape of an update tells.

A device is told the name of a model, and takes what lies under that name where it is: another revision, other
weights of the same shapes, another tokenizer. Frozen parts of an adapter are computed on each device, and may
come out otherwise (the signs of a singular value decomposition are anybody's choice). Texts that a run names,
where devices bring none of their own, may be others under the same name; another release of fedllm may draw
other directions. A mean with such updates means nothing. So each client says, as it introduces itself, which
release and texts it has, how its tokenizer reads a sentence and what its model answers; the server compares
that with its own.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from fedllm.config import RunConfig
from fedllm.errors import WireError
from fedllm.models.anatomy import plain
from fedllm.models.model import Model
from fedllm.randomness import stream
from fedllm.runs.records import OWN, TEXTS
from fedllm.tensors import Tensors
from strategies.base import Method

__all__ = ["MODEL", "RELEASE", "Likeness", "measure", "require_alike"]

MODEL, RELEASE = "likeness", "fedllm"
"""Facts of an introduction beside ``texts``: :meth:`Likeness.told`, and the release of fedllm."""

_WORDS = "The bank of Zürich wrote 3,141.59 to 2 naïve old friends: 'Don't!'  Is it OK? 日本 🙂"
_MOST_TOKENS = 32
_SUMS = 8
_MOVED, _FROM_ZERO = 0.3, 0.05
"""How far trained tensors are moved, in their own root mean squares and where they are zero, so that the
frozen factors beside them, which begin as if they were not there, count as well."""
_LARGE = 1 << 20
"""Values of a tensor that is no adapter's, and has no such factor beside it."""
_APART = {True: 0.002, False: 0.1}
"""Relative distance that rounding explains at most, in float32 and in less."""


@dataclass(frozen=True)
class Likeness:
    """What one process makes of the sentence.

    Attributes:
        tokens: digest of its token ids, of vocabulary, special tokens and the template of conversations.
        sums: of the model's last hidden states with random signs, and of its scores, each divided by the root
            of their number.
    """

    tokens: str
    sums: tuple[float, ...]

    def told(self) -> str:
        """Return what a client sends of it."""
        return json.dumps([self.tokens, *self.sums])

    @classmethod
    def heard(cls, facts: Mapping[str, str]) -> Self:
        """Read what a client sent.

        Raises:
            WireError: it sent none, or something else.

        >>> Likeness.heard({"likeness": Likeness("a5", tuple(range(16))).told()}).sums[1]
        1.0
        """
        if MODEL not in facts:
            raise WireError(
                "it does not say what its model makes of a sentence: install the server's release of fedllm "
                "on it"
            )
        unreadable = "what its model makes of a sentence cannot be read"
        try:
            tokens, *told = json.loads(facts[MODEL])
            sums = tuple(float(value) for value in told)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise WireError(unreadable) from error
        if not isinstance(tokens, str) or len(sums) != 2 * _SUMS or not all(map(math.isfinite, sums)):
            raise WireError(unreadable)
        return cls(tokens, sums)

    def require(self, other: Self, config: RunConfig) -> None:
        """Server: refuse a client whose model is another.

        Args:
            other: the client's.
            config: the run; its precision decides what rounding explains.

        Raises:
            WireError: says what differs.
        """
        name = config.model.name
        if other.tokens != self.tokens:
            raise WireError(
                f"its tokenizer of {name} is not the server's: give it the server's files of that model"
            )
        exact = config.model.dtype == "float32" and config.model.quantize == "none"
        halves = (slice(_SUMS), slice(_SUMS, None))
        distance = max(_relative(self.sums[half], other.sums[half]) for half in halves)
        if not distance <= _APART[exact]:
            raise WireError(
                f"its model {name} with what is trained on it does not answer as the server's does (off by "
                f"{min(distance, 9.99):.1%}): give it the server's files of that model, and the same "
                "releases of torch and peft"
            )


def require_alike(ours: Mapping[str, str], facts: Mapping[str, str], config: RunConfig) -> None:
    """Server: refuse a client that would work with other things than the server.

    Args:
        ours: as :attr:`strategies.session.Session.shared` has it.
        facts: of the client's introduction.
        config: the run.

    Raises:
        WireError: says what differs.
    """
    release, wanted = facts.get(RELEASE, "none that it tells"), ours[RELEASE]
    if release != wanted:
        raise WireError(f"its release of fedllm is {release}, and the server's {wanted}: install that on it")
    if (texts := facts.get(TEXTS, "")) not in (ours[TEXTS], OWN):
        which = "texts" if texts.partition(" ")[0] != ours[TEXTS].partition(" ")[0] else "parts of texts"
        name = config.data.path or config.data.name
        raise WireError(
            f"the {which} that it reads under the name of {name} are not the server's: give it the server's "
            "files, or start it with its own texts (--data)"
        )
    Likeness.heard(ours).require(Likeness.heard(facts), config)


def measure(method: Method, model: Model, initial: Tensors) -> Likeness:
    """Send the sentence through the model, and leave the model with its initial tensors.

    Args:
        method: writes tensors into the model.
        model: the server's or a client's.
        initial: global tensors of version 0, which both sides make for themselves.
    """
    length = min(_MOST_TOKENS, model.positions or _MOST_TOKENS)
    ids = model.tokenizer(_WORDS, truncation=True, max_length=length)["input_ids"]
    tokenizer = model.tokenizer
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    known = [ids, sorted(tokenizer.get_vocab().items()), special, tokenizer.chat_template]
    tokens = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    sent = torch.tensor([ids]).to(model.device)
    if model.embeddings is not None:
        sent = sent % model.embeddings
    extra = {"decoder_input_ids": sent} if model.module.pooling == "seq2seq" else {}
    network, training = model.module, model.module.training
    # An encoder with a decoder has hidden states of two kinds, under other names.
    deep = not plain(network.backbone).config.is_encoder_decoder
    method.load(model, _moved(initial))
    try:
        with torch.no_grad():
            found = network.eval()(sent, torch.ones_like(sent), output_hidden_states=deep, **extra)
    finally:
        network.train(training)
        method.load(model, initial)
    last = found.hidden_states[-1] if found.hidden_states else found.logits
    return Likeness(tokens, _sums(last) + _sums(found.logits))


def _moved(tensors: Tensors) -> Tensors:
    """Move each tensor of an adapter by uniform noise, the same on both sides."""
    moved = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.numel() > _LARGE:
            continue
        size = float(tensor.double().square().mean().sqrt())
        far = _MOVED * size if size else _FROM_ZERO
        noise = stream(0, MODEL, name).uniform(-far, far, tuple(tensor.shape))
        moved[name] = tensor + torch.from_numpy(noise).to(tensor.dtype)
    return moved


def _sums(values: torch.Tensor) -> tuple[float, ...]:
    """Sum a table [..., outputs] with signs, each a product of its row's and its column's."""
    table = values.reshape(-1, values.shape[-1]).double().cpu().numpy()
    draw = stream(0, MODEL)
    rows, columns = (1.0 - 2.0 * draw.integers(0, 2, (_SUMS, size)) for size in table.shape)
    found = np.einsum("kt,to,ko->k", rows, table, columns, optimize=True) / math.sqrt(table.size)
    return tuple(float(f"{value:.9g}") for value in found)


def _relative(one: Sequence[float], other: Sequence[float]) -> float:
    return math.dist(one, other) / max(math.hypot(*one), 1e-30)
