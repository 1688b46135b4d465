"""The packages that fedllm can use and a device does without, asked for where they are needed."""

from __future__ import annotations

from importlib.util import find_spec

from fedllm.errors import ConfigError

__all__ = ["EXTRAS", "installed", "require"]

EXTRAS = {
    "bitsandbytes": "quantize",
    "chitchat_dataset": "texts",
    "cyllama": "llama",
    "datasets": "hub",
    "dp_accounting": "privacy",
    "flwr_datasets": "simulation",
    "gguf": "gguf",
    "matplotlib": "plots",
    "mlflow": "mlflow",
    "nicegui": "dashboard",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "openai": "serve",
    "pandas": "pandas",
    "pyarrow": "parquet",
    "ray": "simulation",
    "reasoning_gym": "texts",
    "scipy": "simulation",
    "tensorboard": "tensorboard",
    "zstandard": "bench",
}
"""The extra that installs each optional package, by the name that is imported."""


def installed(package: str) -> bool:
    """Return whether an optional package is there, without importing it."""
    return find_spec(package) is not None


def require(package: str, purpose: str) -> None:
    """Refuse what needs an optional package where it is not installed.

    Args:
        package: a key of :data:`EXTRAS`.
        purpose: what needs it, as the sentence begins: ``"a plot"``, ``'data.name = "owner/set"'``.

    Raises:
        ConfigError: names the package and the extra that brings it.
    """
    if not installed(package):
        raise ConfigError(
            f"{purpose} needs {package}, which is not installed: pip install 'fedllm[{EXTRAS[package]}]'"
        )
