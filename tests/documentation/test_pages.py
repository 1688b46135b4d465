"""What pages tell people to type exists, their links lead somewhere, and two of them are tried in full."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import click
import pytest
import typer

from docs import hooks
from fedllm.cli import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MADE = {"reference/configuration.md", "reference/commands.md", "reference/python.md", "reference/plug-ins.md"}


def code(text: str) -> list[str]:
    """Return the lines of a page's code blocks, fenced or indented, and its spans of code."""
    text = text.replace("\\\n", " ")
    fences = re.compile(r"^ *```([^\n]*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
    fenced = [content for language, content in fences.findall(text) if language in ("", "sh")]
    text = fences.sub("", text)
    indented = re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE)
    spans = re.findall(r"`(fedllm [^`]+)`", text.replace("\n", " "))
    return [line for block in fenced for line in block.split("\n")] + indented + spans


def spoken(line: str) -> list[str]:
    """Return the words after ``fedllm`` of a command line, up to a comment or what the shell takes."""
    words = shlex.shlex(line.replace("'", '"'), posix=True, punctuation_chars="|&<>;)")
    words.whitespace_split = True
    for word in words:
        if word == "fedllm":
            return list(itertools.takewhile(lambda one: not set(one) <= set("|&<>;)"), words))
    return []


@cache
def group() -> click.Group:
    made = typer.main.get_command(app)
    assert isinstance(made, click.Group)
    return made


def misspelt(line: str) -> list[str]:
    """Return the command or the options of a line that fedllm does not have."""
    name, *words = spoken(line) or ["presets"]
    command = group() if name.startswith("-") else group().commands.get(name)
    if command is None:
        return [name] if re.fullmatch(r"[a-z-]+", name) else []
    known = {text for one in command.params for text in one.opts} | {"--help"}
    given = (word.partition("=")[0] for word in [name, *words])
    return [option for option in given if option.startswith("--") and option not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_exists_with_its_options(page: Path) -> None:
    lines = code(page.read_text(encoding="utf-8"))
    assert {line: wrong for line in lines if "fedllm " in line and (wrong := misspelt(line))} == {}


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('fedllm simulate x --sed codec.up="rotate | sign" --json # --nothing', ["--sed"]),
        ("HOST=a fedllm simulat x | tee --append", ["simulat"]),
        ("fedllm --version && other --option", []),
    ],
)
def test_a_command_that_does_not_exist_is_found(line: str, wrong: list[str]) -> None:
    assert misspelt(line) == wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    places = [page.parent / target for target in targets if "://" not in target]
    made = [ROOT / "docs" / name for name in MADE]
    assert [str(p) for p in places if not p.exists() and p.resolve() not in made] == []


def test_every_page_stands_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert {name for name in pages | MADE if f": {name}\n" not in navigation} == set()


def test_front_pages_link_to_the_sites_own_pages() -> None:
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"):
        assert not re.search(r"\]\((?:docs/|[A-Z]+\.md)", hooks.front_page(name))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return a page's files and commands in order: name and content, or "" and a shell's lines."""
    pattern = r'^```(?:(?:python|toml) title="([\w.]+)"|sh)\n(.*?)^```'
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["method", "codec", "adapter", "task"])
def test_what_is_added_from_outside_works_as_its_page_says(tmp_path: Path, name: str) -> None:
    """Word for word, in an empty folder; pip installs into it, and from no index."""
    site = tmp_path / "site"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{site}{os.pathsep}{ROOT}",
        "PIP_TARGET": str(site),
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this one the other way round: no isolation
    }
    found = blocks(ROOT / "docs" / "extend" / f"{name}.md")
    assert sum(not file for file, _ in found) == 2
    said = ""
    for file, content in found:
        if file:
            (tmp_path / file).write_text(content, encoding="utf-8")
            continue
        run = subprocess.run(
            ["bash", "-e", "-c", content],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        said += run.stdout
    assert "quickstart: finished" in said
    assert (tmp_path / "runs").is_dir()
    told = {
        "method": "trimmed.share",
        "codec": "x fewer bytes, relative error",
        "adapter": "6 gates",
        "task": "sure by",
    }
    assert told[name] in said


def test_nobody_but_the_tasks_compares_their_names() -> None:
    from fedllm import tasks

    names = "|".join(tasks.names())
    asks = re.compile(
        rf'task(?:\.name)?"?\]? (?:==|!=|in) [\[({{]?"(?:{names})"|"(?:{names})" (?:==|!=) .*task'
    )
    rooms = ("fedllm", "strategies", "simulations", "client", "server")
    files = {str(file.relative_to(ROOT)): file for name in rooms for file in (ROOT / name).rglob("*.py")}
    assert [
        name
        for name, file in files.items()
        if not name.startswith("fedllm/tasks/") and asks.search(file.read_text(encoding="utf-8"))
    ] == []
