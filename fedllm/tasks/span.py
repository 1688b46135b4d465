"""Answering a question by quoting a text: where the answer begins and where it ends (SQuAD)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from fedllm.data.corpus import Example
from fedllm.data.reading import Row
from fedllm.data.shapes.answers import answers
from fedllm.errors import DataError
from fedllm.tasks.base import Each, Scorer

if TYPE_CHECKING:
    import torch

    from fedllm.config import DataConfig
    from fedllm.data.corpus import Corpus
    from fedllm.data.partition import Indices
    from fedllm.data.tokens import Overlong, Quotable, Tokens

__all__ = ["Quote", "Span", "best_span", "squad"]

_LONGEST = 30
"""Tokens of a quoted answer at most, as in the scripts that go with SQuAD."""
_MASKED = -1e4
"""Logit of a token that can be no answer: no probability in float32, and still finite."""


class Quote(NamedTuple):
    """What a model quotes: characters [start, end) of the text, and by how much it beats quoting nothing."""

    start: int
    end: int
    score: float


def best_span(start: np.ndarray[Any, Any], end: np.ndarray[Any, Any], longest: int) -> tuple[int, int, float]:
    """Return the first and the last token of the likeliest span, and the sum of their logits.

    Args:
        start: logit of each token to be the first, [t], -inf where none may be.
        end: likewise to be the last.
        longest: tokens of a span at most.

    >>> best_span(np.array([0.0, 3.0, 0.0]), np.array([5.0, 0.0, 1.0]), 30)
    (0, 0, 5.0)
    """
    first, last, best = 0, 0, -np.inf
    for width in range(min(longest, len(start))):
        sums = start[: len(start) - width] + end[width:]
        place = int(sums.argmax())
        if sums[place] > best:
            first, last, best = place, place + width, float(sums[place])
    return first, last, best


def squad(written: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return ``exact_match`` and ``f1`` in [0, 1], as version 2 of SQuAD's own script defines them.

    Case, punctuation and articles do not count; of several right answers the nearest does; nothing is right
    where nothing was wanted (Rajpurkar, Jia, Liang, ACL 2018). Counted by torchmetrics, whose version 1 is
    the same once what is no answer stands there as an empty one.
    """
    from torchmetrics.functional.text import squad as counted

    def of(answers: Sequence[str]) -> list[str]:
        return [one for one in answers if not counted(*_asked("", [one]))["exact_match"]] or [""]

    predictions, targets = [], []
    for number, (one, right) in enumerate(zip(written, wanted, strict=True)):
        prediction, target = _asked(one, of(right), str(number))
        predictions.append(prediction)
        targets.append(target)
    found = counted(predictions, targets)
    return {name: float(value) / 100 for name, value in found.items()}


def _asked(written: str, right: list[str], number: str = "0") -> tuple[dict[str, str], dict[str, Any]]:
    answers = {"text": right, "answer_start": [0] * len(right)}
    return {"prediction_text": written, "id": number}, {"answers": answers, "id": number}


class _Quotes(Scorer):
    def __init__(self, tokens: Quotable) -> None:
        self.tokens = tokens
        self.logits: dict[int, torch.Tensor] = {}

    def add(self, rows: Indices, logits: torch.Tensor, labels: torch.Tensor) -> None:
        for row, one in zip(rows.tolist(), logits.float().cpu(), strict=True):
            self.logits[row] = one[: int(self.tokens.lengths[row])]

    def scores(self, loss: float) -> dict[str, float]:
        texts = self.tokens.texts().tolist()
        found = _quoted(self.tokens, self.logits)
        written = [_said(self.tokens.contexts[text], found[text]) for text in texts]
        return squad(written, [self.tokens.wanted[text] for text in texts])


