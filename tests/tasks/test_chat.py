"""Where an answer begins and ends in the tokens of a conversation: exactly, or said not to be known."""

from __future__ import annotations

from typing import Any

import pytest

from fedllm import tasks
from fedllm.config import RunConfig
from fedllm.errors import DataError
from fedllm.tasks.chat import Answered, cut, end_of_turn, fit, render, turn_ends, with_answers
from tests.talking import CHATML, tokenizer

ASK, SAY = {"role": "user", "content": "what is zinc?"}, {"role": "assistant", "content": " a metal."}
MORE, ALSO = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello there, you"}
TALK = [ASK, SAY, MORE, ALSO]

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPPED = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
FORGETFUL = CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['content'] if loop.last or m['role'] != 'assistant' else m['content'].split('</think>')[-1] }}",
)
GLUED = CHATML.replace("assistant\n", "assistant: ").replace("{{ m['role'] }}\n", "{{ m['role'] }}: ")
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
)
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
) + CHATML


def said(found: Answered, words: Any) -> list[str]:
    """Decode each run of answer tokens."""
    runs: list[list[int]] = []
    for index, token in enumerate(found.ids):
        if found.mask[index]:
            if not index or not found.mask[index - 1]:
                runs.append([])
            runs[-1].append(token)
    return [words.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, [" a metal.<|im_end|>", "hello there, you<|im_end|>"]),
        (MARKED, [" a metal.<|im_end|>", "hello there, you<|im_end|>"]),
        (STRIPPED, ["a metal.<|im_end|>", "hello there, you<|im_end|>"]),
        (FORGETFUL, [" a metal.<|im_end|>", "hello there, you<|im_end|>"]),
        (None, [" a metal.<|end|>", "hello there, you<|end|>"]),
    ],
    ids=["prefix", "marks", "strips", "forgets", "plain"],
)
def test_answers_are_what_the_assistant_says_and_its_end(template: str | None, answers: list[str]) -> None:
    words = tokenizer(template)
    found = with_answers(words, TALK)
    assert said(found, words) == answers
    assert found.ids == render(words, TALK, generation_prompt=False)
    assert len(found.ids) == len(found.mask)
    # What a model is asked with is what it learnt the answer to.
    asked = render(words, TALK[:3], generation_prompt=True)
    assert found.ids[: len(asked)] == asked
    assert found.mask[len(asked) - 1 : len(asked) + 1] == [False, True]


def test_the_plain_template_is_the_documented_one() -> None:
    words = tokenizer(None)
    talk = [{"role": "system", "content": "be brief"}, *TALK[:3]]
    assert words.decode(render(words, talk, generation_prompt=True)) == (
        "System:\nbe brief\nUser:\nwhat is zinc?\nAssistant:\n a metal.<|end|>User:\nhello\nAssistant:\n"
    )


def test_a_text_begins_as_the_tokenizer_begins_texts() -> None:
    from tokenizers.processors import TemplateProcessing

    words = tokenizer(None)
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 1), ("<|end|>", 2)]
    )
    ids = render(words, [ASK], generation_prompt=True)
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 1, 0)


@pytest.mark.parametrize("content", ["\nzinc", "  zinc", "", "\n\n", "zinc\n", "2"])
def test_in_the_plain_template_no_answer_changes_what_stands_before_it(content: str) -> None:
    words = tokenizer(None)
    asked = render(words, [ASK], generation_prompt=True)
    found = with_answers(words, [ASK, {"role": "assistant", "content": content}])
    assert found.ids[: len(asked)] == asked
    assert said(found, words) == [content + "<|end|>"]


