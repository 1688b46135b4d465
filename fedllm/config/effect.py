"""Settings that mean nothing beside others: who asks for one is told so, not given a run like any other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedllm.config.method import MethodOptions
from fedllm.errors import ConfigError

if TYPE_CHECKING:
    from fedllm.config.run import RunConfig

__all__ = ["require_effect"]

_MOMENTS = ("adam", "yogi")
_Need = tuple[str, Callable[["RunConfig"], bool]]
_WEIGHED: _Need = (
    "averages in which clients count by their texts, not those of server.robust",
    lambda run: run.server.robust in ("none", "norm_bound"),
)
_SEEN: _Need = (
    "runs whose server sees single updates, not those with privacy.secure_aggregation = true",
    lambda run: not run.privacy.secure_aggregation,
)
_BACKDOOR: _Need = ('attack.kind = "backdoor"', lambda run: run.attack.kind == "backdoor")
_NEEDS: Mapping[str, _Need] = {
    "data.alpha": ('data.partition = "dirichlet"', lambda run: run.data.partition == "dirichlet"),
    "data.classes_per_client": (
        'data.partition = "pathological"',
        lambda run: run.data.partition == "pathological",
    ),
    "data.test_fraction": ("runs without data.test_path", lambda run: run.data.test_path is None),
    "tuning.start": ('model.quantize = "int8" or "nf4"', lambda run: run.model.quantize != "none"),
    "tuning.block_order": ("tuning.blocks above 1", lambda run: run.tuning.blocks > 1),
    "server.momentum": (
        'server.optimizer = "momentum", "adam" or "yogi"',
        lambda run: run.server.optimizer != "sgd",
    ),
    "server.beta2": ('server.optimizer = "adam" or "yogi"', lambda run: run.server.optimizer in _MOMENTS),
    "server.epsilon": ('server.optimizer = "adam" or "yogi"', lambda run: run.server.optimizer in _MOMENTS),
    "server.staleness_exponent": (
        'server.staleness = "polynomial"',
        lambda run: run.server.staleness == "polynomial",
    ),
    "server.max_examples": _WEIGHED,
    "server.weight_ratio": _WEIGHED,
    "server.norm_ratio": _SEEN,
    "server.outlier_deviations": _SEEN,
    "attack.trigger": _BACKDOOR,
    "attack.target": _BACKDOOR,
    "data.client_test_fraction": ("evaluation.clients = true", lambda run: run.evaluation.clients),
    "evaluation.new_tokens": ("evaluation.generate above 0", lambda run: run.evaluation.generate > 0),
}
"""What a setting is for, and whether a run is that."""


def require_effect(
    config: RunConfig,
    options: type[MethodOptions],
    unread: Mapping[str, str],
    given: Iterable[tuple[str, Sequence[str], Any]],
) -> None:
    """Refuse an override that changes nothing beside the other settings.

    A file may hold such settings, since it may serve several runs; an override is for this one.

    Args:
        config: the run, all settings in it.
        options: of its method, which say what the method does not read.
        unread: keys that its task does not read, and what they are for.
        given: each override as messages call it, its key's parts and its value.

    Raises:
        ConfigError: names the override and what it is for.
    """
    document = config.to_document()
    defaults = type(config)(
        method=config.method, options=options.model_construct().model_dump(mode="json")
    ).to_document()
    own = document[config.method]  # without those that are unset
    unmet = {key: needs for key, (needs, met) in _NEEDS.items() if not met(config)}
    unmet |= unread
    unmet |= dict.fromkeys(options.unread, "other methods")
    for option in options.needs:
        if (lacking := _lacking(options, own, option)) is not None:
            unmet[f"{config.method}.{option}"] = f"{config.method}.{lacking}"
    for said, path, value in given:
        for key in _leaves(path, value):
            name = next((name for name in unmet if f"{'.'.join(key)}.".startswith(f"{name}.")), None)
            if name is not None and _at(document, key) != _at(defaults, key):
                which = f', and this run\'s is method = "{config.method}"' if name in options.unread else ""
                raise ConfigError(
                    f"{said} would be without effect: {name} is for {unmet[name]}{which}; leave it out"
                )


def _lacking(options: type[MethodOptions], own: Mapping[str, Any], name: str) -> str | None:
    """Return what an option of the method's own needs and does not have, or None."""
    if name not in options.needs:
        return None
    other, values = options.needs[name]
    if own.get(other) not in values:
        return f"{other} = {' or '.join(map(_toml, values))}" if None not in values else f"{other} unset"
    return _lacking(options, own, other)


def _leaves(path: Sequence[str], value: Any) -> Iterator[tuple[str, ...]]:
    if isinstance(value, Mapping):
        for part, inner in value.items():
            yield from _leaves((*path, part), inner)
    else:
        yield tuple(path)


def _at(tree: Any, key: Sequence[str]) -> Any:
    for part in key:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"'
