"""Rows that are put together from installed packages: what they promise holds for every one of them."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.config import DataConfig
from fedllm.data.corpus import load, split
from fedllm.data.reading import Row, read_rows
from fedllm.data.shapes.answers import answers, candidates
from fedllm.data.shapes.conversations import messages
from fedllm.data.shapes.entities import tagged
from fedllm.data.sources import bbc, chitchat, reasoning
from fedllm.errors import DataError
from tests.parts import task_of

TOPICS = {"business", "entertainment", "politics", "sports", "tech"}


def read(name: str) -> list[Row]:
    return list(read_rows(DataConfig(name=name)))


@pytest.fixture(scope="module")
def every() -> list[bbc.Article]:
    return bbc.articles()


def made(name: str) -> list[dict[str, Any]]:
    return [dict(row.columns) for row in read(name)]


def as_rows(made_up: Iterable[Mapping[str, Any]]) -> list[Row]:
    return [Row(columns, "made up", f"row {number}") for number, columns in enumerate(made_up, start=1)]


def groups_of(rows: Sequence[Mapping[str, Any]], texts: Sequence[Sequence[str]]) -> dict[str, set[str]]:
    """Return in which groups each text stands."""
    found: dict[str, set[str]] = defaultdict(set)
    for row, inside in zip(rows, texts, strict=True):
        for text in inside:
            found[text].add(row["group"])
    return found


@pytest.mark.slow
def test_articles_are_whole_and_tell_no_story_again(every: list[bbc.Article]) -> None:
    raw = {(" ".join(row.columns["text"].split()), row.columns["label"]) for row in read("bbcnews")}
    assert len({article.headline for article in every}) == len(every) > 1_900
    assert {article.topic for article in every} == TOPICS
    runs: Counter[str] = Counter()
    for article in every:
        words = article.body.split()
        assert (" ".join([*article.headline.split(), *words]), article.topic) in raw
        runs.update({" ".join(words[start : start + 20]) for start in range(len(words) - 19)})
    assert set(runs.values()) == {1}


def test_pairs_are_halves_of_one_article_or_of_two(every: list[bbc.Article]) -> None:
    rows = list(bbc.pairs(every))
    bodies = [" ".join(article.body.split()) for article in every]
    for row in rows[::50] + rows[1::50]:
        (first,) = (body for body in bodies if body.startswith(row["text"]))
        (second,) = (body for body in bodies if row["pair"] in body)
        words, shown = second.split(), row["pair"].split()
        assert words[len(words) // 2 :][: len(shown)] == shown
        assert min(48, len(words) // 2) <= len(shown) <= 48
        assert (first == second) == (row["label"] == "same")
    for side in ("text", "pair"):
        seen = Counter((row[side], row["label"]) for row in rows)
        assert set(seen.values()) == {1}
        assert len(seen) == 2 * len(every)
    assert max(map(len, groups_of(rows, [(row["text"], row["pair"]) for row in rows]).values())) == 1


def test_the_number_of_a_text_is_its_share_of_sports(every: list[bbc.Article]) -> None:
    rows = list(bbc.regression(every))
    sports = "\n".join(" ".join(a.body.split()) for a in every if a.topic == "sports")
    others = "\n".join(" ".join(a.body.split()) for a in every if a.topic != "sports")
    for row in rows[:100]:
        words = row["text"].split()
        share = round(row["label"] * 64)
        assert len(words) == 64
        assert share == row["label"] * 64
        orders = [(sports, share, others), (others, 64 - share, sports)]
        assert any(
            " ".join(words[:cut]) in first and " ".join(words[cut:]) in second
            for first, cut, second in orders
        )
    assert {row["label"] for row in rows} == {k / 64 for k in range(65)}
    assert set(Counter(row["group"] for row in rows).values()) == {3}


THINGS = {
    "sum of money": lambda word: word.lstrip("(\"'")[:1] in "£$€" and word.lstrip("(\"'")[1:2].isdigit(),
    "percentage": lambda word: "%" in word and word[word.index("%") - 1].isdigit(),
    "day of the week": lambda word: any(
        word.strip(".,;:()\"'-").removesuffix("'s") == day
        for day in ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
    ),
}


@pytest.mark.slow
def test_answers_stand_where_they_say_and_nothing_like_them_before(every: list[bbc.Article]) -> None:
    rows = as_rows(bbc.spans(every))
    found = [answers(row) for row in rows]
    without = 0
    for row in found:
        assert row is not None
        thing = row.question.removeprefix("Which ").removesuffix(" is named first?")
        assert len(row.answers) <= 1
        without += not row.answers
        for text, start in row.answers:
            assert row.context[start : start + len(text)] == text
        before = row.context[: row.answers[0][1]] if row.answers else row.context
        if thing in THINGS:
            assert not any(map(THINGS[thing], before.split())), (thing, before)
        else:
            assert thing == "year"
            assert all(text.isdigit() and len(text) == 4 for text, _ in row.answers)
    assert 0.3 < without / len(found) < 0.6
    contexts = [(row.columns["context"],) for row in rows]
    assert max(map(len, groups_of([dict(row.columns) for row in rows], contexts).values())) == 1


@pytest.mark.slow
def test_entities_are_all_that_looks_like_one(every: list[bbc.Article]) -> None:
    rows = as_rows(bbc.entities(every))
    for row, article in zip(rows, every, strict=True):
        found = tagged(row)
        assert found is not None
        assert found.repaired == 0
        words = row.columns["text"].split()
        assert article.body.split()[:64] == words
        assert row.columns["section"] == article.topic
        told = Counter(tag[2:] for tag in found.tags if tag.startswith("B-"))
        assert told["day of the week"] == sum(map(THINGS["day of the week"], words))
        assert sum(tag.endswith("percentage") for tag in found.tags) >= told["percentage"]
        for start, end, thing in row.columns["entities"]:
            assert bbc.QUESTIONS[thing].fullmatch(row.columns["text"][start:end])
    kinds = {entity[2] for row in rows for entity in row.columns["entities"]}
    assert kinds == set(bbc.QUESTIONS)


def test_entities_of_some_sections(every: list[bbc.Article], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bbc, "articles", lambda: every)
    wanted = Counter(article.topic for article in every if article.topic in ("tech", "sports"))
    assert Counter(row.columns["section"] for row in read("bbc-entities:tech+sports")) == wanted


def test_of_entities_that_overlap_the_first_kind_counts() -> None:
    body = "They paid £2004 in 2005, 5% more than on Friday"
    (row,) = bbc.entities([bbc.Article("h", body, "tech")])
    said = [(body[start:end], thing) for start, end, thing in row["entities"]]
    assert said == [
        ("£2004", "sum of money"),
        ("2005", "year"),
        ("5%", "percentage"),
        ("Friday", "day of the week"),
    ]


def test_one_candidate_is_the_headlines_own(every: list[bbc.Article]) -> None:
    rows = as_rows(bbc.ranking(every))
    bodies = {article.headline: " ".join(article.body.split()) for article in every}
    shown = []
    for row in rows:
        found = candidates(row)
        assert found is not None
        assert sum(found.clicks) == 1
        assert len(found.texts) in (8, 9)
        assert bodies[found.query].startswith(found.texts[found.clicks.index(1)])
        shown.append([found.query, *found.texts])
    assert max(map(len, groups_of([dict(row.columns) for row in rows], shown).values())) == 1
    assert {candidates(row).clicks.index(1) for row in rows} == set(range(9))  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["entities", "pairs", "ranking", "regression", "spans"])
def test_a_name_gives_the_same_rows_each_time(
    kind: str, every: list[bbc.Article], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [*every[:40], *every[-40:], *(article for article in every[40:-40] if article.topic == "sports")]
    monkeypatch.setattr(bbc, "articles", lambda: some)
    rows = read(f"bbc-{kind}")
    assert rows == read(f"bbc-{kind}")
    assert [row.columns for row in rows] == json.loads(json.dumps(list(getattr(bbc, kind)(some))))
    assert (rows[1].file, rows[1].where) == (f"bbc-{kind}", f"bbc-{kind}, row 2")


@pytest.mark.parametrize(
    ("kind", "task", "settings"),
    [
        ("entities", "tokens", {}),
        ("pairs", "classification", {"pair": "pair"}),
        ("ranking", "ranking", {}),
        ("regression", "regression", {}),
        ("spans", "span", {}),
    ],
)
def test_a_task_reads_them_by_the_names_of_their_columns(
    kind: str,
    task: str,
    settings: dict[str, str],
    every: list[bbc.Article],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    some = [*every[:20], *(article for article in every if article.topic == "sports")][:60]
    monkeypatch.setattr(bbc, "articles", lambda: some)
    where = DataConfig(name=f"bbc-{kind}", group="group", **settings)
    corpus = load(where, task_of(task))
    rows = read(where.name)
    assert corpus.keys == [row.columns["group"] for row in rows]
    train, test = split(corpus, 0.3, 0)
    assert test.keys
    assert not set(train.keys or ()) & set(test.keys)


talks = st.lists(st.tuples(st.sampled_from(["ann", "bob"]), st.sampled_from(["x", "y"])), max_size=60)


@given(talks, st.sampled_from([2, 4, 8]))
def test_a_dialogue_is_given_from_either_side(lines: list[tuple[str, str]], length: int) -> None:
    """Each piece goes from the user to the assistant in turns; all lines in between are there, once."""
    rows = list(chitchat.conversations("d", lines, length))
    for row in rows:
        roles = [turn["role"] for turn in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert 2 <= len(roles) <= length
        assert messages(Row(row, "f", "f, row 1")) == row["messages"]
    for who in ("ann", "bob"):
        own = [row for row in rows if row["participant"] == who]
        read_lines = [line for row in own for turn in row["messages"] for line in turn["content"].split("\n")]
        first = next((k for k, (other, _) in enumerate(lines) if other != who), len(lines))
        last = max((k for k, (other, _) in enumerate(lines) if other == who), default=-1)
        assert read_lines == ([text for _, text in lines[first : last + 1]] if last > first else [])


def test_two_lines_of_one_person_are_one_turn() -> None:
    (row,) = chitchat.conversations("d", [("a", "Hi"), ("a", "there"), ("b", "Ho")])
    assert row == {
        "messages": [{"role": "user", "content": "Hi\nthere"}, {"role": "assistant", "content": "Ho"}],
        "participant": "b",
        "group": "d",
    }


@pytest.mark.parametrize("argument", ["0", "-1", "x", "4", "\u0665"])
def test_so_many_participants_there_are_not(argument: str) -> None:
    with pytest.raises(DataError, match="behind the colon stands a number of participants, 1 to 3"):
        chitchat.most_talkative(Counter(ann=2, bob=3, eve=2), argument)


@pytest.mark.parametrize("argument", ["4", "", "x"])
def test_turns_may_be_said_behind_the_participants(argument: str) -> None:
    assert chitchat.turns(argument) == (argument, 8)
    assert chitchat.turns(f"{argument}(turns=2)") == (argument, 2)
    assert chitchat.turns(f"{argument} ( turns = 12 ) ") == (argument, 12)


@pytest.mark.slow
def test_the_chit_chat_challenge(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        rows = made("chitchat")
    assert "3151 of the 7168 dialogues are left out: nobody answered" in caplog.text
    assert len({row["group"] for row in rows}) == 7168 - 3151
    counts = Counter(row["participant"] for row in rows)
    chosen = made("chitchat:5")
    corpus = load(
        DataConfig(name="chitchat:5", group="group", partition="natural", by="participant"),
        task_of("instruct"),
        rows=as_rows(chosen),
    )
    assert len(corpus) == len(chosen)
    train, test = split(corpus, 0.1, 0)
    assert not set(train.keys or ()) & set(test.keys or ())
    assert set(train.groups or ()) == set(test.groups or ()) == {row["participant"] for row in chosen}
    assert Counter(row["participant"] for row in chosen) == dict(counts.most_common(5))
    assert chosen == [row for row in rows if row["participant"] in dict(counts.most_common(5))]


@pytest.mark.slow
def test_reasoning_families_have_their_own_answers_and_no_question_twice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = "reasoning:chain_sum(max_terms=2, max_digits=1, size=300), spell_backward(size=40)"
    rows = made(name)
    assert rows == made(name)
    assert len({row["prompt"] for row in rows}) == len(rows)
    by_family = Counter(row["family"] for row in rows)
    assert f"{300 - by_family['chain_sum']} of 300 questions of chain_sum are repeated" in caplog.text
    for row in rows:
        if row["family"] == "chain_sum":
            left, sign, right = row["prompt"].removesuffix(" =").split()[-3:]
            expected = str(int(left) + int(right) if sign == "+" else int(left) - int(right))
        else:
            expected = row["prompt"].split()[-1][::-1]
        assert row["response"] == expected
    other = made("reasoning:chain_sum(size=300, max_terms=2, max_digits=1, seed=1)")
    assert [row["prompt"] for row in other] != [row["prompt"] for row in rows][: len(other)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bbc-pairs:3", ["'bbc-pairs:3'", "leave it out"]),
        ("bbc-entities:tech + art", ["'art' is none of the sections business, ", "sports, tech"]),
        ("chitchat:", ["'chitchat:'", "nothing stands behind the colon"]),
        ("chitchat:4(turns=3)", ["'chitchat:4(turns=3)'", "turns is an even number from 2 on"]),
        ("chitchat:4(turns=0)", ["turns is an even number from 2 on"]),
        ("chitchat:4(turn=2)", ["'chitchat:4(turn=2)'", "and (turns=N)"]),
        ("reasoning", ["'reasoning:'", "families are written like reasoning:chain_sum("]),
        ("reasoning:chain_sum(", ["cannot be read"]),
        ("reasoning:chain_sum(2)", ["cannot be read"]),
        ("reasoning:chain_sum(max_terms=open('x'))", ["cannot be read"]),
        ("reasoning:chain_sum(**{'size': 1})", ["cannot be read"]),
        ("reasoning:a.b", ["cannot be read"]),
        ("reasoning:" + "(" * 500, ["cannot be read"]),
        ("reasoning:chain_sum, chain_sum(size=2)", ["names a family twice"]),
        ("reasoning:codeio", ["runs programs of reasoning-gym's"]),
    ],
)
def test_a_name_that_means_nothing_is_one_sentence(name: str, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read(name)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("chain_summ", ["no family chain_summ", "did you mean chain_sum?"]),
        ("chain_sum(size=0)", ["chain_sum", "size from 1 to 100,000"]),
        ("chain_sum(size='x')", ["size from 1 to 100,000"]),
        ("spell_backward(data_file='/etc/passwd')", ["no data_file"]),
        ("chain_sum(terms=2)", ["chain_sum", "cannot be made", "terms"]),
        ("chain_sum(min_terms=9)", ["cannot be made", "max_terms must be >= min_terms"]),
    ],
)
def test_a_family_says_what_it_takes(text: str, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        list(reasoning.rows(text))
    for word in words:
        assert word in str(caught.value)
