"""Token after token behind a prompt, or for a source text, as a model with whatever was tuned on it says it.

Keys and values of what was read are kept where that changes nothing. Whether it does is tried out with a few
tokens before anything is written: a model may keep another kind of state, and an adapter may look at more
than one token at a time. Then everything is read anew for every token, and :attr:`Generator.uncached` says
why.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedllm.errors import ConfigError, ModelError
from fedllm.models.anatomy import plain
from fedllm.models.model import Model
from fedllm.randomness import stream

__all__ = ["GREEDY", "Generator", "Sampling", "end_tokens", "generate", "pieces"]

logger = logging.getLogger(__name__)

_CACHES = ("cache", "past_key_values")
"""What transformers calls keys and values that are handed from call to call, now and before."""

_TOLERANCE = {True: 1e-3, False: 0.06}
"""Relative difference of scores that rounding explains, in float32 and in less: 2.4 % were seen behind the
thirty layers of SmolLM2 in bfloat16."""

_CONTEXT = 16
"""Tokens before a text by which a decoder knows how to begin it."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: 0 takes the likeliest; otherwise a draw from softmax(logits / temperature).
        top_p: in (0, 1]; draws only among the likeliest tokens that together have this probability (nucleus
            sampling, Holtzman et al., ICLR 2020).
        seed: of the draws; each prompt has a stream of its own.

    Raises:
        ConfigError: a value is out of range, or would be without effect.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature = {self.temperature:g} must be 0 (the likeliest token) or above")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p:g} must be above 0 and at most 1")
        idle = f"top_p = {self.top_p:g}" if self.top_p < 1 else f"seed = {self.seed}" if self.seed else ""
        if idle and self.temperature == 0:
            raise ConfigError(f"{idle} has no effect where the likeliest token is taken: set a temperature")


GREEDY = Sampling()
"""The likeliest token, always."""


