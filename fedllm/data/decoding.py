"""From the bytes of a file to its text: gzip, byte-order marks, UTF-8, and where a file is none of it."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from fedllm.errors import DataError

__all__ = ["decoded", "opened", "text_of"]

_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # begins like UTF-16's, so it is looked at first
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
"""Byte-order marks, by which a file says how it is written."""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, unpacked where it is gzip's; what the disk says against it becomes one sentence."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            yield stream  # type: ignore[misc]  # both read bytes and can peek
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {reason}") from error


@contextmanager
def text_of(path: Path, newline: str | None) -> Iterator[TextIO]:
    """Open a file as text: UTF-8, or what its byte-order mark says."""
    with opened(path) as stream:
        encoding = _encoding(stream.peek(4))  # type: ignore[attr-defined]  # BufferedReader and GzipFile do
        try:
            yield io.TextIOWrapper(stream, encoding, newline=newline)
        except UnicodeDecodeError:
            raise DataError(_undecodable(path, encoding)) from None


def _encoding(beginning: bytes) -> str:
    return next((name for mark, name in _MARKS.items() if beginning.startswith(mark)), "utf-8")


def _undecodable(path: Path, encoding: str) -> str:
    """Say where a file is not what it should be: a decoder works ahead of the lines that it hands out."""
    with opened(path) as stream:
        raw = stream.read()
    try:
        raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].decode(encoding, "ignore").count("\n") + 1
        place = error.start - raw.rfind(b"\n", 0, error.start) - 1
        name = encoding.removesuffix("-sig").upper()
        return (
            f"{path}, line {line}: not {name} text ({error.reason} at byte {place}); save the file as UTF-8"
        )
    return f"{path} changed while it was read; try again"


def decoded(path: Path) -> str:
    """Decode a whole file: by its mark, as UTF-8, or as Latin-1 where it is not that (one BBC article)."""
    with opened(path) as stream:
        raw = stream.read()
    encoding = _encoding(raw[:4])
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        if encoding == "utf-8":
            return raw.decode("latin-1")
        raise DataError(_undecodable(path, encoding)) from None
