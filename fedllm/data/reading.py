"""Rows of text from files, folders and the hub, with errors that name the file and the line.

Local files are read by the standard library (and pyarrow for parquet): importing ``datasets`` costs more
than reading most files.
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedllm.config import DataConfig
from fedllm.data.bundled import CORPORA, corpus_folder
from fedllm.data.decoding import text_of
from fedllm.data.folders import Row, class_folders, require_file, visible
from fedllm.data.sources import catalogue
from fedllm.errors import DataError
from fedllm.extras import require

__all__ = ["Row", "read_rows", "visible", "with_class_names"]

logger = logging.getLogger(__name__)


def read_rows(config: DataConfig) -> Iterator[Row]:
    """Yield every row of the configured text, in an order that does not depend on the file system.

    Raises:
        DataError: nothing is there, or a row cannot be read; names the file and the line.
    """
    if config.path is None:
        return _named(config.name)
    try:
        path = Path(config.path).expanduser()
        if path.is_file():
            return _file(path)
        if not path.is_dir():
            state = "is neither a file nor a folder" if path.exists() else "does not exist"
            raise DataError(f"{config.path!r} {state}; texts are wanted there")
    except (RuntimeError, OSError) as error:  # no such user, or no permission to look
        raise DataError(f"{config.path!r} cannot be read: {error}") from error
    items = visible(path)
    files = [require_file(item) for item in items if _kind(item) in _READERS]
    if files:
        return (row for file in files for row in _file(file))
    if any(item.suffix.lower() == ".txt" for folder in items if folder.is_dir() for item in visible(folder)):
        return class_folders(path)
    raise DataError(f"{config.path!r} holds neither {_known()} files nor one folder of .txt files per class")


def _kind(path: Path) -> str:
    """Return the suffix that says how to read a file, without that of gzip."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes[:1]) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def _file(path: Path) -> Iterator[Row]:
    kind = _kind(path)
    packed = path.suffix.lower() == ".gz"
    if kind not in _READERS or (packed and kind == ".parquet"):
        raise DataError(f"{path} is of no known kind; {_known()} files are read, text files also as .gz")
    return _READERS[kind](path)


# --- kinds of files -----------------------------------------------------------------------------------------


