"""Talking to a run's model: an answer to one prompt, or a conversation; and its base model's beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedllm import tasks
from fedllm.config import RunConfig
from fedllm.data.bundled import model_source
from fedllm.data.corpus import Corpus
from fedllm.errors import ConfigError, DataError
from fedllm.host.accelerator import chosen_device
from fedllm.models.base.loading import open_base, open_tokenizer, quiet
from fedllm.models.generation import GREEDY, Generator, Sampling, pieces
from fedllm.models.model import Model
from fedllm.models.network import Network
from fedllm.runs.reader import Run
from fedllm.tasks.chat import Message, end_of_turn, fit
from simulations.results.options import Which
from simulations.results.predict import answering, continued, prompts, raw, rows

__all__ = ["NEW_TOKENS", "Chat", "Speaker", "base_of", "generate", "open_speaker"]

NEW_TOKENS = 200
"""Of an answer, unless somebody says otherwise."""
_UNBOUNDED = 2**31
"""Tokens that fit where nothing bounds them."""


class Speaker:
    """A model that answers in text, piece by piece.

    Args:
        model: its task answers by generating.

    Attributes:
        uncached: why it reads everything anew for every token; empty where it does not.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._generator = Generator(model, model.task.ends(model.tokenizer))
        self.uncached = self._generator.uncached

    def answer(self, text: str, new_tokens: int, sampling: Sampling = GREEDY) -> Iterator[str]:
        """Yield what comes behind a text, as the task asks for it.

        Raises:
            DataError: the text is blank, or cannot be tokenised.
        """
        corpus = _asked(self.model, [text])
        (ids,) = prompts(self.model, corpus)
        before = ids if raw(self.model, corpus) else ()
        return pieces(self.model.tokenizer, self._generator.write(ids, new_tokens, sampling), before)

    def reply(
        self, ids: Sequence[int], new_tokens: int, sampling: Sampling = GREEDY, end: int | None = None
    ) -> Iterator[str]:
        """Yield an answer to a conversation's tokens, which ``end`` ends too."""
        written = self._generator.write(ids, new_tokens, sampling)
        return pieces(self.model.tokenizer, _until(written, end))


