"""What the commands on a run's result share."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fedllm.errors import ConfigError, DataError

__all__ = ["PANEL", "AtRound", "Format", "Which", "one_by_one", "read_text", "which"]

PANEL = "Simulations and results"

Which = int | Literal["best"] | None
"""A round whose checkpoint is there, the best one, or the last."""
Format = Literal["merged", "onnx", "int8", "int4", "gguf", "gguf-q8_0", "gguf-q4_k"]
"""``merged``: a plain transformers model; ``onnx``: a graph for ONNX Runtime, ``int8`` and ``int4``: it
quantised; ``gguf``: a file for llama.cpp in float16, ``gguf-q8_0`` and
``gguf-q4_k``: in eight bits, and in about five."""

AtRound = Annotated[
    str | None,
    typer.Option(
        help="Of this round's checkpoint, or of the best round's; default the last.", metavar="N|best"
    ),
]


def one_by_one(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take the fields of its last parameter, a dataclass of options, one by one."""
    *own, last = inspect.signature(command, eval_str=True).parameters.values()
    fields = inspect.signature(last.annotation, eval_str=True).parameters

    @functools.wraps(command)
    def taking(**given: Any) -> None:
        options = {name: given.pop(name) for name in fields}
        command(**given, **{last.name: last.annotation(**options)})

    parameters = [*own, *fields.values()]
    taking.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect's own name
    taking.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return taking


def which(round: str | None) -> Which:
    """Read ``--round``."""
    if round is None:
        return None
    if round == "best":
        return "best"
    if not re.fullmatch(r"[0-9]{1,9}", round):
        raise ConfigError(f"--round takes the number of a round, or best; got {round!r}")
    return int(round)


def read_text(file: Path | None) -> str:
    """Return what a file or (None) standard input says, without its last line break.

    Raises:
        DataError: it cannot be read, is not UTF-8, or says nothing.
    """
    name = "standard input" if file is None else str(file)
    try:
        # A byte-order mark is no part of the first text.
        read = sys.stdin.buffer.read() if file is None else file.read_bytes()
        text = read.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 (byte {error.start}): convert it, one text a line") from error
    if not text:
        raise DataError(f"{name} holds no text: give one a line")
    return text
