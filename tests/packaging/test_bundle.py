"""The wheel holds the five packages whole; the Flower bundle holds what a node needs, and little else."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["client", "fedllm", "server", "simulations", "strategies"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git knows or would add, in a folder whose name Flower accepts."""
    folder = tmp_path_factory.mktemp("checkout") / "fedllm"
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def installed(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, as pip lays it out."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(folder), str(checkout)], check=True)
    return folder


def test_wheel_holds_every_file_of_the_packages(checkout: Path, installed: Path) -> None:
    for package in PACKAGES:
        made = {path.relative_to(checkout) for path in (checkout / package).rglob("*") if path.is_file()}
        assert made
        assert [path for path in made if not (installed / path).is_file()] == []
    assert (installed / "fedllm/py.typed").is_file()
    assert list((installed / "fedllm/presets").glob("*.toml"))
    assert not (installed / "tests").exists()


def test_installed_packages_work_from_one_root(installed: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        f"import {', '.join(PACKAGES)}\n"
        f"print(*({', '.join(f'{package}.__file__' for package in PACKAGES)},))\n"
        "from fedllm.cli import main; sys.argv = ['fedllm', 'presets']; main()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert all(path.startswith(str(installed)) for path in run.stdout.splitlines()[0].split())
    assert "quickstart" in run.stdout


@pytest.fixture(scope="module")
def bundle(checkout: Path) -> zipfile.ZipFile:
    flwr = Path(sysconfig.get_path("scripts")) / "flwr"
    subprocess.run([flwr, "build"], cwd=checkout, check=True, capture_output=True)
    (path,) = checkout.glob("*.fab")
    assert path.stat().st_size < 1_600_000, "a node fetches it with every run"
    return zipfile.ZipFile(path)


def test_bundle_carries_the_node_side_and_the_apps(bundle: zipfile.ZipFile) -> None:
    names = [name for name in bundle.namelist() if not name.startswith(".info/")]
    roots = {name.partition("/")[0] for name in names}
    assert roots == {"fedllm", "client", "server", "strategies", "pyproject.toml", "LICENSE"}
    assert {"client/app.py", "server/app.py", "fedllm/config/run.py", "strategies/lora/method.py"} <= set(
        names
    )
    assert not [name for name in names if name.startswith(("server/dashboard", "fedllm/terminal"))]
    assert not [name for name in names if name.endswith(("_commands.py", "/cli.py", "supervisor.py"))]


def test_apps_of_the_unpacked_bundle_load(bundle: zipfile.ZipFile, tmp_path: Path) -> None:
    bundle.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import client.app, server.app, strategies.registry\n"
        "import client.worker, server.rounds.conduct\n"
        "print(*(strategies.registry.load_method(n).__name__ for n in strategies.registry.method_names()))\n"
        "print(client.app.__file__)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    methods, place = run.stdout.splitlines()
    assert {"FedAvg", "FedKD", "FwdLLM", "Lora"} <= set(methods.split())
    assert place == str(tmp_path / "client" / "app.py")
