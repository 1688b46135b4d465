"""Talking to a run's model in the terminal: what it says, what its base says, what is remembered."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from fedllm import open_run
from fedllm.errors import ConfigError, DataError
from fedllm.tasks.chat import render
from fedllm.terminal.console import shown
from simulations.results import talk
from simulations.results.predict import restore
from tests.architectures import Architecture
from tests.commands.conftest import Fedllm
from tests.parts import quick
from tests.processes import free_port, until
from tests.reports.made_up import make_run
from tests.rounds.federation import configuration, run
from tests.talking import save_model, tokenizer

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "residual": {"method": "lora", "options": {"rule": "residual"}},
    "stack": {"method": "lora", "options": {"rule": "stack"}},
    "pissa": {"tuning": {"options": {"init_lora_weights": "pissa"}}},
    "prompt": {"tuning": {"peft": "prompt", "options": {"num_virtual_tokens": 4}}},
    "full": {"method": "fedavg", "tuning": {"peft": "full"}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_model(folder)
    return folder


def finish(base: Path, texts: Path, folder: Path, **sections: Any) -> Path:
    sections = {"method": "lora", "tuning": {}, "model": {"task": "causal"}, **sections}
    sections["model"] = {"name": str(base), **sections["model"]}
    sections["tuning"] = {"peft": "lora", "rank": 2, **sections["tuning"]}
    data = {"path": str(texts), "max_length": 16, "partition": "iid"}
    training = {"local_steps": 3, "batch_size": 8, "learning_rate": 0.1}
    run(configuration(base, texts, rounds=1, data=data, training=training, **sections), folder)
    return folder


@pytest.fixture(scope="module")
def tuned(base: Path, tiny_texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(base, tiny_texts, tmp_path_factory.mktemp("run") / "run")


def plain(base: Path) -> Any:
    found: Any = AutoModelForCausalLM.from_pretrained(base)
    return found.eval()


def by_hand(module: Any, ids: list[int], new_tokens: int, ends: tuple[int, ...] = (2,)) -> list[int]:
    """Greedily, everything anew for every token."""
    found: list[int] = []
    with torch.no_grad():
        for _ in range(new_tokens):
            seen = torch.tensor([ids + found])
            best = int(module(input_ids=seen, attention_mask=torch.ones_like(seen)).logits[0, -1].argmax())
            if best in ends:
                break
            found.append(best)
    return found


def says(module: Any, text: str, new_tokens: int) -> str:
    words = tokenizer()
    ids = words(text)["input_ids"]
    return str(words.decode(by_hand(module, ids, new_tokens), skip_special_tokens=True))


class Reply:
    """What a conversation should come to, by hand."""

    def __init__(self, module: Any, system: str = "") -> None:
        self.module = module
        self.turns = [{"role": "system", "content": system}] if system else []

    def to(self, text: str, new_tokens: int) -> str:
        words = tokenizer()
        self.turns.append({"role": "user", "content": text})
        ids = render(words, self.turns, generation_prompt=True)
        end = words.convert_tokens_to_ids("<|im_end|>")
        answer = words.decode(by_hand(self.module, ids, new_tokens, (2, end)), skip_special_tokens=True)
        self.turns.append({"role": "assistant", "content": answer})
        return str(answer)


def piped(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    content = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))


@pytest.mark.parametrize("method", quick(METHODS, "full"))
def test_the_base_is_the_base(
    fedllm: Fedllm, base: Path, tiny_texts: Path, tmp_path: Path, method: str
) -> None:
    folder = finish(base, tiny_texts, tmp_path / "run", **METHODS[method])
    told = json.loads(
        fedllm("generate", folder, "what is zinc?", "--base", "--max-new-tokens", 8, "--json").out
    )
    assert told["base"] == says(plain(base), "what is zinc?", 8)
    assert told["answer"] == says(restore(folder).model.module.eval(), "what is zinc?", 8)
    assert told["answer"] != told["base"]


def test_generate_writes_what_comes_next(fedllm: Fedllm, base: Path, tuned: Path) -> None:
    expected = says(restore(tuned).model.module.eval(), "what is", 9)
    assert fedllm("generate", tuned, "what is", "--max-new-tokens", 9) == (0, f"{shown(expected)}\n", "")
    both = fedllm("generate", tuned, "what is", "--max-new-tokens", 9, "--base").out
    assert both == shown(f"tuned:\n{expected}\nbase:\n{says(plain(base), 'what is', 9)}\n")


def test_a_prompt_comes_from_standard_input_whole(
    fedllm: Fedllm, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, "what\nis\n")
    told = json.loads(fedllm("generate", tuned, "-", "--max-new-tokens", 4, "--json").out)
    assert told["prompt"] == "what\nis"
    assert told["answer"] == says(restore(tuned).model.module.eval(), "what\nis", 4)


@pytest.mark.slow
def test_a_run_of_conversations_is_asked_as_it_learnt(
    fedllm: Fedllm, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [{"role": "user", "content": "what is zinc?"}, {"role": "assistant", "content": "a metal."}]
    lines = [
        json.dumps({"messages": [*said[:1], {**said[1], "content": f"a metal. {n}"}]}) for n in range(40)
    ]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    task = {"model": {"name": str(base), "task": "instruct"}}
    data = {"path": str(tmp_path / "talks.jsonl"), "max_length": 48, "partition": "iid"}
    config = configuration(base, tmp_path, rounds=1, data=data, method="lora", tuning={"rank": 2}, **task)
    run(config, tmp_path / "run")
    model = restore(tmp_path / "run").model
    words, module = model.tokenizer, model.module.eval()
    assert model.task.ends(words) == {words.convert_tokens_to_ids("<|im_end|>")}
    expected = Reply(module).to("hello", 6)
    told = json.loads(fedllm("generate", tmp_path / "run", "hello", "--max-new-tokens", 6, "--json").out)
    assert told == {"prompt": "hello", "answer": expected}
    piped(monkeypatch, "hello\n")
    assert json.loads(fedllm("chat", tmp_path / "run", "--max-new-tokens", 6, "--json").out) == {
        "message": "hello",
        "answer": expected,
    }
    (answer,) = json.loads(fedllm("predict", tmp_path / "run", "hello", "--json").out)
    assert answer["continuation"].startswith(expected)


@pytest.mark.slow
def test_draws_are_the_seed_s(fedllm: Fedllm, tuned: Path) -> None:
    def drawn(*words: object) -> str:
        return fedllm("generate", tuned, "what", "--max-new-tokens", 12, *words).out

    warm = ("--temperature", 1.5, "--top-p", 0.9)
    assert drawn(*warm) == drawn(*warm)
    assert drawn(*warm) != drawn(*warm, "--seed", 1)
    assert drawn(*warm) != drawn()


@pytest.mark.parametrize("command", [("generate", "run", "a text"), ("chat", "run")])
def test_a_run_that_writes_no_text_is_refused(
    fedllm: Fedllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    answer = fedllm(*command)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == (
        'error: run is a run of model.task = "classification", which writes no text: ask it with fedllm '
        "predict\n"
    )


@pytest.fixture(scope="module")
def rewriting(
    architecture: Architecture, rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of an encoder with a decoder, which learns to say a text's last word first."""
    folder, base = tmp_path_factory.mktemp("rewriting"), architecture("BartForConditionalGeneration")
    lines = [{"source": row["text"], "target": " ".join(row["text"].split()[::-1])} for row in rows[:48]]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return finish(base, folder / "rows.jsonl", folder / "run", model={"task": "seq2seq"})


