"""Texts become rows of tokens: cut, split or left out where they are too long."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from fedllm.data.corpus import Corpus
from fedllm.data.rows import IGNORED, Answering, Batch, Choices, Quotable, Tokens
from fedllm.errors import DataError

__all__ = [
    "IGNORED",
    "Answering",
    "Batch",
    "Choices",
    "Overlong",
    "Quotable",
    "Tokens",
    "encode",
    "encode_pairs",
    "ragged",
    "windows",
]

Overlong = Literal["truncate", "split", "drop"]
"""What becomes of a text of too many tokens: its end is cut off, it becomes several rows, or none."""

WINDOW = 8
"""Characters per wanted token that are looked at first; English has four to five."""

_WORD_END = re.compile(r"(?<=\S) ")
_CROSSING = re.compile("[^\\s\u2581\u0120\u010a\u0109\u010b\u010c\u010d][ \u2581\u0120]")
"""A space after what is none, as vocabularies write them: plainly, as SentencePiece's lower block, or as the
letters that stand for white bytes in byte-level BPE."""


def encode(
    corpus: Corpus,
    tokenizer: Any,
    max_length: int,
    overlong: Overlong = "truncate",
    *,
    places: bool = False,
) -> Tokens:
    """Turn every text into at most ``max_length`` token numbers, once; labels are the corpus's classes.

    Args:
        corpus: the texts.
        tokenizer: of the model.
        max_length: tokens of a row at most, special tokens included.
        overlong: what becomes of longer texts. Split ones are rows one after the other that share no token.
        places: whether to note where in its text each token lies.

    Raises:
        DataError: a text has no token, ``max_length`` holds no more than the special tokens, or the tokenizer
            cannot do what is asked.
    """
    special = int(tokenizer.num_special_tokens_to_add())
    if max_length <= special:
        raise DataError(
            f"data.max_length = {max_length} leaves no room for text beside the tokenizer's {special} "
            f"special tokens; set it to {special + 1} at least"
        )
    if overlong == "truncate" and not places:
        ids, longer = _encode(corpus.texts, tokenizer, max_length)
        found = replace(ragged(ids, corpus.labels, tokenizer), cut=longer)
    else:
        found = windows(corpus, tokenizer, max_length, overlong, (corpus.texts,))
        found = found if places else replace(found, places=None)
    for row in np.flatnonzero(found.lengths == 0).tolist():
        index = row if found.owners is None else int(found.owners[row])
        raise DataError(f"text {index} has no token: {corpus.texts[index][:60]!r}")
    return found


def windows(
    corpus: Corpus,
    tokenizer: Any,
    max_length: int,
    overlong: Overlong,
    sides: tuple[list[str], ...],
    **settings: Any,
) -> Tokens:
    """Turn texts into rows with the place of each token in its text; see :func:`encode`.

    Args:
        corpus: says which labels the texts have.
        tokenizer: of the model; one that knows where its tokens come from.
        max_length: tokens of a row at most.
        overlong: what becomes of longer texts.
        sides: the texts, or questions and texts; places are those in the last.
        **settings: of the tokenizer, such as ``stride``.

    Raises:
        DataError: the tokenizer is none of Hugging Face's fast ones.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} does not tell where in a text its tokens come from, which splitting "
            "and dropping texts, tagging words and finding answers need: take a model with a fast tokenizer"
        )
    if not len(corpus):
        return replace(ragged([], corpus.labels, tokenizer), places=np.zeros((0, 2), dtype=np.int32))
    found = tokenizer(
        *sides,
        max_length=max_length,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        **{"truncation": True, "return_token_type_ids": False, **settings},
    )
    owners = np.asarray(found["overflow_to_sample_mapping"], dtype=np.int64)
    tokens = ragged(found["input_ids"], None, tokenizer)
    inside = np.fromiter(
        (side == len(sides) - 1 for row in range(len(tokens)) for side in found.sequence_ids(row)),
        dtype=np.bool_,
        count=len(tokens.flat),
    )
    offsets = np.array([place for row in found["offset_mapping"] for place in row], dtype=np.int32)
    tokens = replace(
        tokens,
        owners=owners,
        labels=None if corpus.labels is None else corpus.labels[owners],
        places=offsets.reshape(-1, 2) * inside[:, None],
    )
    if settings.get("return_token_type_ids"):
        kinds = (kind for row in found["token_type_ids"] for kind in row)
        tokens = replace(tokens, segments=np.fromiter(kinds, dtype=np.int8, count=len(tokens.flat)))
    if tokenizer.truncation_side == "left":  # windows come from the end of a text
        tokens = tokens.subset(np.lexsort((-np.arange(len(owners)), owners)))
    return _kept(tokens, overlong)