class Chat:
    """A conversation, whose oldest turns are forgotten where the model has no room for them.

    Args:
        speaker: who answers.
        system: what is said to it beforehand; empty for nothing.
        new_tokens: of an answer, at most; ``None`` for 200, or half of what the model can take.
        sampling: how a token is chosen.

    Raises:
        ConfigError: an answer of so many tokens leaves no room for a message.

    Attributes:
        turns: what was said so far, and is remembered.
    """

    def __init__(
        self, speaker: Speaker, system: str = "", new_tokens: int | None = None, sampling: Sampling = GREEDY
    ) -> None:
        longest = speaker.model.positions or _UNBOUNDED
        self.turns: list[Message] = []
        self._speaker, self._sampling = speaker, sampling
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._new_tokens = min(NEW_TOKENS, longest // 2) if new_tokens is None else new_tokens
        self._room = longest - self._new_tokens
        if self._room < 1:
            raise ConfigError(
                f"{self._new_tokens} new tokens leave no room for a message in the {longest} that the model "
                "can take: ask for fewer"
            )

    def ask(self, text: str, *others: Speaker) -> Iterator[Iterator[str]]:
        """Yield the answer to a message, and those of others to it; remember what is heard of the first.

        Raises:
            DataError: the message does not fit, or the template refuses it; it is as if it was not said.
        """
        tokenizer = self._speaker.model.tokenizer
        asked = [*self._system, *self.turns, {"role": "user", "content": text}]
        kept, ids = fit(tokenizer, asked, self._room)
        end = end_of_turn(tokenizer, kept)
        answer = {"role": "assistant", "content": ""}
        self.turns = [*kept[len(self._system) :], answer]
        yield _noted(self._speaker.reply(ids, self._new_tokens, self._sampling, end), answer)
        for other in others:
            yield other.reply(ids, self._new_tokens, self._sampling, end)


def generate(
    folder: Path,
    asked: Sequence[str | Mapping[str, Any]],
    new_tokens: int = NEW_TOKENS,
    sampling: Sampling = GREEDY,
    round: Which = None,
    *,
    base: bool = False,
) -> list[dict[str, Any]]:
    """Answer prompts, many at a time: for each a record of ``prompt`` and ``answer``, as the command has it.

    Args:
        folder: the run folder.
        asked: texts, or rows with the run's own columns.
        new_tokens: of an answer, at most; 1 or more.
        sampling: how a token is chosen; each prompt has draws of its own, by its place.
        round: as for :func:`simulations.results.predict.answering`.
        base: also tell what the untuned base model says, as ``base``.

    Raises:
        ConfigError: as :func:`open_speaker`.
        DataError: a prompt is blank, or cannot be tokenised.
        StoreError: as :func:`simulations.results.predict.answering`.
    """
    if new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {new_tokens} must be 1 or more")
    _require_writer(folder)
    model = answering(folder, round).model
    said = {"answer": continued(model, _asked(model, asked), new_tokens, sampling)}
    if base:
        config = model.config
        del model  # there may be no memory for both
        untuned = _base_model(config)
        said["base"] = continued(untuned, _asked(untuned, asked), new_tokens, sampling)
    return [
        {"prompt": prompt, **{who: texts[number] for who, texts in said.items()}}
        for number, prompt in enumerate(asked)
    ]


def open_speaker(folder: Path, round: Which = None, *, converses: bool = False) -> Speaker:
    """Return a run's model, ready to answer.

    Args:
        folder: the run folder.
        round: as for :func:`simulations.results.predict.answering`.
        converses: it is to remember what was said before.

    Raises:
        ConfigError: the run's task does not answer by generating text, or holds no conversation.
        StoreError: as :func:`simulations.results.predict.answering`.
    """
    _require_writer(folder, converses=converses)
    return Speaker(answering(folder, round).model)


def _require_writer(folder: Path, *, converses: bool = False) -> None:
    task = tasks.of(Run(folder).config)
    what = f'{folder} is a run of model.task = "{task.name}"'
    if not task.chatty:
        raise ConfigError(f"{what}, which writes no text: ask it with fedllm predict")
    if converses and task.pooling != "causal":
        raise ConfigError(
            f"{what}, which makes one text of another and remembers no conversation: ask it with fedllm "
            "generate"
        )


def _asked(model: Model, prompts: Sequence[str | Mapping[str, Any]]) -> Corpus:
    """Return prompts as a task's examples, all of them.

    Raises:
        DataError: one is blank.
    """
    corpus = model.task.ask(rows(model, prompts), model.labels)
    assert corpus.numbers is not None
    blank = np.setdiff1d(np.arange(len(prompts)), corpus.numbers)
    if len(blank):
        which = "the prompt" if len(prompts) == 1 else f"prompt {blank[0] + 1}"
        raise DataError(f"there is no text to answer: {which} is blank")
    return corpus


def base_of(config: RunConfig) -> Speaker:
    """Return a run's base model as its makers left it, ready to answer.

    It is loaded afresh: an adapter that is switched off may leave the base changed (residual and stacked
    updates, initialisations that take a part out of the weights), and full tuning leaves none.

    Args:
        config: what the run's model was loaded from.

    Raises:
        ModelError: the base model is not there any more.
    """
    return Speaker(_base_model(config))


def _base_model(config: RunConfig) -> Model:
    task, device = tasks.of(config), chosen_device()
    with torch.random.fork_rng(), quiet():
        source = model_source(config.model.name)
        tokenizer = open_tokenizer(source, config)
        base = open_base(source, config, (), task.pooling, tokenizer, device)
    module = Network(base.model, task.pooling, None, task)
    if config.model.quantize == "none":
        module.to(device)
    rows_of = base.model.get_input_embeddings().num_embeddings
    return Model(module.eval(), tokenizer, task, (), config, tuple(base.notes), rows_of, base.positions)


def _noted(heard: Iterator[str], answer: dict[str, str]) -> Iterator[str]:
    for piece in heard:
        answer["content"] += piece
        yield piece


def _until(tokens: Iterator[int], end: int | None) -> Iterator[int]:
    for token in tokens:
        if token == end:
            return
        yield token