@pytest.mark.parametrize(
    ("template", "talk", "sentence"),
    [
        (
            GLUED,
            [ASK, ALSO],
            "tokenises what stands before message 2 otherwise once that answer stands there",
        ),
        (
            FORGETFUL,
            [ASK, {"role": "assistant", "content": "<think>a</think>b"}, MORE, ALSO],
            "writes message 2, an answer, otherwise once message 3 follows it",
        ),
        (NO_SYSTEM, [{"role": "system", "content": "be brief"}, *TALK], "cannot write .*: no system role"),
        (ALTERNATE, [ASK, MORE, ALSO], "cannot write the conversation: roles must alternate"),
        ("{{ messages[0].content.nothing() }}", TALK, "cannot write the conversation: "),
        ("{% for %}", TALK, "cannot write the conversation: "),
        (CHATML, [SAY, ASK], "begins with an answer"),
        (CHATML, [ASK, MORE], "holds no message of the assistant"),
        (CHATML, [], "holds no message"),
        (CHATML, [{"role": "user"}], "its content is missing"),
        (CHATML, [{"role": "user", "content": ["a"]}], "its content is list"),
        (CHATML, ["what is zinc?"], "message 1 must be an object"),
        (CHATML, [{"role": "user", "content": "\ud800"}], "1: its content is text with half a character"),
        (None, [{"role": "tool", "content": "4"}, SAY], "message 1 is of 'tool'"),
    ],
    ids=[
        "glued", "forgets", "no system", "alternate", "raises", "no template", "answer first", "no answer",
        "empty", "no content", "parts", "text", "half", "role",
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_one_sentence(template: str | None, talk: list[Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence) as raised:
        with_answers(tokenizer(template), talk)
    assert "\n" not in str(raised.value)


def test_an_answer_that_nothing_could_end_is_refused() -> None:
    with pytest.raises(DataError, match="neither a chat template nor an end token"):
        render(tokenizer(None, end=None), TALK, generation_prompt=False)


def test_one_of_several_templates_is_taken_or_asked_for() -> None:
    words = tokenizer({"default": CHATML, "tool_use": STRIPPED})  # type: ignore[arg-type]
    assert with_answers(words, TALK) == with_answers(tokenizer(), TALK)
    with pytest.raises(DataError, match="chat template cannot be chosen"):
        with_answers(tokenizer({"tool_use": STRIPPED, "rag": CHATML}), TALK)  # type: ignore[arg-type]


def test_tokens_do_not_depend_on_the_day() -> None:
    words = tokenizer("\n{{ strftime_now('%d %b %Y') }}" + CHATML)
    assert words.decode(render(words, [ASK], generation_prompt=False)).startswith("\n01 Jan 2025<|im_start|>")


@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>"), (MARKED, "<|im_end|>"), (None, "<|end|>")]
)
def test_the_end_of_a_turn_is_the_template_s(template: str | None, end: str) -> None:
    words = tokenizer(template)
    assert end_of_turn(words, TALK[:3]) == words.convert_tokens_to_ids(end)


@pytest.mark.parametrize(("task", "ends"), [("instruct", True), ("preference", True), ("causal", False)])
def test_tasks_of_conversations_end_where_turns_end(task: str, ends: bool) -> None:
    words = tokenizer()
    found = tasks.of(RunConfig.model_validate({"model": {"task": task}})).ends(words)
    assert found == ({words.convert_tokens_to_ids("<|im_end|>")} if ends else set())
    assert turn_ends(tokenizer(CHATML.replace("<|im_end|>", ""))) == set()


def test_a_template_may_have_no_end_or_no_answer() -> None:
    assert end_of_turn(tokenizer(CHATML.replace("<|im_end|>", "")), [ASK]) is None
    with pytest.raises(DataError, match="leaves out what the assistant says"):
        end_of_turn(tokenizer("{{ messages[0].content }}"), [ASK])


@pytest.mark.parametrize(
    ("ids", "mask", "length", "begin", "left"),
    [
        ("bPPPRRe", "0000111", 7, "b", "bPPPRRe"),
        ("bPPPRRe", "0000111", 5, "b", "bPRRe"),
        ("bPPPRRe", "0000111", 5, None, "PPRRe"),
        ("PPRRRRe", "0011111", 4, None, "PRRR"),  # the answer alone is too long: its beginning stays
        ("bPRRRRe", "0011111", 4, "b", "bRRR"),
        ("PRePPSe", "0110011", 4, None, "PPSe"),  # earlier turns go first
        ("PRePSSSe", "01101111", 3, None, "PSS"),
        ("PRReP", "01110", 3, None, "PRR"),
    ],
)
def test_the_prompt_is_cut_and_never_the_whole_answer(
    ids: str, mask: str, length: int, begin: str | None, left: str
) -> None:
    answered = Answered([ord(c) for c in ids], [c == "1" for c in mask])
    found = cut(answered, length, None if begin is None else ord(begin))
    assert "".join(map(chr, found.ids)) == left
    assert any(found.mask[1:])
    assert len(found.mask) == len(found.ids)


def test_the_oldest_turns_are_forgotten_first() -> None:
    words = tokenizer()
    system = {"role": "system", "content": "be brief"}
    whole = [system, *TALK, {"role": "user", "content": "zinc?"}]
    ids = render(words, whole, generation_prompt=True)
    assert fit(words, whole, len(ids)) == (whole, ids)
    kept, fewer = fit(words, whole, len(ids) - 1)
    assert kept == [system, *whole[3:]]
    assert fewer == render(words, kept, generation_prompt=True)
    least = len(render(words, [system, whole[-1]], generation_prompt=True))
    assert fit(words, whole, least)[0] == [system, whole[-1]]
    with pytest.raises(DataError, match=f"takes {least} tokens .* and {least - 1} are left"):
        fit(words, whole, least - 1)


@pytest.mark.slow
def test_the_bundled_chat_model_s_own_template() -> None:
    from transformers import AutoTokenizer

    from fedllm.data.bundled import model_source

    words: Any = AutoTokenizer.from_pretrained(model_source("smollm2"))
    found = with_answers(words, TALK)
    assert said(found, words) == [" a metal.<|im_end|>", "hello there, you<|im_end|>"]
    assert words.decode(found.ids).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    )
    assert end_of_turn(words, [ASK]) == words.convert_tokens_to_ids("<|im_end|>")
