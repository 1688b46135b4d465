"""What a run is made from, by digest: texts, who holds which, base weights, tokenizer.

A run that is continued must be made from the same things; what is compared is what counts, not dates or
places, so that a folder may move and a file may be written anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from fedllm.config import RunConfig
from fedllm.data.bundled import model_files
from fedllm.data.corpus import Corpus
from fedllm.data.partition import Indices
from fedllm.errors import StoreError

__all__ = ["of_model", "of_models", "of_texts", "require_same_inputs", "told"]

_WEIGHTS = ("config.json", "*.safetensors", "*.bin", "*.gguf")
_TOKENIZER = ("tokenizer*", "vocab*", "merges*", "*.model", "special_tokens_map.json", "added_tokens.json")


def of_texts(train: Corpus, test: Corpus, parts: Sequence[Indices]) -> dict[str, str]:
    """Return digests of the ``texts`` and of their ``partition``.

    Args:
        train: what clients share out.
        test: what is held out on the server.
        parts: each client's texts, as indices into ``train``.
    """
    texts = hashlib.sha256()
    for corpus in (train, test):
        for group in (corpus.texts, corpus.label_names, corpus.groups or ()):
            _add(texts, (text.encode("utf-8", "surrogatepass") for text in group))
        _add(texts, [b"" if corpus.labels is None else corpus.labels.astype("<i8").tobytes()])
        if corpus.parts is not None:
            _add(texts, (json.dumps(part, sort_keys=True).encode() for part in corpus.parts))
    partition = hashlib.sha256()
    _add(partition, (part.astype("<i8").tobytes() for part in parts))
    return {"texts": texts.hexdigest(), "partition": partition.hexdigest()}


def told(inputs: Mapping[str, str]) -> str:
    """Return what a client tells of texts that the run's configuration names: which, and who has which part.

    >>> told({"texts": "12" * 32, "partition": "ab" * 32, "weights": "00" * 32})
    '1212121212121212 abababababababab'
    """
    return " ".join(inputs[kind][:16] for kind in ("texts", "partition"))


def of_model(name: str) -> dict[str, str]:
    """Return digests of a model's ``weights`` and ``tokenizer`` files; nothing where they are not at hand.

    Args:
        name: as ``model.name``.
    """
    place = model_files(name)
    if place is None:
        return {}
    if place.is_file():  # a GGUF file holds both
        return {"weights": _file(place)}
    return {kind: _files(place, names) for kind, names in (("weights", _WEIGHTS), ("tokenizer", _TOKENIZER))}


def of_models(config: RunConfig) -> dict[str, str]:
    """Return the digests of a run's base model, and of the other one that its student is, if it is."""
    found, student = of_model(config.model.name), config.options.get("student")
    if student:
        found |= {f"student's {kind}": digest for kind, digest in of_model(student).items()}
    return found


def require_same_inputs(
    folder: Path, config: RunConfig, stored: Mapping[str, str], found: Mapping[str, str]
) -> None:
    """Refuse to go on with a run that was begun with other things.

    Args:
        folder: the run folder.
        config: the run.
        stored: digests of what it was begun with.
        found: digests of what is there now; what either lacks is not compared.

    Raises:
        StoreError: names what changed, and what to do.
    """
    data, model = config.data.path or config.data.name, config.model.name
    names = {
        "texts": f"the texts of {data} are",
        "partition": "the way texts are shared out among clients is",
        "weights": f"the weights of {model} are",
        "tokenizer": f"the tokenizer of {model} is",
        "student's weights": f"the weights of {config.options.get('student')} are",
        "student's tokenizer": f"the tokenizer of {config.options.get('student')} is",
    }
    for kind, name in names.items():
        if kind in stored and kind in found and stored[kind] != found[kind]:
            raise StoreError(
                f"{name} not what {folder} was begun with: bring back what was there, "
                "or begin another run in another folder"
            )


def _files(folder: Path, names: Iterable[str]) -> str:
    found = sorted({path for name in names for path in folder.glob(name) if path.is_file()})
    whole = hashlib.sha256()
    for path in found:
        _add(whole, [path.name.encode(), _file(path).encode()])
    return whole.hexdigest()


def _file(path: Path) -> str:
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest(path: Path, size: int, modified: int) -> str:
    """Hash a file, once in a process for as long as it stays the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _add(digest: hashlib._Hash, parts: Iterable[bytes]) -> None:
    """Add parts so that no other parts give the same bytes, and where the last one ends."""
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    digest.update(b"\xff" * 8)
