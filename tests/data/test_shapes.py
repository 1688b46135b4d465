"""Shapes of conversations, entities, answers and candidates, and what is wrong with others."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.data.reading import Row
from fedllm.data.shapes.answers import Answers, Candidates, answers, candidates
from fedllm.data.shapes.conversations import Preference, conversation_shape, messages, preference
from fedllm.data.shapes.entities import Tagged, iob2, tagged, tagged_by_spans, words
from fedllm.errors import DataError


def row(**columns: Any) -> Row:
    return Row(columns, "a.jsonl", "a.jsonl, line 7")


def turns(*said: str) -> list[dict[str, str]]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[text[0]], "content": text[2:]} for text in said]


@pytest.mark.parametrize(
    ("shape", "columns"),
    [
        ("messages", {"messages": turns("u Hi", "a Ho")}),
        ("messages", {"messages": json.dumps(turns("u Hi", "a Ho"))}),
        ("messages", {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}),
        ("messages", {"messages": turns("u Hi", "a Ho"), "prompt": "Hi", "response": "not this"}),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, *turns("a Ho")]},
        ),
        ("conversations", {"conversations": [{"from": "human", "value": "Hi"}, *turns("a Ho")]}),
        ("prompt and response", {"prompt": "Hi", "response": "Ho"}),
        ("prompt and response", {"messages": None, "prompt": "Hi", "response": "Ho"}),
        ("prompt and response", {"prompt": turns("u Hi"), "response": turns("a Ho")}),
        ("prompt and completion", {"prompt": "Hi", "completion": "Ho"}),
        ("instruction, input and output", {"instruction": "Hi", "output": "Ho"}),
        ("instruction, input and output", {"instruction": "Hi", "input": "", "output": "Ho"}),
        ("instruction, input and output", {"instruction": "Hi", "input": None, "output": "Ho"}),
    ],
)
def test_a_conversation_is_the_same_in_every_shape(shape: str, columns: dict[str, Any]) -> None:
    assert conversation_shape(row(**columns)) == shape
    assert messages(row(**columns)) == turns("u Hi", "a Ho")


def test_a_system_turn_stands_first() -> None:
    assert messages(row(system="Be brief.", instruction="Add.", input="1", output="2")) == turns(
        "s Be brief.", "u Add.\n\n1", "a 2"
    )
    developer = [{"role": "developer", "content": "Be brief."}, *turns("u Hi", "a Ho")]
    assert messages(row(messages=developer)) == turns("s Be brief.", "u Hi", "a Ho")


def test_columns_may_have_other_names() -> None:
    other = row(messages=turns("u not", "a this"), question="Hi", reply="Ho")
    assert messages(other, {"prompt": "question", "response": "reply"}) == turns("u Hi", "a Ho")
    with pytest.raises(DataError, match="line 7: there is no conversation in the columns messages, question"):
        messages(other, {"prompt": "asked"})


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": None},
        {"messages": ""},
        {"messages": []},
        {"messages": turns("u Hi")},
        {"messages": turns("u Hi", "a \u200b")},
        {"prompt": "Hi", "response": None},
        {"prompt": "Hi", "response": " "},
        {"prompt": "", "response": "Ho"},
        {"prompt": float("nan"), "response": "Ho"},
    ],
)
def test_a_conversation_without_an_answer_teaches_nothing(columns: dict[str, Any]) -> None:
    assert messages(row(**columns)) is None


ODD = "\ufeff\u202b\u0645\u0631\u062d\u202c \r\n\x00 \U0001f469\u200d\U0001f467 e\u0301" + "x" * 100_000


def test_texts_stay_character_for_character() -> None:
    assert messages(row(prompt=ODD, response=ODD)) == turns(f"u {ODD}", f"a {ODD}")
    assert tagged(row(tokens=[ODD, ""], tags=["B-x", "O"])) == Tagged([ODD, ""], ["B-x", "O"], 0)
    found = answers(row(question=ODD, context=ODD, answers={"text": ["\x00"], "answer_start": [9]}))
    assert found == Answers(ODD, ODD, [("\x00", 9)])
    assert candidates(row(query=ODD, candidates=[ODD], clicks=[1])) == Candidates(ODD, [ODD], [1])


@pytest.mark.parametrize(
    ("read", "columns", "words"),
    [
        (messages, {"body": "x"}, ["no conversation", "body", "messages", "instruction, input and output"]),
        (messages, {"messages": "Hi"}, ["'messages' must hold a list, not str Hi"]),
        (messages, {"messages": "[{"}, ["'messages' is not valid JSON"]),
        (messages, {"messages": ["Hi"]}, ["turn 1 of column 'messages'", "role and content", "str Hi"]),
        (messages, {"messages": [{"role": "user"}]}, ["turn 1", "role and content", "not role"]),
        (
            messages,
            {"messages": [*turns("u Hi"), {"role": "narrator", "content": ""}]},
            ["turn 2", "'narrator'"],
        ),
        (messages, {"messages": [{"role": "tool", "content": "3"}]}, ["'tool'", "known are system"]),
        (messages, {"messages": [{"role": ["x"], "content": "3"}]}, ["said by ['x']"]),
        (
            messages,
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            ["turn 1", "calls a tool"],
        ),
        (messages, {"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, ["weight 0"]),
        (
            messages,
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            ["type image", "only text"],
        ),
        (messages, {"messages": [{"role": "user", "content": 7}]}, ["turn 1", "must be text, not int 7"]),
        (messages, {"prompt": "a \ud83d", "response": "b"}, ["'prompt' holds text with half a character"]),
        (messages, {"prompt": {"a": 1}, "response": "b"}, ["'prompt' must be text, not dict"]),
        (preference, {"prompt": "a", "chosen": "b"}, ["no column 'rejected'", "prompt, chosen"]),
        (
            preference,
            {"prompt": "a", "chosen": turns("u c", "a b"), "rejected": "d"},
            ["'chosen' must go on from 'prompt' with the assistant", "with the user"],
        ),
        (
            preference,
            {"chosen": turns("u a", "a b"), "rejected": turns("u c", "a d")},
            ["'chosen' must go on", "with the user"],
        ),
        (tagged, {"text": "x"}, ["no entities", "tokens and tags"]),
        (tagged, {"tokens": ["a", "b"], "tags": ["O"]}, ["2 tokens have 1 tags"]),
        (tagged, {"tokens": "a b", "tags": ["O", "O"]}, ["'tokens' must hold a list, not str a b"]),
        (tagged, {"tokens": ["a", 3], "tags": ["O", "O"]}, ["an item of column 'tokens'", "int 3"]),
        (tagged, {"tokens": ["a"], "tags": [3]}, ["'tags': int 3 is no tag", "B-KIND"]),
        (tagged, {"tokens": ["a"], "tags": ["NOUN"]}, ["str NOUN is no tag"]),
        (tagged, {"tokens": ["a"], "tags": ["B-"]}, ["str B- is no tag"]),
        (tagged, {"text": "Rio", "spans": [[0, 4, "city"]]}, ["'spans': span 0 to 4", "3 characters"]),
        (tagged, {"text": "Rio", "spans": [[2, 2, "city"]]}, ["span 2 to 2"]),
        (tagged, {"text": "a  b", "spans": [[1, 3, "city"]]}, ["span 1 to 3 holds nothing"]),
        (tagged, {"text": "a b", "spans": [[0, 3, "x"], [2, 3, "y"]]}, ["0 to 3 and 2 to 3 overlap"]),
        (tagged, {"text": "Rio", "spans": [{"start": 0, "end": 3}]}, ["start, end and label", "'end': 3"]),
        (tagged, {"text": "Rio", "spans": ["Rio"]}, ["start, end and label", "str Rio"]),
        (
            tagged,
            {"text": "\U0001f600 Rio", "spans": [{"start": 3, "end": 6, "label": "city", "text": "Rio"}]},
            ["'Rio' is not what stands from 3 to 6", "'io'", "Unicode characters"],
        ),
        (answers, {"question": "q", "context": "c"}, ["no column 'answers'"]),
        (answers, {"question": "q", "context": 3, "answers": []}, ["'context' must be text, not int 3"]),
        (answers, {"question": "q", "context": "ab", "answers": ["b"]}, ["two lists of one length", "'b'"]),
        (
            answers,
            {"question": "q", "context": "ab", "answers": {"text": ["b"], "answer_start": []}},
            ["two lists of one length"],
        ),
        (
            answers,
            {"question": "q", "context": "ab", "answers": {"text": ["b"], "answer_start": [0]}},
            ["'b' does not stand at 0", "it stands at 1"],
        ),
        (
            answers,
            {"question": "q", "context": "ab", "answers": {"text": ["b"], "answer_start": [-1]}},
            ["'b' does not stand at -1"],
        ),
        (
            answers,
            {"question": "q", "context": "ab", "answers": [{"text": "x", "answer_start": 0}]},
            ["nowhere in the context"],
        ),
        (
            answers,
            {"question": "q", "context": "ab", "answers": [{"text": "b", "answer_start": "1"}]},
            ["str b and str 1"],
        ),
        (candidates, {"query": "q", "candidates": ["a"]}, ["no column 'clicks'"]),
        (candidates, {"query": "q", "candidates": ["a"], "clicks": [1, 0]}, ["1 candidates have 2 clicks"]),
        (
            candidates,
            {"query": "q", "candidates": ["a"], "clicks": [2]},
            ["'clicks': int 2 is neither 0 nor 1"],
        ),
        (candidates, {"query": "q", "candidates": [None, 3], "clicks": [1, 0]}, ["an item of", "int 3"]),
    ],
)
def test_another_shape_is_one_sentence_with_its_place(
    read: Callable[[Row], object], columns: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        read(row(**columns))
    assert str(caught.value).startswith("a.jsonl, line 7: ")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "Hi", "chosen": "Ho", "rejected": "No"},
        {"prompt": turns("u Hi"), "chosen": turns("a Ho"), "rejected": turns("a No")},
        {"prompt": "Hi", "chosen": turns("u Hi", "a Ho"), "rejected": turns("u Hi", "a No")},
        {"chosen": turns("u Hi", "a Ho"), "rejected": turns("u Hi", "a No")},
        {"prompt": [], "chosen": turns("u Hi", "a Ho"), "rejected": turns("u Hi", "a No")},
    ],
)
def test_a_preference_is_the_same_in_every_shape(columns: dict[str, Any]) -> None:
    assert preference(row(**columns)) == Preference(turns("u Hi"), turns("a Ho"), turns("a No"))


def test_a_preference_lacks_nothing() -> None:
    assert preference(row(prompt="Hi", chosen="", rejected="No")) is None
    assert preference(row(chosen=turns("a Ho"), rejected=turns("a No"))) is None
    same = turns("u Hi", "a Ho")
    assert preference(row(chosen=same, rejected=same)) is None
    assert preference(row(prompt="Hi", chosen="Ho", rejected="Ho")) is None


ENTITIES = {"IOB1": "I I B O I", "IOB2": "B I B O B", "IOBES": "B E S O S", "BILOU": "B L U O U"}


@pytest.mark.parametrize("scheme", ENTITIES)
def test_entities_are_the_same_in_every_scheme(scheme: str) -> None:
    """Two words and one word of a kind side by side, a gap, and one word."""
    written = [f"{mark}-x" if mark != "O" else mark for mark in ENTITIES[scheme].split()]
    expected = ["B-x", "I-x", "B-x", "O", "B-x"]
    assert iob2(written) == (expected, sum(a != b for a, b in zip(written, expected, strict=True)))


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """Entities of sound IOB2 tags, by looking at each beginning: where, how long, of which kind."""
    found = set()
    for start, tag in enumerate(tags):
        if tag.startswith("B-"):
            end = start + 1
            while end < len(tags) and tags[end] == "I" + tag[1:]:
                end += 1
            found.add((start, end, tag[2:]))
    return found


spans = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2), st.sampled_from(["a", "b-c"])), max_size=6)


@given(spans)
def test_iob1_says_the_same_entities_as_iob2(lengths: list[tuple[int, int, str]]) -> None:
    """In IOB1 an entity begins with B only behind one of its kind (Ramshaw and Marcus, 1995)."""
    iob1: list[str] = []
    expected = set()
    for length, gap, kind in lengths:
        iob1 += ["O"] * gap
        first = "B" if iob1 and iob1[-1][2:] == kind else "I"
        expected.add((len(iob1), len(iob1) + length, kind))
        iob1 += [f"{first}-{kind}", *[f"I-{kind}"] * (length - 1)]
    fixed, repaired = iob2(iob1)
    assert entities(fixed) == expected
    assert iob2(fixed) == (fixed, 0)
    assert repaired == sum(a != b for a, b in zip(iob1, fixed, strict=True))


@given(st.text(max_size=40), st.data())
def test_spans_come_back_from_words_and_tags(text: str, data: st.DataObject) -> None:
    """Whatever the text: every character but white space is in one word, spans are whole words."""
    visible = [k for k, c in enumerate(text) if c.isalnum()]
    start, end = 0, 0
    if visible:
        start = data.draw(st.sampled_from(visible))
        end = data.draw(st.integers(start + 1, len(text)))
    given_spans = [(start, end, "x")] if visible else []
    places = list(words(text, [start, end]))
    assert "".join(text[a:b] for a, b in places) == "".join(c for c in text if not c.isspace())
    found = tagged_by_spans(text, given_spans)
    assert found.tokens == [text[a:b] for a, b in places]
    inside = [word for word, tag in zip(found.tokens, found.tags, strict=True) if tag != "O"]
    assert "".join(inside) == "".join(c for c in text[start:end] if not c.isspace())
    assert [tag for tag in found.tags if tag != "O"] == ["B-x", *["I-x"] * (len(inside) - 1)][: len(inside)]


@pytest.mark.parametrize("span", [[8, 13, "city"], {"start": 8, "end": 13, "label": "city"}])
@pytest.mark.parametrize("column", ["spans", "entities"])
def test_entities_from_text_and_spans(column: str, span: object) -> None:
    expected = Tagged(
        ["\U0001f600", "(", "New", "\u05d7\u05d9", "\u05e4\u05d4", ")", "!"],
        ["O", "O", "O", "B-city", "I-city", "O", "O"],
        0,
    )
    text = "\U0001f600  (New \u05d7\u05d9 \u05e4\u05d4)!"
    assert tagged(row(**{"text": text, column: [span]})) == expected
    assert tagged(row(**{"text": text, column: []})) == expected._replace(tags=["O"] * 7)


def test_spans_may_touch() -> None:
    assert tagged_by_spans("\u6771\u4eac", [(1, 2, "b"), (0, 1, "a")]).tags == ["B-a", "B-b"]


def test_nothing_to_tag() -> None:
    assert tagged(row(tokens=[], tags=[])) is None
    assert tagged(row(tokens="", tags="")) is None
    assert tagged(row(tokens=["\u200b"], tags=["O"])) is None
    assert tagged(row(text=" ", spans=[])) is None


@pytest.mark.parametrize(
    "given_answers",
    [
        {"text": ["b", "bc"], "answer_start": [1, 1]},
        [{"text": "b", "answer_start": 1}, {"text": "bc", "answer_start": 1}],
        '{"text": ["b", "bc"], "answer_start": [1, 1]}',
    ],
)
def test_answers_are_the_same_in_every_shape(given_answers: object) -> None:
    found = answers(row(question="q", context="abc", answers=given_answers))
    assert found == Answers("q", "abc", [("b", 1), ("bc", 1)])


@pytest.mark.parametrize("none", [None, "", [], {"text": [], "answer_start": []}])
def test_a_question_may_have_no_answer(none: object) -> None:
    assert answers(row(question="q", context="abc", answers=none)) == Answers("q", "abc", [])
    assert answers(row(question=" ", context="abc", answers=none)) is None


def test_candidates_with_clicks() -> None:
    assert candidates(row(query="q", candidates='["a", "b"]', clicks="[0, 1]")) == Candidates(
        "q", ["a", "b"], [0, 1]
    )
    assert candidates(row(query="", candidates=["a"], clicks=[1])) is None
    assert candidates(row(query="q", candidates=[], clicks=[])) is None
