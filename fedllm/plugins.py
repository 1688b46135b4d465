"""Plug-ins: methods, codec stages, kinds of adapters and tasks that live outside fedllm.

    installed   a distribution declares entry points in the groups ``fedllm.methods`` (a class of options),
                ``fedllm.codecs`` (a stage), ``fedllm.adapters`` (a kind) or ``fedllm.tasks`` (a task); it is
                found without being named
    named       ``plugins = ["my_module"]`` or ``--plugin my_method.py``: importing the module is enough

A named module offers every subclass of :class:`fedllm.config.MethodOptions` that it defines, the stages in
its ``STAGES``, the kinds in its ``ADAPTERS`` and the tasks in its ``TASKS``. What each is called, the class
itself says. A device takes installed plug-ins only: what a server sends names no code to be run there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard, TypeVar

from fedllm.config import MethodOptions
from fedllm.errors import ConfigError

__all__ = ["adapters", "load", "methods", "new", "require_installed", "stages", "tasks"]

Added = TypeVar("Added")

_named: dict[str, ModuleType] = {}
"""Modules that this process was told to load, by the name it was given."""


def load(names: Iterable[str]) -> None:
    """Import plug-ins by module name, or by the path of a Python file.

    Raises:
        ConfigError: there is no such module or file, or it cannot be imported; says why.
    """
    for name in names:
        if name not in _named:
            _named[name] = _from_file(Path(name)) if name.endswith(".py") else _import(name)


def require_installed(names: Iterable[str]) -> None:
    """On a device: let only plug-ins pass that its owner installed, and import nothing else.

    Raises:
        ConfigError: one is not installed here.
    """
    here = {entry.module.partition(".")[0] for group in _GROUPS for entry in _installed(group)}
    for name in names:
        if name.partition(".")[0] not in here:
            raise ConfigError(
                f"the run needs the plug-in {name!r}, which is not installed on this device: install the "
                "distribution that declares it among its entry points"
            )


def methods() -> dict[str, type[MethodOptions]]:
    """Return the options of every method that a plug-in adds, by the method's name."""
    own = (value for module in _named.values() for value in vars(module).values() if _defines(module, value))
    return _by_name("method", "method", [*_entries("fedllm.methods", MethodOptions), *own])


def stages() -> dict[str, type[Any]]:
    """Return every codec stage that a plug-in adds, by the stage's name."""
    own = (stage for module in _named.values() for stage in getattr(module, "STAGES", ()))
    return _by_name("codec stage", "name", [*_entries("fedllm.codecs", object), *own])


def adapters() -> dict[str, type[Any]]:
    """Return every kind of adapter that a plug-in adds, by the kind's name."""
    own = (kind for module in _named.values() for kind in getattr(module, "ADAPTERS", ()))
    return _by_name("kind of adapter", "name", [*_entries("fedllm.adapters", object), *own])


def tasks() -> dict[str, type[Any]]:
    """Return every task that a plug-in adds, by the task's name."""
    own = (task for module in _named.values() for task in getattr(module, "TASKS", ()))
    return _by_name("task", "name", [*_entries("fedllm.tasks", object), *own])


def new(what: str, own: Collection[str], added: Mapping[str, Added]) -> Mapping[str, Added]:
    """Return what plug-ins add, once it has proved to take no name of fedllm's own.

    Args:
        what: they are, for people.
        own: names of fedllm's own.
        added: by plug-ins, by name.

    Raises:
        ConfigError: a plug-in takes a name that is taken.
    """
    if taken := sorted(added.keys() & set(own)):
        raise ConfigError(f"a plug-in adds a {what} {taken[0]!r}, which fedllm has already; rename it")
    return added


_GROUPS = ("fedllm.methods", "fedllm.codecs", "fedllm.adapters", "fedllm.tasks")


def _by_name(what: str, attribute: str, found: Iterable[type[Any]]) -> dict[str, type[Any]]:
    """Return what plug-ins add by the name that each says of itself; one may be both installed and named."""
    named: dict[str, type[Any]] = {}
    for value in found:
        name = getattr(value, attribute, None)
        if not isinstance(name, str):
            raise ConfigError(f"a plug-in adds a {what} without a name: {value!r} lacks {attribute}, a text")
        if named.setdefault(name, value) is not value:
            places = f"{named[name].__module__} and {value.__module__}"
            raise ConfigError(f"two plug-ins add a {what} {name!r}, {places}; leave one of them out")
    return named


def _entries(group: str, kind: type) -> Iterable[type[Any]]:
    return (_checked(entry, kind) for entry in _installed(group))


@cache
def _installed(group: str) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


def _defines(module: ModuleType, value: Any) -> TypeGuard[type[MethodOptions]]:
    """Whether a module, or a part of it, defines these options: others it may have imported."""
    own = isinstance(value, type) and f"{value.__module__}.".startswith(f"{module.__name__}.")
    return own and issubclass(value, MethodOptions)


def _checked(entry: EntryPoint, kind: type) -> Any:
    try:
        value = entry.load()
    except Exception as error:
        raise ConfigError(
            f"the installed plug-in {entry.name} = {entry.value!r} cannot be imported: "
            f"{type(error).__name__}: {error}; mend or uninstall it"
        ) from error
    if not (isinstance(value, type) and issubclass(value, kind)):
        raise ConfigError(f"the installed plug-in {entry.name} = {entry.value!r} is no {kind.__name__}")
    return value


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and name.startswith(error.name or "?"):
            raise ConfigError(
                f"plugins: there is no module {name!r} to import; install it, or give the path of a .py file"
            ) from error
        raise _broken(name, error) from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"plugins: there is no file {path}")
    present = sys.modules.get(path.stem)
    if present is not None:
        if Path(getattr(present, "__file__", None) or "").resolve() == path.resolve():
            return present
        raise ConfigError(
            f"plugins: a module {path.stem!r} is loaded already; give the file {path} another name"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"plugins: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that what the module declares by name is found in it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[path.stem]
        raise _broken(str(path), error) from error
    return module


def _broken(name: str, error: Exception) -> ConfigError:
    return ConfigError(f"plugins: {name} cannot be imported: {type(error).__name__}: {error}")