class Span(Each):
    """Two predictions for each row: its first and its last token of the answer, or twice the row's first.

    What is longer than ``data.max_length`` becomes rows that overlap, each with the whole question.
    """

    name: ClassVar[str] = "span"
    metrics: ClassVar[tuple[str, ...]] = ("exact_match", "f1")
    pipeline: ClassVar[str] = "question-answering"
    one_text: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ("question", "context", "answers")
    plain: ClassVar[bool] = False
    both_ways: ClassVar[bool] = True

    @property
    def overlong(self) -> tuple[Overlong, ...]:
        """Rows that overlap, in any case."""
        return ("truncate", "split")

    def read(self, row: Row, config: DataConfig, *, answered: bool = True) -> Example | None:
        """Return a row's question, text and answers; questions to one text stay on one side of a split."""
        if not answered:
            without: dict[str, Any] = {config.columns.get("answers", "answers"): []}
            row = row.supposing(without)
        found = answers(row, config.columns)
        if found is None:
            return None
        parts = {"context": found.context, "answers": [list(answer) for answer in found.answers]}
        return Example(found.question, parts=parts, key=found.context)

    def row_of(self, text: str) -> dict[str, Any]:
        """Return a question about itself."""
        names = self.config.data.columns
        return {names.get("question", "question"): text, names.get("context", "context"): text}

    def outputs(self, names: Sequence[str]) -> int:
        """First and last."""
        return 2

    def encode(self, corpus: Corpus, tokenizer: Any, max_length: int) -> Tokens:
        """Join every question with its text, or with overlapping windows of it.

        Labels are the first and the last token of the first answer, [rows, 2]; 0 and 0 in rows that do not
        hold it whole. Questions take half of a row at most.

        Raises:
            DataError: ``max_length`` leaves no room, or the tokenizer cannot do it.
        """
        from fedllm.data.tokens import Quotable, windows

        room = max_length - int(tokenizer.num_special_tokens_to_add(pair=True))
        if room < 2:
            raise DataError(
                f"data.max_length = {max_length} leaves no room for a question and a text beside the "
                f"tokenizer's {max_length - room} special tokens; set it to {max_length - room + 2} at least"
            )
        parts = corpus.parts or []
        contexts = tuple(part["context"] for part in parts)
        questions, shortened = _shortened(corpus.texts, tokenizer, room // 2)
        tokens = windows(
            replace(corpus, labels=None),
            tokenizer,
            max_length,
            "split",
            (questions, list(contexts)),
            truncation="only_second",
            stride=min(max_length // 4, (room - room // 2) // 2),
            return_token_type_ids="token_type_ids" in tokenizer.model_input_names,
        )
        assert tokens.owners is not None
        labels = [_label(tokens, row, parts[text]["answers"]) for row, text in enumerate(tokens.owners)]
        return Quotable(
            **{name: value for name, value in vars(tokens).items() if name not in ("labels", "cut")},
            labels=np.array(labels, dtype=np.int64).reshape(-1, 2),
            cut=shortened[tokens.owners],
            contexts=contexts,
            wanted=tuple(tuple(answer for answer, _ in part["answers"]) for part in parts),
        )

    def notes(self, corpus: Corpus, tokens: Tokens) -> list[str]:
        """Say how many texts are several rows, how many questions were cut, and which answers are nowhere."""
        assert tokens.owners is not None
        assert tokens.cut is not None
        assert tokens.labels is not None
        limit, said = f"data.max_length = {self.config.data.max_length} tokens", []
        rows = np.bincount(tokens.owners, minlength=len(corpus))
        if long := rows[rows > 1].tolist():
            said.append(
                f"{len(long)} of {len(corpus)} questions with their texts were longer than {limit} and make "
                f"{sum(long)} rows that overlap"
            )
        if cut := len(set(tokens.owners[tokens.cut].tolist())):
            said.append(f"{cut} of {len(corpus)} questions take more than half of {limit} and were cut")
        answered = {text for text, part in enumerate(corpus.parts or []) if part["answers"]}
        whole = set(tokens.owners[tokens.labels[:, 1] > 0].tolist())
        if lost := len(answered - whole):
            said.append(
                f"{lost} of {len(answered)} answers are in no row as a whole, and learnt as if they were not "
                "in the text"
            )
        return said

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, extra: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the mean cross-entropy of first and last token, over rows."""
        from torch.nn import functional

        return functional.cross_entropy(self.predictions(logits, labels, extra), labels.reshape(-1))

    def predictions(
        self, logits: torch.Tensor, labels: torch.Tensor, extra: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return logits over positions, of first and last token of each row in turn: [2 b, t].

        Tokens of the question and of the padding can be neither.
        """
        import torch

        inside = extra["inside"].bool()
        allowed = torch.cat([torch.ones_like(inside[:, :1]), inside[:, 1:]], dim=1)
        return logits.float().masked_fill(~allowed[..., None], _MASKED).transpose(1, 2).flatten(0, 1)

    def scorer(self, tokens: Tokens, names: Sequence[str]) -> Scorer:
        """Return what compares quotes with answers."""
        from fedllm.data.tokens import Quotable

        assert isinstance(tokens, Quotable)
        return _Quotes(tokens)

    def answers(
        self, corpus: Corpus, tokens: Tokens, logits: Sequence[torch.Tensor], names: Sequence[str]
    ) -> list[tuple[int, dict[str, Any]]]:
        """Return ``answer``, ``start`` and ``end`` in the text, and ``score`` against there being no answer.

        Where there is none the answer is empty and has no place.
        """
        shown = []
        for text, quote in _quoted(tokens, dict(enumerate(logits))).items():
            said = _said((corpus.parts or [])[text]["context"], quote)
            place = {"start": quote.start, "end": quote.end} if said else {"start": None, "end": None}
            shown.append((text, {"answer": said, **place, "score": quote.score}))
        return shown

    def shown(self, answer: Mapping[str, Any]) -> str:
        """Return answer and question."""
        return f"{answer['answer'] or '(no answer in the text)'}\t{answer['text']}"


TASKS = (Span,)


def _said(context: str, quote: Quote) -> str:
    return context[quote.start : quote.end] if quote.score > 0 else ""


def _quoted(tokens: Tokens, logits: Mapping[int, torch.Tensor]) -> dict[int, Quote]:
    """Return the best span of each text over its rows.

    It is measured against the first token's logits in the row where they are lowest: a row without the answer
    rightly says that it has none.
    """
    assert tokens.places is not None
    found: dict[int, Quote] = {}
    for text in tokens.texts().tolist():
        best, nothing = (-np.inf, 0, 0), np.inf
        for row in tokens.rows_of(text):
            begin, length = int(tokens.starts[row]), int(tokens.lengths[row])
            places, values = tokens.places[begin : begin + length], logits[row].double().numpy()
            start, end = np.where(places[:, 1:] > 0, values, -np.inf).T
            first, last, score = best_span(start, end, _LONGEST)
            nothing = min(nothing, float(values[0].sum()))
            if score > best[0]:
                best = (score, int(places[first, 0]), int(places[last, 1]))
        found[text] = Quote(best[1], best[2], best[0] - nothing) if np.isfinite(best[0]) else Quote(0, 0, 0.0)
    return found


def _label(tokens: Tokens, row: int, wanted: Sequence[Sequence[Any]]) -> tuple[int, int]:
    """Return where a row's tokens hold the first answer, or (0, 0)."""
    assert tokens.places is not None
    if not wanted:
        return 0, 0
    begin = int(tokens.starts[row])
    places = tokens.places[begin : begin + int(tokens.lengths[row])]
    answer, start = wanted[0]
    start, end = start + len(answer) - len(answer.lstrip()), start + len(answer.rstrip())
    inside = np.flatnonzero(places[:, 1] > 0)
    held = inside[(places[inside, 1] > start) & (places[inside, 0] < end)]
    if not len(held) or places[inside[0], 0] > start or places[inside[-1], 1] < end:
        return 0, 0
    return int(held[0]), int(held[-1])


def _shortened(
    questions: Sequence[str], tokenizer: Any, longest: int
) -> tuple[list[str], np.ndarray[Any, np.dtype[np.bool_]]]:
    """Cut questions off after so many tokens; also return which were."""
    short, cut = list(questions), np.zeros(len(questions), dtype=np.bool_)
    if not tokenizer.is_fast or not short:  # what needs places says so
        return short, cut
    found = tokenizer(short, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for number, places in enumerate(found["offset_mapping"]):
        if len(places) > longest:
            short[number], cut[number] = short[number][: places[longest - 1][1]], True
    return short, cut