def _kept(tokens: Tokens, overlong: Overlong) -> Tokens:
    """Leave out the rows of long texts that are not wanted."""
    assert tokens.owners is not None
    if overlong == "split":
        return tokens
    _, first, rows = np.unique(tokens.owners, return_index=True, return_counts=True)
    if overlong == "drop":
        return tokens.subset(first[rows == 1])
    return replace(tokens.subset(first), owners=None, cut=rows > 1)


def encode_pairs(corpus: Corpus, pairs: Sequence[str], tokenizer: Any, max_length: int) -> Tokens:
    """Turn texts with their second halves into rows, as the tokenizer joins two; the longer one is cut first.

    Raises:
        DataError: ``max_length`` holds no more than the special tokens.
    """
    special = int(tokenizer.num_special_tokens_to_add(pair=True))
    if max_length <= special + 1:
        raise DataError(
            f"data.max_length = {max_length} leaves no room for two texts beside the tokenizer's {special} "
            f"special tokens; set it to {special + 2} at least"
        )
    settings = {"truncation": "longest_first", "max_length": max_length, "return_token_type_ids": True}
    found: Any = tokenizer(corpus.texts, list(pairs), **settings) if len(corpus) else {"input_ids": []}
    ids = found["input_ids"]
    cut = [
        len(row) == max_length and tokenizer.is_fast and bool(found.encodings[number].overflowing)
        for number, row in enumerate(ids)
    ]
    tokens = replace(ragged(ids, corpus.labels, tokenizer), cut=np.array(cut, dtype=np.bool_))
    if "token_type_ids" not in tokenizer.model_input_names:
        return tokens
    rows = found.get("token_type_ids", [])
    segments = np.fromiter((kind for row in rows for kind in row), dtype=np.int8, count=len(tokens.flat))
    return replace(tokens, segments=segments)


def ragged(ids: Sequence[Sequence[int]], labels: np.ndarray[Any, Any] | None, tokenizer: Any) -> Tokens:
    """Lay token numbers of rows one after the other."""
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    flat = np.fromiter((token for row in ids for token in row), dtype=np.int32, count=int(lengths.sum()))
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64) if len(ids) else lengths
    return Tokens(flat, starts, lengths, labels, int(tokenizer.pad_token_id))


def _encode(
    texts: list[str], tokenizer: Any, max_length: int
) -> tuple[list[list[int]], np.ndarray[Any, np.dtype[np.bool_]]]:
    """Tokenise only the beginnings of long texts: the rest would be computed and thrown away.

    Most tokenizers never look across a space after a word, so the tokens of a text cut there are those of
    the whole text. Where one does, or a beginning falls short of ``max_length`` tokens, the whole text is
    taken after all. Also returned is whether each text has more tokens than are kept.
    """

    def encode(some: list[str]) -> tuple[list[list[int]], list[bool]]:
        settings = {"truncation": True, "max_length": max_length, "return_attention_mask": False}
        if not some:
            return [], []
        found = tokenizer(some, **settings)
        ids: list[list[int]] = found["input_ids"]
        full = [i for i, tokens in enumerate(ids) if len(tokens) == max_length]
        longer = [False] * len(ids)
        if full and tokenizer.is_fast:
            for i in full:
                longer[i] = bool(found.encodings[i].overflowing)
        elif full:
            whole = tokenizer([some[i] for i in full], verbose=False)["input_ids"]
            for i, tokens in zip(full, whole, strict=True):
                longer[i] = len(tokens) > max_length
        return ids, longer

    beginnings = [_beginning(text, WINDOW * max_length) for text in texts]
    if beginnings == texts or tokenizer.truncation_side != "right" or _crosses_spaces(tokenizer):
        ids, longer = encode(texts)
        return ids, np.array(longer, dtype=np.bool_)
    ids, longer = encode(beginnings)
    part = [len(beginning) < len(text) for beginning, text in zip(beginnings, texts, strict=True)]
    short = [i for i, tokens in enumerate(ids) if len(tokens) < max_length and part[i]]
    for i, tokens, more in zip(short, *encode([texts[i] for i in short]), strict=True):
        ids[i], longer[i] = tokens, more
    for i in set(np.flatnonzero(part).tolist()) - set(short):
        longer[i] = longer[i] or bool(texts[i][len(beginnings[i]) :].strip())
    return ids, np.array(longer, dtype=np.bool_)


def _beginning(text: str, length: int) -> str:
    """Cut a text at the first space after a word from ``length`` characters on, if there is one."""
    end = _WORD_END.search(text, length)
    return text[: end.start()] if end else text


def _crosses_spaces(tokenizer: Any) -> bool:
    """Whether a token may hold the end of a word and the space after it.

    Byte-level BPE without a regex merges words; what is no Rust tokenizer may read a text as it likes.
    """
    return not tokenizer.is_fast or any(_CROSSING.search(token) for token in tokenizer.get_vocab())
