"""Asking a finished run's model."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedllm import tasks
from fedllm.data.corpus import Corpus
from fedllm.data.digests import of_models, require_same_inputs
from fedllm.data.reading import Row
from fedllm.data.tokens import Batch, Tokens
from fedllm.errors import DataError, RunFailed, StoreError
from fedllm.models.generation import GREEDY, Sampling, generate, pieces
from fedllm.models.model import Model
from fedllm.models.readback import Unchecked, read_back, require_true
from fedllm.models.saving import unbounded
from fedllm.runs import checkpoint
from fedllm.runs.provenance.card import write_card
from fedllm.runs.reader import Run
from fedllm.tensors import Tensors
from simulations.results.options import Which
from strategies.base import Method
from strategies.registry import open_method

__all__ = [
    "BEST",
    "Restored",
    "answering",
    "continued",
    "export",
    "lines",
    "plain_model",
    "predict",
    "prompts",
    "raw",
    "restore",
    "rows",
    "segmented",
    "sentences",
    "tokenizer",
]

BEST = "best"
_NEW_TOKENS = 40
_WHOLE = 2**20
"""Tokens that no text has."""

logger = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A run's model as it was after a round.

    Attributes:
        model: in evaluation mode.
        method: of the run.
        tensors: the global ones; more than the model's trained ones where a method adds to the frozen base.
        round: after which.
    """

    model: Model
    method: Method
    tensors: Tensors
    round: int


def restore(folder: Path, round: Which = None) -> Restored:
    """Return a run's model with its global tensors in it.

    Args:
        folder: the run folder.
        round: of a checkpoint, ``best`` for that of the best round; unset takes the last.

    Raises:
        StoreError: the run has no such checkpoint, or its base model is another one now.
    """
    run = Run(folder)
    held = folder / "checkpoints"
    if round == BEST:
        round = _best(run)
    if round is not None and round not in checkpoint.numbers(held):
        known = ", ".join(map(str, checkpoint.numbers(held))) or "none"
        raise StoreError(f"{folder} has no checkpoint of round {round}; its checkpoints are {known}")
    saved = checkpoint.latest(held) if round is None else checkpoint.load(held, round)
    if saved is None:
        raise StoreError(f"{folder} has no checkpoint yet: let it finish a round first")
    found = of_models(run.config)
    require_same_inputs(folder, run.config, run.provenance.get("inputs", {}), found)
    method = open_method(run.config)
    model = method.build(tuple(run.partition["label_names"]))
    tensors = saved.groups["tensors"]
    method.load(model, tensors)
    model.module.eval()
    return Restored(model, method, tensors, saved.number)


def _best(run: Run) -> int:
    if run.best is None:
        raise StoreError(f"{run.folder} has measured no {run.config.metric} and so has no best round")
    return run.best.round


def answering(folder: Path, round: Which = None) -> Restored:
    """Return a run's model to answer texts with, as :func:`restore` does.

    Raises:
        StoreError: as there, or the run has no model that could.
    """
    found = restore(folder, round)
    if found.method.lacking:
        raise StoreError(f"{folder} has no model that answers texts: {found.method.lacking}")
    return found


def export(folder: Path, out: Path, round: Which = None) -> Path:
    """Write a run's result anew from its last checkpoint or another one; return where.

    Raises:
        RunFailed: what was saved is not the run's model; it is not left behind.
        StoreError: as :func:`restore`.
    """
    found = restore(folder, round)
    place = found.method.save(found.model, found.tensors, out)
    try:
        require_true(found.model, place, sentences(found.model))
    except Unchecked as error:
        logger.warning("%s", error)
    except RunFailed:
        shutil.rmtree(place)
        raise
    write_card(Run(folder), place, found.round)
    return place


def plain_model(folder: Path, round: Which = None) -> Any:
    """Return a run's model as its result loads with transformers and peft alone, in evaluation mode.

    Where a linear head of ours stands on a pooled encoder, both come as a :class:`Network`.
    """
    found = answering(folder, round)
    with tempfile.TemporaryDirectory() as place:
        network = read_back(found.method.save(found.model, found.tensors, Path(place)), found.model).eval()
    return network if network.head is not None else network.backbone


def tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a run's model; it makes what the model was trained on, and nothing else.

    That is ids and their mask, and numbers of segments where the task has two texts read as one.
    """
    model = restore(folder).model
    segments = ["token_type_ids"] if segmented(model) else []
    found = unbounded(model.tokenizer)
    found.model_input_names = ["input_ids", "attention_mask", *segments]
    return found


def segmented(model: Model) -> bool:
    """Whether the model is told which of two texts a token is in."""
    return "token_type_ids" in sentences(model).extra


def sentences(model: Model) -> Batch:
    """Return something to score: what it says is of no account."""
    texts = ["One sentence that no client holds.", "And another, of 7 words."]
    pair = model.config.data.pair
    rows = [
        Row(model.task.row_of(text) | ({} if pair is None else {pair: text}), "given", "a sentence")
        for text in texts
    ]
    found = model.tokenise(model.task.ask(rows, model.labels))
    return found.batch(range(len(found)))


def predict(
    folder: Path, asked: Sequence[str | Mapping[str, Any] | Row], round: Which = None
) -> list[dict[str, Any]]:
    """Answer texts or rows with a run's model, as its task does: ``label``, ``continuation``, ...

    They are read as the run read its own: cut at ``data.max_length`` tokens (not texts to continue), padded
    on the right, and left out with a warning where there is no text in them; each answer names its text.

    Args:
        folder: the run folder.
        asked: texts, or rows with the columns that the run's own had, without what is to be predicted.
        round: as for :func:`restore`.

    Raises:
        DataError: no text is left, one cannot be tokenised, or the task needs more than a text.
        StoreError: as :func:`restore`.
    """
    model = answering(folder, round).model
    given = rows(model, asked)
    corpus = model.task.ask(given, model.labels)
    if not len(corpus):
        raise DataError("there is no text to answer: all are empty")
    if len(corpus) < len(given):
        logger.warning("left out for having no text: %d of %d", len(given) - len(corpus), len(given))
    if model.task.chatty:
        said = continued(model, corpus)
        return [{"text": text, "continuation": more} for text, more in zip(corpus.texts, said, strict=True)]
    tokens = model.tokenise(corpus)
    if not len(tokens):
        longest = model.config.data.max_length
        raise DataError(
            f"there is no text to answer: all are longer than data.max_length = {longest} tokens, and this "
            "run leaves such texts out"
        )
    for note in model.task.notes(corpus, tokens):
        logger.warning("%s", note)
    answers = model.task.answers(corpus, tokens, _logits(model, tokens), model.labels)
    return [{"text": corpus.texts[index], **answer} for index, answer in answers]


def _logits(model: Model, tokens: Tokens) -> list[torch.Tensor]:
    """Return the logits of each row, those of its padding left out."""
    found: list[torch.Tensor] = []
    size, each = model.config.evaluation.batch_size, model.module.pooling == "each"
    with torch.inference_mode():
        for start in range(0, len(tokens), size):
            rows = range(start, min(start + size, len(tokens)))
            logits = model.forward(tokens.batch(rows)).logits.cpu()
            lengths = tokens.lengths[rows.start : rows.stop].tolist()
            found += [one[:length] if each else one for one, length in zip(logits, lengths, strict=True)]
    return found


def lines(folder: Path, answers: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return answers of :func:`predict` as a run's task shows them to people."""
    task = tasks.of(Run(folder).config)
    return [task.shown(answer) for answer in answers]


def rows(model: Model, asked: Sequence[str | Mapping[str, Any] | Row]) -> list[Row]:
    """Return what is asked as rows of the run's own columns.

    Raises:
        DataError: the task needs more than a text.
    """
    found = []
    for number, one in enumerate(asked, start=1):
        if isinstance(one, Row):
            found.append(one)
            continue
        if isinstance(one, str) and not model.task.plain:
            raise DataError(
                f'model.task = "{model.task.name}" takes more than a text: give rows with the columns '
                f"{', '.join(model.task.row_of(''))}, as in --file rows.jsonl"
            )
        columns = model.task.row_of(one) if isinstance(one, str) else one
        found.append(Row(columns, "given", f"text {number}"))
    return found


def prompts(model: Model, corpus: Corpus) -> list[list[int]]:
    """Return the tokens that each example is to be answered behind, whole; sources are cut as in training.

    Some tokenizers end every text with an end token, which is not to end here.

    Raises:
        DataError: an example cannot be tokenised.
    """
    behind, end = model.task.pooling == "causal", model.tokenizer.eos_token_id
    tokens = model.tokenise(corpus, max_length=_WHOLE if behind else None)
    for note in () if behind else model.task.notes(corpus, tokens):
        logger.warning("%s", note)
    found = [tokens.batch([row]).input_ids[0].tolist() for row in range(len(tokens))]
    if not raw(model, corpus):
        return found
    if model.module.pooling == "seq2seq":  # what an encoder reads is a whole text, its end included
        return found
    return [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in found]


def raw(model: Model, corpus: Corpus) -> bool:
    """Whether texts are continued as they stand, and not answered."""
    return model.task.pooling == "causal" and corpus.parts is None


def continued(
    model: Model, corpus: Corpus, new_tokens: int = _NEW_TOKENS, sampling: Sampling = GREEDY
) -> list[str]:
    """Return what a model writes for each example, ``evaluation.batch_size`` at a time."""
    asked = prompts(model, corpus)
    found = generate(model, asked, new_tokens, sampling, ends=model.task.ends(model.tokenizer))
    before = asked if raw(model, corpus) else [[] for _ in asked]
    return ["".join(pieces(model.tokenizer, ids, known)) for known, ids in zip(before, found, strict=True)]