def rewrites(module: Any, words: Any, source: str, new_tokens: int) -> str:
    """Greedily, everything anew for every token."""
    found, config = [2], module.config
    ids = torch.tensor([words(source, truncation=True, max_length=16)["input_ids"]])
    with torch.no_grad():
        for _ in range(new_tokens):
            decoded = torch.tensor([found])
            logits = module(
                input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=decoded
            ).logits
            if (best := int(logits[0, -1].argmax())) == config.eos_token_id:
                break
            found.append(best)
    return str(words.decode(found[1:], skip_special_tokens=True))


@pytest.mark.slow
def test_a_text_is_made_another_word_by_word(
    fedllm: Fedllm, architecture: Architecture, rewriting: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base: Any = AutoModelForSeq2SeqLM.from_pretrained(architecture("BartForConditionalGeneration")).eval()
    model = restore(rewriting).model
    tuned: Any = model.module.eval().backbone
    source = "we saw copper again"
    expected = {
        "prompt": source,
        "answer": rewrites(tuned, model.tokenizer, source, 9),
        "base": rewrites(base, model.tokenizer, source, 9),
    }
    assert expected["answer"] not in ("", expected["base"])
    asked = ("generate", rewriting, source, "--base", "--max-new-tokens", 9)
    assert json.loads(fedllm(*asked, "--json").out) == expected
    assert fedllm(*asked).out == f"tuned:\n{expected['answer']}\nbase:\n{expected['base']}\n"
    found = fedllm("generate", rewriting, " ".join([source] * 5), "--max-new-tokens", 9)
    assert found.out == rewrites(tuned, model.tokenizer, " ".join([source] * 5), 9) + "\n"
    assert "1 of 1 texts were longer than data.max_length = 16 tokens and were cut" in caplog.text


@pytest.mark.slow
def test_what_makes_one_text_of_another_does_not_chat(fedllm: Fedllm, rewriting: Path) -> None:
    found = fedllm("chat", rewriting)
    assert (found.code, found.out) == (2, "")
    assert "which makes one text of another and remembers no conversation: ask it with" in found.err


@pytest.mark.slow
def test_python_says_what_the_command_says(fedllm: Fedllm, tuned: Path, rewriting: Path) -> None:
    for folder, prompts in ((tuned, ["what", "a metal"]), (rewriting, ["we saw iron", "copper"])):
        run = open_run(folder)
        records = run.generate(prompts, base=True, max_new_tokens=6)
        for prompt, record in zip(prompts, records, strict=True):
            asked = ("generate", folder, prompt, "--base", "--max-new-tokens", 6, "--json")
            assert record == json.loads(fedllm(*asked).out)
    warm = {"max_new_tokens": 6, "temperature": 1.5, "top_p": 0.9, "seed": 3}
    words = ("--max-new-tokens", 6, "--temperature", 1.5, "--top-p", 0.9, "--seed", 3, "--json")
    (record,) = open_run(tuned).generate("what", **warm)
    assert record == json.loads(fedllm("generate", tuned, "what", *words).out)
    assert open_run(tuned).generate({"text": "what"}, **warm) == [{**record, "prompt": {"text": "what"}}]


def test_python_takes_no_less_care(tuned: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="which writes no text: ask it with fedllm predict"):
        open_run(tmp_path / "run").generate("a")
    with pytest.raises(DataError, match="no text to answer: prompt 2 is blank"):
        open_run(tuned).generate(["a", " ", "b"])
    with pytest.raises(ConfigError, match=r"max_new_tokens = 0 must be 1 or more"):
        open_run(tuned).generate("a", max_new_tokens=0)
    with pytest.raises(ConfigError, match=r"top_p = 0\.5 has no effect"):
        open_run(tuned).generate("a", top_p=0.5)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("generate", " "), "there is no text to answer: the prompt is blank"),
        (("generate", "a", "--top-p", "0.5"), "top_p = 0.5 has no effect where"),
        (("generate", "a", "--temperature", "-1"), "temperature = -1 must be 0"),
        (("generate", "a", "--round", "7"), "has no checkpoint of round 7"),
        (("chat", "--max-new-tokens", "128"), "128 new tokens leave no room for a message in the 128 that"),
    ],
)
def test_what_cannot_be_said_is_one_sentence(
    fedllm: Fedllm, tuned: Path, words: tuple[str, ...], sentence: str
) -> None:
    answer = fedllm(words[0], tuned, *words[1:])
    assert answer.code in (1, 2)
    assert answer.out == ""
    assert sentence in answer.err
    assert answer.err.count("\n") == 1