def _jsonl(path: Path) -> Iterator[Row]:
    """One JSON object a line."""
    with text_of(path, "\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            if line.lstrip().startswith("["):
                raise DataError(
                    f"{where}: a JSON object with named columns is wanted, not a list; "
                    "a file that is one list of objects is called .json"
                )
            yield _row(_parsed(line.rstrip("\n"), path, number), path, where)


def _json(path: Path) -> Iterator[Row]:
    """One list of objects, alone or as ``data`` of an object; or, as many write it, an object a line."""
    with text_of(path, "\n") as stream:
        text = stream.read()
    try:
        document = _parsed(text, path, 1)
    except DataError as error:
        if isinstance(error.__cause__, json.JSONDecodeError) and error.__cause__.msg == "Extra data":
            yield from _jsonl(path)
            return
        raise
    records = document.get("data") if isinstance(document, dict) else document
    if not isinstance(records, list):
        raise DataError(
            f'{path}: a list of JSON objects is wanted, or an object whose "data" is one; '
            "move the file elsewhere if it holds no texts"
        )
    if records and isinstance(records[0], dict) and "paragraphs" in records[0]:
        logger.info("%s is read as SQuAD's own: a question of a paragraph is a row", path)
    for number, record in enumerate(records, start=1):
        where = f"{path}, record {number}"
        if isinstance(record, dict) and "paragraphs" in record:
            yield from _questions(record, path, where)
        else:
            yield _row(record, path, where)


def _questions(article: dict[str, Any], path: Path, where: str) -> Iterator[Row]:
    """Lay out an article of SQuAD's own files (Rajpurkar et al., 2016 and 2018), one question a row."""
    for number, paragraph in enumerate(_objects(article, "paragraphs", where), start=1):
        inside = f"{where}, paragraph {number}"
        for place, asked in enumerate(_objects(paragraph, "qas", inside), start=1):
            found = _objects(asked, "answers", f"{inside}, question {place}") if "answers" in asked else []
            answers = {key: [answer.get(key) for answer in found] for key in ("text", "answer_start")}
            columns = {
                "id": asked.get("id"),
                "title": article.get("title"),
                "context": paragraph.get("context"),
                "question": asked.get("question"),
                "answers": answers,
            }
            yield Row(columns, path.name, f"{inside}, question {place}")


def _objects(holder: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    found = holder.get(key)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise DataError(f'{where}: "{key}" must be a list of objects, as in the files of SQuAD')
    return found


def _parsed(text: str, path: Path, line: int) -> Any:
    """Parse JSON that begins on ``line`` of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}"
        raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
    except RecursionError:
        raise DataError(f"{path}, line {line}: the JSON is nested too deeply to be read") from None
    except ValueError as error:  # Python refuses to convert such numbers
        raise DataError(
            f"{path}, line {line}: a number has more than {sys.get_int_max_str_digits():,} digits; "
            "write it as text"
        ) from error


def _row(record: Any, path: Path, where: str) -> Row:
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON object with named columns is wanted, not {type(record).__name__}")
    return Row(record, path.name, where)


def _csv(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with text_of(path, "") as lines:
        reader = csv.reader(lines, strict=True, delimiter=delimiter)
        line = 1
        try:
            header = [name.strip() for name in next(reader, [])]
            _check_header(header, path)
            line = reader.line_num + 1
            for values in reader:
                where = f"{path}, line {line}"
                line = reader.line_num + 1
                if not values:
                    continue
                if len(values) != len(header):
                    raise DataError(
                        f"{where}: {len(values)} fields where the header names {len(header)} columns"
                    )
                yield Row(dict(zip(header, values, strict=True)), path.name, where)
        except csv.Error as error:
            raise DataError(f"{path}, line {line}: not valid CSV ({error})") from error


def _check_header(header: Sequence[str], path: Path) -> None:
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        raise DataError(
            f"{path}: the header is a single column, {header[0]!r}; "
            "separate columns with commas, or with tabs in a .tsv file"
        )
    _require_distinct(header, path)


def _require_distinct(columns: Sequence[str], path: Path) -> None:
    """Refuse a name that stands twice: one of the columns would be lost."""
    name, times = max(Counter(filter(None, columns)).items(), key=lambda item: item[1], default=("", 0))
    if times > 1:
        raise DataError(f"{path}: {times} columns are called {name!r}; name each differently")


def _conll(path: Path) -> Iterator[Row]:
    """One word a line, its tag last, an empty line behind each sentence; the columns are tokens and tags."""
    with text_of(path, None) as lines:
        sentence: list[list[str]] = []
        first = width = 0
        for number, line in enumerate(itertools.chain(lines, ["\n"]), start=1):
            if line.strip() and not line.startswith("-DOCSTART-"):
                fields = _fields(line.rstrip("\n"), f"{path}, line {number}", width)
                first, width = first or number, len(fields)
                sentence.append(fields)
            elif sentence:
                columns = {"tokens": [word[0] for word in sentence], "tags": [word[-1] for word in sentence]}
                yield Row(columns, path.name, f"{path}, line {first}")
                sentence, first = [], 0


def _fields(line: str, where: str, width: int) -> list[str]:
    """Split a word from its tag and what stands between them, which every line has as much of."""
    fields = line.rstrip("\t ").split("\t") if "\t" in line.strip() else line.split(" ")
    fields = [field for field in map(str.strip, fields) if field]
    if len(fields) < 2 or width not in (0, len(fields)):
        wanted = f"as in the lines before, {width}" if width else "a word, a tab or a space, and its tag"
        raise DataError(f"{where}: {len(fields)} fields, but wanted are {wanted}")
    return fields


def _parquet(path: Path) -> Iterator[Row]:
    require("pyarrow", str(path))
    import pyarrow  # type: ignore[import-untyped]  # ships no stubs
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _require_distinct(table.schema_arrow.names, path)
            number = 0
            for batch in table.iter_batches():
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(columns, path.name, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": partial(_csv, delimiter=","),
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": _parquet,
    ".conll": _conll,
    ".iob": _conll,
    ".iob2": _conll,
    ".bio": _conll,
}
"""How a file is read, by its suffix."""


def _known() -> str:
    return ", ".join(_READERS)


def _named(name: str) -> Iterator[Row]:
    """Yield the rows of what is bundled under a name, or else of what the hub calls so."""
    if name in CORPORA:
        return class_folders(corpus_folder(name))
    found = catalogue.rows(name)
    if found is None:
        return _hub(name)
    return (Row(columns, name, f"{name}, row {number}") for number, columns in enumerate(found, start=1))


def _hub(name: str) -> Iterator[Row]:
    """The train split of a hub data set, ``owner/name`` or ``owner/name:configuration``."""
    require("datasets", f"data.name = {name!r}")
    import datasets

    path, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(path, configuration or None, split="train")
    except Exception as error:  # the library raises whatever its loaders, scripts and network raise
        reason = " ".join(str(error).split())[:300]
        bundled = ", ".join([*CORPORA, *catalogue.SOURCES])
        raise DataError(
            f"data.name = {name!r} is not bundled ({bundled}) and its train split cannot be loaded from the "
            f"hub: {reason}"
        ) from error
    for number, columns in enumerate(with_class_names(rows), start=1):
        yield Row(columns, path, f"{name}, row {number}")


def with_class_names(rows: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a ``datasets.Dataset`` with the names of classes in place of their numbers."""
    import datasets

    classes = {}
    for column, feature in rows.features.items():
        kind = getattr(feature, "feature", feature)  # a list of classes, such as the tags of a sentence
        if isinstance(kind, datasets.ClassLabel):
            classes[column] = kind.names
    for columns in rows:
        for column, names in classes.items():
            columns[column] = _class_name(columns[column], names)
        yield columns


def _class_name(value: Any, names: Sequence[str]) -> Any:
    """Return the name of a class by its number, or those of a list; the hub marks a hidden one with -1."""
    if isinstance(value, list):
        return [_class_name(item, names) for item in value]
    return names[value] if value is not None and value >= 0 else None
