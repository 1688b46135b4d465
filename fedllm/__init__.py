"""Federated fine-tuning of language models.

    import fedllm

    run = fedllm.simulate("quickstart", rounds=4)
    run.metrics["accuracy"]

The names below are found when they are first used: importing fedllm imports nothing heavy. What they are is
said by ``__init__.pyi``, for type checkers and editors.
"""

from importlib import import_module

_NAMES = {
    "simulate": "simulations.api",
    "load_config": "simulations.api",
    "open_run": "simulations.api",
    "Run": "simulations.api",
    "RunConfig": "fedllm.config",
    "Method": "strategies.base",
    "Codec": "fedllm.codecs.base",
    "Task": "fedllm.tasks.base",
    "FedllmError": "fedllm.errors",
}
"""Where each name lies. Nothing else in fedllm names what stands above it."""

__all__ = [*_NAMES]


def __getattr__(name: str) -> object:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_NAMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
