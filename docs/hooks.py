"""Pages that are made while the site is built: settings, commands, public names, and the front pages.

``make docs`` builds the site; mkdocs calls :func:`on_files`. :func:`pages` gives the same texts to the tests.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

_EXAMPLE = re.compile(r"(?:^[ ]*>>> .*\n?(?:^[ ]*\S.*\n?)*)+", re.MULTILINE)
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([\w.]+)`")

PLUG_INS = {
    "What a method is": ["strategies.base", "strategies.averaging"],
    "Options": ["fedllm.config"],
    "What a client trains": ["fedllm.models.model", "fedllm.models.training", "fedllm.data.tokens"],
    "What a codec is": [
        "fedllm.codecs",
        "fedllm.codecs.base",
        "fedllm.codecs.chain",
        "fedllm.codecs.stages.quantize",
    ],
    "What an adapter is": ["fedllm.models.extra_adapters"],
    "What a task is": ["fedllm.tasks.base", "fedllm.data.corpus"],
    "Tensors, sums and draws": ["fedllm.tensors", "fedllm.sums", "fedllm.randomness"],
    "How plug-ins are found": ["fedllm.plugins"],
}
"""The modules that a plug-in builds on; their public names are the reference for those who write one."""


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs: add the pages that are made."""
    from mkdocs.structure.files import File

    for path, text in pages():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> Iterator[tuple[str, str]]:
    """Yield path and Markdown of every page that is made."""
    made: dict[str, Callable[[], str]] = {
        "index.md": lambda: front_page("README.md"),
        "changelog.md": lambda: front_page("CHANGELOG.md"),
        "contributing.md": lambda: front_page("CONTRIBUTING.md"),
        "security.md": lambda: front_page("SECURITY.md"),
        "reference/configuration.md": settings,
        "reference/commands.md": commands,
        "reference/python.md": front_door,
        "reference/plug-ins.md": plug_ins,
    }
    for path, text in made.items():
        yield path, text()


def front_page(name: str) -> str:
    """Return a page of the repository's root, its links as they are from the site's."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = text.replace("](docs/", "](").replace("](decisions)", "](decisions/fixed-point-sums.md)")
    for page in ("CHANGELOG.md", "CONTRIBUTING.md", "README.md", "SECURITY.md"):
        here = "index.md" if page == "README.md" else page.lower()
        text = text.replace(f"]({page}", f"]({here}")
    return text


def settings() -> str:
    """Return every key of a configuration, by section."""
    from simulations.keys import markdown

    return (
        "# Configuration reference\n\n"
        "Every key, as `--set` takes it; in TOML what stands before the last dot is the section. "
        "`fedllm keys` prints the same, plug-ins' options included. "
        "[Configuration](../configuration.md) says how to use them.\n\n" + markdown()
    )


def commands() -> str:
    """Return every command with its arguments and options, as typer documents them."""
    command = [sys.executable, "-m", "typer", "fedllm.cli", "utils", "docs", "--name", "fedllm"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return re.sub(r"\A# `fedllm`", "# Commands", text)


def front_door() -> str:
    """Return the reference of what ``import fedllm`` gives, and of its errors."""
    text = "# The Python API\n\nWhat `import fedllm` gives; nothing is loaded before it is used.\n\n"
    return text + _entries("fedllm") + "## Errors\n\n" + _module("fedllm.errors")


def plug_ins() -> str:
    """Return the reference of what plug-ins build on."""
    text = "# Python for plug-ins\n\nWhat a method, a codec, an adapter or a task of one's own builds on.\n\n"
    for title, modules in PLUG_INS.items():
        text += f"## {title}\n\n" + "".join(map(_module, modules))
    return text


def home(name: str, value: Any) -> str:
    """Return where a public thing is defined: there is its one entry, under whatever name it is offered."""
    if isinstance(value, type) or inspect.isfunction(value):
        return f"{value.__module__}.{value.__qualname__}"
    return name


def _module(name: str) -> str:
    """Return a module's entries under what its docstring begins with."""
    head = inspect.cleandoc(import_module(name).__doc__ or "").split("\n\n")[0]
    return f"**`{name}`** - {head}\n\n" + _entries(name)


def _entries(module: str) -> str:
    """Return mkdocstrings' directives for a module's public names, each at the first place that offers it.

    A name of the front door has a link that leads there: whoever writes a task looks for ``Task`` here.
    """
    text, links = "", ""
    for name in import_module(module).__all__:
        public = f"{module}.{name}"
        path = home(public, getattr(import_module(module), name))
        if _first_offers()[path] == public:
            text += f"::: {path}\n    options:\n      heading: {public}\n\n"
        elif _first_offers()[path] == f"fedllm.{name}":
            links += f"See also [`{public}`][{path}].\n\n"
    return links + text


@cache
def _first_offers() -> dict[str, str]:
    """Return the name under which each public thing is offered first, from the front door on."""
    offers: dict[str, str] = {}
    for module in ["fedllm", "fedllm.errors", *(name for names in PLUG_INS.values() for name in names)]:
        for name in import_module(module).__all__:
            public = f"{module}.{name}"
            offers.setdefault(home(public, getattr(import_module(module), name)), public)
    return offers


def markdown(text: str) -> str:
    """Return a docstring whose examples are fenced and whose roles are plain names."""
    text = _ROLE.sub(r"`\1`", text)
    return _EXAMPLE.sub(lambda found: f"```pycon\n{found.group().rstrip()}\n```\n", text)