class Generator:
    """Writes on behind prompts; where the model is an encoder with a decoder, what they are to become.

    Args:
        model: its network predicts tokens.
        ends: tokens that end a text, beside those of :func:`end_tokens`.

    Attributes:
        ends: all of them.
        uncached: why everything is read anew for every token; empty where it is not.
    """

    def __init__(self, model: Model, ends: Iterable[int] = ()) -> None:
        self.ends = frozenset(ends) | end_tokens(model)
        self._model = model
        self._backbone: Any = model.module.backbone
        self._base = plain(self._backbone)
        takes = inspect.signature(self._base.forward).parameters
        self._cache = next((name for name in _CACHES if name in takes), None)
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        adapter = getattr(self._backbone, "active_peft_config", None)
        prompt = getattr(adapter, "is_prompt_learning", False)
        self._virtual = int(adapter.num_virtual_tokens) if adapter is not None and prompt else 0
        self._start: torch.Tensor | None = None
        if model.module.pooling == "seq2seq":
            # What a decoder reads first, as it did in training.
            self._start = self._base.prepare_decoder_input_ids_from_labels(torch.zeros(1, 1).long())[:, :1]
        if adapter is not None:
            # peft hands its own state over under the name that transformers has begun to replace.
            warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
        with _still(model.module):
            self.uncached = self._try_cache()
            self._together = self._try_together()
            # Positions count from a row's first token; virtual tokens stand before the padding. Sources are
            # padded on the right.
            paddable = self._start is not None or ("position_ids" in takes and not self._virtual)
            self._pads = self._together and paddable and self._try_padding()

    def write(self, prompt: Sequence[int], new_tokens: int, sampling: Sampling = GREEDY) -> Iterator[int]:
        """Yield at most ``new_tokens`` behind one prompt, until one that ends it; that is not yielded."""
        with _still(self._model.module):
            for _, (token,) in zip(range(new_tokens), self._rows([prompt], sampling, [0]), strict=False):
                if token in self.ends:
                    return
                yield token

    def complete(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, sampling: Sampling = GREEDY
    ) -> list[list[int]]:
        """Return what comes behind each prompt, as :meth:`write`, many at a time."""
        found: list[list[int]] = [[] for _ in prompts]
        with _still(self._model.module):
            for numbers in self._batches([len(prompt) for prompt in prompts]):
                going = set(numbers)
                rows = self._rows([prompts[number] for number in numbers], sampling, numbers)
                for _, tokens in zip(range(new_tokens), rows, strict=False):
                    for number, token in zip(numbers, tokens, strict=True):
                        if token in self.ends:
                            going.discard(number)
                        elif number in going:
                            found[number].append(token)
                    if not going:
                        break
        return found

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield the prompts' numbers in batches: of similar length, or of equal where none can be padded."""
        size = self._model.config.evaluation.batch_size if self._together else 1
        batch: list[int] = []
        for number in sorted(range(len(lengths)), key=lengths.__getitem__):
            if batch and (len(batch) == size or not (self._pads or lengths[batch[0]] == lengths[number])):
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch

    def _rows(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, numbers: Sequence[int]
    ) -> Iterator[list[int]]:
        """Yield the next token of every row, without end.

        What lies further back than the model has positions for is forgotten; a decoder with an encoder ends
        there.
        """
        if not all(prompts):
            raise ModelError("there is nothing to continue: a prompt has no token")
        draws = [stream(sampling.seed, "generate", number) for number in numbers]
        padding, source = int(self._model.tokenizer.pad_token_id), None
        if self._start is None:
            ids, mask = _padded(prompts, padding, left=True)
        else:
            source = _padded(prompts, padding, left=False)
            ids = self._start.expand(len(prompts), 1)
            mask = torch.ones_like(ids)
        window, cache, unread = self._model.positions or 2**62, None, ids
        while True:
            if ids.shape[1] <= window:
                logits, cache = self._read(unread, mask, cache, keep=not self.uncached, source=source)
            elif source is not None:
                return
            else:
                logits, cache = self._read(ids[:, -window:], mask[:, -window:])
            if logits.isnan().any():
                raise ModelError("the model's scores of the next token are not numbers: it has diverged")
            chosen = [
                _chosen(row, sampling, 0.0 if sampling.temperature == 0 else draw.random())
                for row, draw in zip(logits, draws, strict=True)
            ]
            yield chosen
            column = torch.tensor(chosen)[:, None]
            ids = torch.cat([ids, column], dim=1)
            mask = torch.cat([mask, torch.ones_like(column)], dim=1)
            unread = column if cache is not None else ids

    @torch.inference_mode()
    def _read(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        cache: Any = None,
        *,
        keep: bool = False,
        source: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """Return the scores of the next token, [b, vocabulary] float32, and the state to go on with.

        Args:
            ids: [b, n], what is not in ``cache``.
            mask: [b, t], of all so far.
            cache: of the t - n tokens before; ``None`` reads from the start.
            keep: ask for the state.
            source: what an encoder reads, with its mask.
        """
        backbone, settings = self._backbone, dict[str, Any](self._last)
        if source is not None:
            settings["decoder_input_ids"] = self._place(ids)
            ids, mask = source
        elif not mask.all():
            settings["position_ids"] = self._place((mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :])
        if cache is not None:
            settings[str(self._cache)], encoded = cache
            if source is not None:
                settings["encoder_outputs"] = (encoded,)
            elif self._virtual:
                # The adapter would put its virtual tokens before every piece; the state holds them already.
                backbone = self._base
                mask = nn.functional.pad(mask, (self._virtual, 0), value=1)
        raw = backbone(
            input_ids=self._place(ids),
            attention_mask=self._place(mask),
            use_cache=keep,
            return_dict=True,
            **settings,
        )
        kept = getattr(raw, str(self._cache), None) if keep else None
        state = None if kept is None else (kept, getattr(raw, "encoder_last_hidden_state", None))
        return raw.logits[:, -1].float().cpu(), state

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._model.device)

    def _try_cache(self) -> str:
        """Return why a state cannot be kept; nothing where a token read with it scores as one without."""
        name = type(self._base).__name__
        if self._cache is None:
            return f"{name} takes no keys and values of what it has read"
        ids = self._sample()
        source = self._source(ids)
        scores, cache = self._read(ids[:, :2], torch.ones_like(ids[:, :2]), keep=True, source=source)
        if cache is None:
            return f"{name} returns no keys and values of what it has read"
        same = self._same(scores, ids[:, :2])
        for end in range(3, ids.shape[1] + 1):
            mask = torch.ones_like(ids[:, :end])
            scores, cache = self._read(ids[:, end - 1 : end], mask, cache, keep=True, source=source)
            same = same and self._same(scores, ids[:, :end])
        if same:
            return ""
        return f"{name} with tuning.peft = {self._model.config.tuning.peft!r} scores a token otherwise then"

    def _try_together(self) -> bool:
        """Whether a text's scores are its own, whatever is read beside it."""
        ids = self._sample()
        two = torch.cat([ids, ids.flip(1)])
        scores, _ = self._read(two, torch.ones_like(two), source=self._source(two))
        return self._same(scores[:1], ids)

    def _try_padding(self) -> bool:
        """Whether padding leaves a text's scores as they are: on the left, or on the right of a source."""
        ids = self._sample()
        if self._start is not None:
            wide, mask = (nn.functional.pad(part, (0, 2)) for part in (ids, torch.ones_like(ids)))
            return self._same(self._read(ids, torch.ones_like(ids), source=(wide, mask))[0], ids)
        wide, mask = (nn.functional.pad(part, (2, 0)) for part in (ids, torch.ones_like(ids)))
        if self.uncached:
            return self._same(self._read(wide, mask)[0], ids)
        _, cache = self._read(wide[:, :-1], mask[:, :-1], keep=True)
        scores, _ = self._read(ids[:, -1:], mask, cache, keep=True)
        return self._same(scores, ids)

    def _sample(self) -> torch.Tensor:
        longest = max(3, min(6, self._model.positions or 6))
        return torch.arange(1, longest + 1)[None] % (self._model.embeddings or len(self._model.tokenizer))

    def _source(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return texts for an encoder, where there is one."""
        return None if self._start is None else (ids, torch.ones_like(ids))

    def _same(self, scores: torch.Tensor, ids: torch.Tensor) -> bool:
        """Whether these are the scores of a text that is read alone, from its start."""
        plain, _ = self._read(ids, torch.ones_like(ids), source=self._source(self._sample()))
        exact = self._base.dtype == torch.float32 and self._model.config.model.quantize == "none"
        return bool((scores - plain).abs().max() <= _TOLERANCE[exact] * plain.abs().max())


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    sampling: Sampling = GREEDY,
    ends: Collection[int] = (),
) -> list[list[int]]:
    """Return what a model writes behind each prompt, ``evaluation.batch_size`` at a time.

    Args:
        model: its network predicts tokens, or reads one text and writes another; its mode is as before
            afterwards.
        prompts: token numbers, at least one each; source texts for an encoder with a decoder.
        new_tokens: at most so many each.
        sampling: how a token is chosen.
        ends: tokens that end a text, such as :func:`fedllm.tasks.chat.end_of_turn`, beside the model's own.

    Returns:
        The new tokens of each, without the one that ended it.

    Raises:
        ModelError: a prompt is empty, or the model has diverged.
    """
    generator = Generator(model, ends)
    if generator.uncached:
        logger.warning("every new token reads all before it again, which is slow: %s", generator.uncached)
    return generator.complete(prompts, new_tokens, sampling)


def end_tokens(model: Model) -> frozenset[int]:
    """Return the tokens that end a text by the model's generation settings and by its tokenizer."""
    settings = getattr(plain(model.module.backbone), "generation_config", None)
    found = getattr(settings, "eos_token_id", None)
    ends = {*found} if isinstance(found, list | tuple) else {found}
    return frozenset({*ends, model.tokenizer.eos_token_id} - {None})


def pieces(tokenizer: Any, tokens: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
    """Yield the text of tokens as they come, in whole characters; together it is the text of them all.

    Args:
        tokenizer: of transformers.
        tokens: as they come.
        before: tokens of the text that is continued; some tokenizers begin a text otherwise.
    """

    def decoded() -> str:
        text = tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    known = list(before[-_CONTEXT:])
    text = decoded()
    shown = len(text)
    for token in tokens:
        known.append(token)
        text = decoded()
        # Half a character at the end is decoded as a sign that says so, until its other half comes.
        whole = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        if whole > shown:
            yield text[shown:whole]
            shown = whole
    if len(text) > shown:
        yield text[shown:]


def _chosen(logits: torch.Tensor, sampling: Sampling, draw: float) -> int:
    """Return a token, given its [vocabulary] scores and a number in [0, 1)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    likely, tokens = (logits.double() / sampling.temperature).softmax(0).sort(descending=True, stable=True)
    sums = likely.cumsum(0)
    kept = sums[: int((sums - likely < sampling.top_p).sum())]
    place = int(torch.searchsorted(kept, draw * float(kept[-1]), right=True))
    return int(tokens[min(place, len(kept) - 1)])


def _padded(rows: Sequence[Sequence[int]], padding: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and mask, both [b, longest]."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), padding), torch.zeros(len(rows), width, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        place = slice(width - len(tokens), width) if left else slice(len(tokens))
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    return ids, mask


@contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    """Without dropout, for a while."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
