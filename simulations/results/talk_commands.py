"""The commands that talk: to a prompt, in a conversation, and over HTTP with other programs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from fedllm.errors import DataError
from fedllm.runs.durable import to_json
from fedllm.terminal.console import AsJson, Device, RunDir, console, print_json, shown
from simulations.results.options import PANEL, AtRound, one_by_one, read_text, which

if TYPE_CHECKING:
    from fedllm.models.generation import Sampling
    from simulations.results.talk import Chat, Speaker

__all__ = ["app"]

app = typer.Typer()
HELP = "/reset forgets what was said, /base shows the untuned model's answers too, or no more; Ctrl-D ends"

_TITLES = {"answer": "tuned", "base": "base"}


@dataclass(frozen=True)
class Talk:
    """How a model is to answer: the options that all commands here take."""

    base: Annotated[bool, typer.Option("--base", help="Also show what the untuned base model says.")] = False
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of an answer, at most; default 200, in a chat no more than half the positions.",
        ),
    ] = None
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token, always; 1 draws as the model believes.")
    ] = 0.0
    top_p: Annotated[
        float, typer.Option(help="Draw among the likeliest tokens of this probability together.")
    ] = 1.0
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0
    round: AtRound = None
    device: Device = "auto"
    as_json: AsJson = False

    def sampling(self) -> Sampling:
        """Return how a token is chosen."""
        from fedllm.models.generation import Sampling

        return Sampling(self.temperature, self.top_p, self.seed)


@app.command(rich_help_panel=PANEL)
@one_by_one
def generate(
    run_dir: RunDir,
    prompt: Annotated[str, typer.Argument(help="What is to be answered; - reads it from stdin.")],
    talk: Talk,
) -> None:
    """Let a run's model write on behind a prompt, or make another text of it, word by word."""
    from simulations.results.talk import NEW_TOKENS, base_of, open_speaker

    sampling = talk.sampling()
    text = read_text(None) if prompt == "-" else prompt
    speakers = [open_speaker(run_dir, which(talk.round))]
    config = speakers[0].model.config

    def answers() -> Iterator[Iterator[str]]:
        for _ in _TITLES if talk.base else ("answer",):
            speaker = speakers.pop() if speakers else base_of(config)  # there may be no memory for both
            _warn(speaker)
            yield speaker.answer(text, talk.max_new_tokens or NEW_TOKENS, sampling)
            del speaker

    told = _heard({"prompt": text}, answers(), titled=talk.base, aloud=not talk.as_json)
    if talk.as_json:
        print_json(told)


@app.command(rich_help_panel=PANEL)
@one_by_one
def chat(
    run_dir: RunDir,
    system: Annotated[str, typer.Option(help="What the model is told before the conversation.")] = "",
    *,
    talk: Talk,
) -> None:
    """Talk to a run's causal model; a message a line. Ctrl-C stops an answer, Ctrl-D ends."""
    from simulations.results.talk import Chat, open_speaker

    sampling = talk.sampling()
    speaker = open_speaker(run_dir, which(talk.round), converses=True)
    _warn(speaker)
    conversation = Chat(speaker, system, talk.max_new_tokens, sampling)
    if sys.stdin.isatty():
        console.print(HELP)
    _converse(conversation, speaker, _lines(), compared=talk.base, as_json=talk.as_json)


@app.command(rich_help_panel=PANEL)
def serve(
    run_dir: RunDir,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than localhost let anybody ask.")
    ] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    round: AtRound = None,
    as_json: AsJson = False,
) -> None:
    """Answer OpenAI-compatible requests with a run's causal model, on this host; Ctrl-C ends."""
    from simulations.results.serving import serve as answer

    def ready(name: str) -> None:
        url = f"http://{host}:{port}/v1"
        if as_json:
            print(to_json({"url": url, "model": name}), flush=True)
        console.print(f"{url} answers for the model {name} once it is loaded; Ctrl-C ends")

    console.print("merging the run's result into its base ...")
    with suppress(KeyboardInterrupt):
        answer(run_dir, host, port, which(round), ready)


def _converse(
    conversation: Chat, speaker: Speaker, lines: Iterable[str], *, compared: bool, as_json: bool
) -> None:
    from simulations.results.talk import base_of

    base: Speaker | None = None
    for line in lines:
        if line.startswith("/"):
            if line == "/reset":
                conversation.turns.clear()
            elif line == "/base":
                compared = not compared
            else:
                console.print(HELP)
            continue
        if compared and base is None:
            base = base_of(speaker.model.config)
            _warn(base)
        others = [base] if compared and base is not None else []
        try:
            answers = conversation.ask(line, *others)
            told = _heard({"message": line}, answers, titled=compared, aloud=not as_json)
        except KeyboardInterrupt:
            print(flush=True)
            continue
        except DataError as error:
            if not sys.stdin.isatty():
                raise
            console.print(str(error))
            continue
        if as_json:
            print(to_json(told), flush=True)


def _heard(
    told: dict[str, str], answers: Iterator[Iterator[str]], *, titled: bool, aloud: bool
) -> dict[str, str]:
    """Return what was asked with its answers, the tuned model's first; print them as they come."""
    for who, answer in zip(_TITLES, answers, strict=False):
        if titled and aloud:
            print(f"{_TITLES[who]}:")
        told[who] = _said(answer, aloud=aloud)
    return told


def _said(answer: Iterator[str], *, aloud: bool) -> str:
    """Return an answer when it is over; print it as it comes."""
    said = ""
    with closing(answer):  # type: ignore[type-var]  # a generator's
        for piece in answer:
            said += piece
            if aloud:
                print(shown(piece), end="", flush=True)
    if aloud:
        print(flush=True)
    return said


def _lines() -> Iterator[str]:
    """Yield what people say, a line each, without blank ones; from a pipe as it comes.

    Raises:
        DataError: a pipe's line is not UTF-8.
    """
    for number, line in enumerate(_typed() if sys.stdin.isatty() else sys.stdin.buffer, start=1):
        try:
            text = line if isinstance(line, str) else line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"line {number} of standard input is not UTF-8: convert it") from error
        if text.strip():
            yield text.strip("\r\n")


def _typed() -> Iterator[str]:
    """Yield lines of a terminal, which can be edited and called back; Ctrl-D ends."""
    import readline  # noqa: F401  # input() edits with it once it is there

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            console.print("\nCtrl-D ends")


def _warn(speaker: Speaker) -> None:
    if speaker.uncached:
        console.print(f"every new token reads all before it again, which is slow: {speaker.uncached}")
