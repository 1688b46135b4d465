"""Finds the methods: the folders of this package that hold ``options.py``, and those that plug-ins add.

Options are known without importing torch, so that the command line, the form and the schema stay quick; a
method's implementation is imported only once the method is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm import plugins, tasks
from fedllm.config import MethodOptions, Override, RunConfig, read_override, require_effect, resolve
from fedllm.errors import ConfigError
from fedllm.models.tuning import kinds

if TYPE_CHECKING:
    from fedllm.codecs import Codecs
    from strategies.base import Method

__all__ = [
    "load_method",
    "method_names",
    "method_options",
    "methods",
    "open_codecs",
    "open_method",
    "resolve_keys",
    "resolve_run",
]


@cache
def _own() -> dict[str, type[MethodOptions]]:
    folders = sorted(path.parent.name for path in Path(__file__).parent.glob("*/options.py"))
    return {name: import_module(f"strategies.{name}.options").Options for name in folders}


def methods() -> dict[str, type[MethodOptions]]:
    """Return the options of every method, by the method's name.

    Raises:
        ConfigError: a plug-in takes a name that is taken.
    """
    return {**_own(), **plugins.new("method", _own(), plugins.methods())}


def method_names() -> list[str]:
    """Return the names of all methods.

    >>> "lora" in method_names()
    True
    """
    return sorted(methods())


def method_options(name: str) -> type[MethodOptions]:
    """Return the options model of a method, for :func:`fedllm.config.resolve`.

    Raises:
        ConfigError: there is no such method.
    """
    known = methods()
    if name not in known:
        raise ConfigError(
            f"method = {name!r} is unknown; valid are {', '.join(sorted(known))}, and what plug-ins add"
        )
    return known[name]


def load_method(name: str) -> type[Method]:
    """Import a method by name."""
    module, _, attribute = method_options(name).implementation.partition(":")
    method: type[Method] = getattr(import_module(module), attribute)
    return method


def open_method(config: RunConfig) -> Method:
    """Return a run's method, its plug-ins loaded.

    Raises:
        ConfigError: the method, a plug-in or a combination of options cannot be used.
    """
    plugins.load(config.plugins)
    method = load_method(config.method)(config)
    rule = config.options.get("rule")
    which = f'method = "{config.method}"' + ("" if rule is None else f' with {config.method}.rule = "{rule}"')
    if config.server.robust != "none" and not method.averages:
        raise ConfigError(
            f'server.robust = "{config.server.robust}" takes the place of an average of updates, and {which} '
            'takes none, but sums of slopes, of products or of what belongs together: take method "fedavg", '
            '"fedkd", or "lora" with rule fedit, ffa, alternate or fedsa, or server.robust = "none"'
        )
    if config.privacy.secure_aggregation and not method.sums:
        raise ConfigError(
            f"privacy.secure_aggregation = true gives the server the sum of a round's replies, and {which} "
            'needs each: take method "fedavg", "fedkd", "scaffold", "lora" with rule fedit, ffa or '
            'alternate, or "mezo" with mezo.candidates above 0 or "fwdllm" with fwdllm.shared = true, whose '
            "clients share their directions"
        )
    if config.privacy.noised and not method.private:
        raise ConfigError(
            "privacy.noise_multiplier and privacy.target_epsilon hide clients in a sum of clipped updates, "
            f'and {which} shows more of them: take method "fedavg", "fedkd", "lora" with rule fedit, ffa or '
            'alternate, or "mezo" with mezo.candidates above 0 or "fwdllm" with fwdllm.shared = true and '
            'fwdllm.warm_start = "none", whose clients share their directions'
        )
    if config.privacy.hides == "example" and not method.private_steps:
        raise ConfigError(
            'privacy.unit = "example" adds noise to steps of plain local training, and '
            f'{which} learns from texts in other ways too: take method "fedavg", or "lora" with another rule '
            "than fed-sb and fedsa"
        )
    if config.buffered and not method.asynchronous:
        raise ConfigError(
            'server.mode = "async" adds up updates that began from different versions of the global tensors, '
            f'which {which} cannot: take method "fedavg", or "lora" with rule fedit or ffa, or '
            'server.mode = "sync"'
        )
    return method


def open_codecs(config: RunConfig) -> Codecs:
    """Return a run's codecs, its plug-ins loaded.

    Raises:
        ConfigError: a plug-in or a codec's text cannot be used, or its codes cannot be summed and must be.
    """
    from fedllm.codecs import Codecs

    plugins.load(config.plugins)
    codecs = Codecs.of(config.codec)
    if config.privacy.secure_aggregation:
        _require_summable(config, codecs)
    return codecs


def resolve_keys(document: Mapping[str, Any], overrides: Iterable[Override] = ()) -> RunConfig:
    """Resolve a configuration, every key checked by itself; needs no torch.

    Raises:
        ConfigError: names what was given and what is allowed.
    """
    overrides = list(overrides)
    named = _plugins(document, overrides)
    plugins.load(named)
    config = resolve(document, overrides, methods=method_names(), options=method_options)
    task = tasks.of(config)
    require_effect(config, method_options(config.method), task.unread(), map(read_override, overrides))
    if config.tuning.blocks > 1 and "tuning.blocks" in method_options(config.method).unread:
        raise ConfigError(
            f'method = "{config.method}" trains all layers in every round, and tuning.blocks = '
            f'{config.tuning.blocks}: set it to 1, or take method = "fedavg" or "lora"'
        )
    if config.evaluation.every and config.evaluation.metric is None and config.metric not in task.metrics:
        evaluation = config.evaluation.model_copy(update={"metric": task.metrics[0]})
        config = config.model_copy(update={"evaluation": evaluation})
    source = None if config.init_from is None else str(Path(config.init_from).resolve())
    return config.model_copy(update={"plugins": tuple(named), "init_from": source})


def resolve_run(document: Mapping[str, Any], overrides: Iterable[Override] = ()) -> RunConfig:
    """Resolve a configuration and let its method and codecs object to combinations only they can judge.

    Raises:
        ConfigError: names what was given and what is allowed.
    """
    overrides = list(overrides)
    config = resolve_keys(document, overrides)
    open_method(config)
    _require_tuned(config, overrides)
    codecs = open_codecs(config)
    if codecs.up.stateful and config.privacy.update_clip is not None:
        raise ConfigError(
            f"codec.up = {config.codec.up!r} adds what earlier messages lost to an update, which the server "
            f"would cut off at privacy.clip = {config.privacy.clip:g}; leave one of them out"
        )
    if "ef21" in str(codecs.down):
        raise ConfigError(
            f'codec.down = "{config.codec.down}": ef21 needs an estimate that a client which was not asked '
            "for a while does not have; use error_feedback"
        )
    from fedllm.secagg.ring import Ring
    from strategies.private import with_noise

    config = with_noise(config)
    if config.privacy.secure_aggregation and config.privacy.noised:
        Ring.of(config, codecs.up, config.cohort)  # refuses noise for which its integers are not made
    return config


def _require_summable(config: RunConfig, codecs: Codecs) -> None:
    """Refuse codecs whose codes of two clients cannot be added."""
    up, clip = codecs.up, config.privacy.update_clip
    if up.grid is None and str(up) != "none":
        raise ConfigError(
            f"codec.up = {config.codec.up!r}: under privacy.secure_aggregation codes are added before "
            "anybody decodes them, which takes one grid for all clients, all values and no tables: take "
            '"fixed(bits=8, fraction=12)", or "none"'
        )
    if up.grid is not None and clip is not None and not config.privacy.noised:
        raise ConfigError(
            f"codec.up = {config.codec.up!r} rounds after a client has clipped to privacy.clip = {clip:g}, "
            "and under privacy.secure_aggregation nobody clips again but before noise is added: take "
            'codec.up = "none", or no clip'
        )


def _require_tuned(config: RunConfig, overrides: Iterable[Override]) -> None:
    """Refuse an override of what is tuned, or of the frozen rest, that the run does not follow."""
    given = [one for one in map(read_override, overrides) if one[1][0] in ("tuning", "model")]
    if not given:
        return
    options, peft = method_options(config.method), config.tuning.peft
    for said, path, value in given:
        if "tuning.rank" in options.unread and list(path) == ["tuning", "peft"] and value != "full":
            raise ConfigError(
                f'{said}: method = "{config.method}" tunes the whole model; use method = "lora", or leave '
                "it out"
            )
    unread = (f"tuning.{key}" for key in kinds.KEYS - _read(peft))
    lacking = dict.fromkeys(unread, f'other kinds of tuning.peft than "{peft}"')
    if config.model.dtype == "bfloat16" and (peft == "full" or "tuning.rank" in options.unread):
        lacking["model.dtype"] = "what is frozen, and here all is trained, in float32"
    require_effect(config, options, lacking, given)


def _read(peft: str) -> frozenset[str]:
    """Return the keys of ``[tuning]`` that a kind reads, from the table, or else from who attaches it."""
    if (found := kinds.known(peft)) is not None:
        return found
    from fedllm.models.base.loading import quiet

    with quiet():  # peft brings libraries that give hints when they are imported
        from fedllm.models.tuning.adapters import reads
    return reads(peft)


def _plugins(document: Mapping[str, Any], overrides: Iterable[Override]) -> list[str]:
    """Return the plug-ins that a configuration names: they decide which of its other keys there are."""
    names = document.get("plugins", ())
    for _, path, value in map(read_override, overrides):
        if list(path) == ["plugins"]:
            names = value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f'plugins = {names!r} is no list of modules, such as ["my_method.py"]')
    # Whoever goes on with the run may do so from another folder.
    return [str(Path(name).resolve()) if name.endswith(".py") else name for name in names]
