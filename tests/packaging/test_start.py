"""The command line answers at once, and nothing imports torch before it is needed."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from tests.parts import quick

MODULES = {
    "fedllm.cli": {"torch", "transformers", "flwr", "matplotlib", "pandas", "scipy"},
    "fedllm.config": {"torch", "transformers", "flwr"},
    "fedllm.protocol.wire": {"torch", "transformers"},
    "client.app": {"torch", "transformers", "peft"},
    "client.device.supervisor": {"torch", "transformers", "flwr", "numpy", "pydantic", "httpx"},
    "client.device.supernode": {"torch", "transformers", "pandas", "pyarrow", "scipy"},
    "client.device.task": {"torch", "transformers", "sqlalchemy", "alembic"},
    "client.resident": {"torch", "transformers", "flwr", "numpy"},
    "server.app": {"torch", "transformers", "peft"},
    "strategies.registry": {"torch", "transformers", "flwr"},
}


def test_version() -> None:
    command = [Path(sysconfig.get_path("scripts")) / "fedllm", "--version"]
    output = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert output == f"fedllm {project['version']}\n"


@pytest.mark.parametrize("module", quick(MODULES, "client.app"))
def test_module_imports_nothing_heavy(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert set(json.loads(output)) & MODULES[module] == set()


@pytest.mark.slow
def test_a_dry_run_of_another_rank_or_model_imports_no_peft() -> None:
    code = (
        "import sys; from fedllm.cli import main; sys.argv[1:] = ['simulate', 'quickstart', '--dry-run',"
        "'--set', 'tuning.rank=4', '--set', 'model.dropout=0.2']\n"
        "try: main()\n"
        "finally: print(sorted({'peft', 'transformers'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert "rank = 4" in output
    assert output.endswith("\n[]\n")


@pytest.mark.slow
def test_help_takes_less_than_half_a_second() -> None:
    # Processor time, not wall time: what is promised is for an idle machine, and this one may be busy.
    taken = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [Path(sysconfig.get_path("scripts")) / "fedllm", "--help"]
        output = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if taken[-1] < 0.5:
            break
    assert "simulate" in output
    assert min(taken) < 0.5