def test_a_conversation_is_remembered_until_it_is_reset(
    fedllm: Fedllm, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, "hello\r\n\nwhat is\n/nothing\n/reset\nwhat is\n")
    found = fedllm("chat", tuned, "--system", "be brief", "--max-new-tokens", 7, "--json")
    told = [json.loads(line) for line in found.out.splitlines()]
    module = restore(tuned).model.module.eval()
    first, second = Reply(module, "be brief"), Reply(module, "be brief")
    assert told == [
        {"message": "hello", "answer": first.to("hello", 7)},
        {"message": "what is", "answer": first.to("what is", 7)},
        {"message": "what is", "answer": second.to("what is", 7)},
    ]
    assert told[1]["answer"] != told[2]["answer"]
    assert found.err.startswith("/reset forgets what was said")


def test_an_answer_ends_where_the_template_ends_a_turn(
    fedllm: Fedllm, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, module = tokenizer(), restore(tuned).model.module.eval()
    ids = render(words, [{"role": "user", "content": "hello"}], generation_prompt=True)
    found = by_hand(module, ids, 9)
    first = next(index for index, token in enumerate(found) if index and token not in found[:index])
    monkeypatch.setattr(talk, "end_of_turn", lambda *given: found[first])
    piped(monkeypatch, "hello\n")
    told = json.loads(fedllm("chat", tuned, "--max-new-tokens", 9, "--json").out)
    assert told["answer"] == words.decode(found[:first], skip_special_tokens=True)


def test_the_base_answers_the_same_conversation(
    fedllm: Fedllm, base: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, "hello\n/base\nwhat is\n/base\na\n")
    out = fedllm("chat", tuned, "--max-new-tokens", 5).out
    module = restore(tuned).model.module.eval()
    first, other = Reply(module), Reply(plain(base))
    said = [first.to("hello", 5)]
    other.turns = list(first.turns)
    said += [first.to("what is", 5), other.to("what is", 5), first.to("a", 5)]
    assert out == shown(f"{said[0]}\ntuned:\n{said[1]}\nbase:\n{said[2]}\n{said[3]}\n")


@pytest.mark.slow
def test_what_the_model_has_no_room_for_is_forgotten_or_refused(
    fedllm: Fedllm, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, "1 2 3\n" * 12 + "zinc" * 60 + "\n")
    found = fedllm("chat", tuned, "--max-new-tokens", 7)
    assert len(found.out.splitlines()) >= 12
    assert found.code == 2
    assert "error: the message takes" in found.err
    assert "and 121 are left for it" in found.err


def test_a_line_that_is_no_text_is_named(
    fedllm: Fedllm, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, b"ok\n\xff\xfe\n")
    found = fedllm("chat", tuned, "--max-new-tokens", 1)
    assert (found.code, found.err) == (2, "error: line 2 of standard input is not UTF-8: convert it\n")


def test_ctrl_c_stops_an_answer_and_no_more(
    fedllm: Fedllm, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    def heard(self: Any, ids: list[int], *settings: Any) -> Iterator[str]:
        asked.append(ids)
        yield "a metal"
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield " indeed"

    monkeypatch.setattr(talk.Speaker, "reply", heard)
    piped(monkeypatch, "hello\nwhat is\n")
    assert fedllm("chat", tuned) == (0, "a metal\na metal indeed\n", "")
    words = tokenizer()
    # What was heard before is remembered.
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a metal"}]
    again = [*said, {"role": "user", "content": "what is"}]
    assert asked[1] == render(words, again, generation_prompt=True)


@pytest.mark.slow
def test_nothing_that_a_terminal_obeys_is_printed(
    fedllm: Fedllm, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = "\x1b[2J\x07a\r\nb\x9b1m\u202e"
    monkeypatch.setattr(talk, "pieces", lambda *given: (piece for piece in [wild]))
    tame = "\ufffd[2J\ufffda\nb\ufffd1m\ufffd"
    assert fedllm("generate", tuned, "a").out == f"{tame}\n"
    assert json.loads(fedllm("generate", tuned, "a", "--json").out)["answer"] == wild
    piped(monkeypatch, "a\n")
    assert fedllm("chat", tuned).out == f"{tame}\n"
    monkeypatch.setattr("simulations.results.predict.pieces", lambda *given: (piece for piece in [wild]))
    assert fedllm("predict", tuned, "a").out == f"a{tame}\n"


def test_a_terminal_is_told_how_and_goes_on_after_what_is_wrong(
    fedllm: Fedllm, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    typed: list[Any] = ["hello", KeyboardInterrupt(), "zinc" * 90, "hello", EOFError()]

    def type_in(prompt: str) -> str:
        assert prompt == "> "
        given = typed.pop(0)
        if isinstance(given, BaseException):
            raise given
        return str(given)

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", type_in)
    found = fedllm("chat", tuned, "--max-new-tokens", 4)
    reply = Reply(restore(tuned).model.module.eval())
    assert (found.code, typed) == (0, [])
    assert found.out == shown(f"{reply.to('hello', 4)}\n{reply.to('hello', 4)}\n\n")
    told = found.err.splitlines()
    assert told[0].startswith("/reset forgets")
    assert told[-2] == "Ctrl-D ends"
    assert told[-1].startswith("the message takes")


@pytest.mark.slow
def test_an_endpoint_answers_as_the_run_does(tuned: Path, tmp_path: Path) -> None:
    """A conversation over HTTP, greedily; Ctrl-C ends both processes and leaves no folder."""
    port = free_port()
    command = [
        sys.executable,
        "-c",
        "from fedllm.cli import main; main()",
        "serve",
        "--json",
        str(tuned),
        "--port",
        str(port),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    server = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        until(lambda: server.poll() is not None or _asked(port, "health"))
        assert server.poll() is None, server.stdout and server.stdout.read()
        name = open_run(tuned).config.name
        body = {"model": name, "messages": [{"role": "user", "content": "what is zinc?"}], "max_tokens": 6}
        told = _asked(port, "v1/chat/completions", body | {"temperature": 0.0})
        expected = Reply(restore(tuned).model.module.eval()).to("what is zinc?", 6)
        assert told["choices"][0]["message"]["content"] == expected
    finally:
        os.killpg(server.pid, signal.SIGINT)
        out, _ = server.communicate(timeout=60)
    assert f'{{"url": "http://localhost:{port}/v1", "model": "{name}"}}' in out
    assert f"http://localhost:{port}/v1 answers for the model {name}" in out
    assert server.returncode == 0, out
    assert not list(tmp_path.glob("*/merged"))
    assert not list(tmp_path.glob(f"*/{name}"))


def _asked(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(
        f"http://localhost:{port}/{path}", data, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return json.load(answer)
    except ConnectionError:
        return None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionError):
            return None
        raise


@pytest.mark.slow
def test_an_endpoint_that_cannot_be_is_refused(fedllm: Fedllm, tuned: Path, tmp_path: Path) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        answer = fedllm("serve", tuned, "--port", port)
    assert answer.code == 2
    assert f"cannot listen at localhost:{port}" in answer.err
    refused = fedllm("serve", make_run(tmp_path / "classes").folder)
    assert refused.code == 2
    assert 'model.task = "classification" does not: take fedllm predict' in refused.err
