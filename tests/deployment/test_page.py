"""The commands of docs/deployment.md, as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.deployment.conftest import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"


def test_three_nodes_on_one_machine(tmp_path: Path) -> None:
    """LoRA, FwdLLM and FedKD over TLS with authenticated nodes; one kill ends all that was started."""
    (commands,) = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-c", commands],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    summaries = {
        file.parent.name: json.loads(file.read_text())
        for file in (tmp_path / "federation/runs").glob("*/summary.json")
    }
    assert {name: summary["status"] for name, summary in summaries.items()} == dict.fromkeys(
        ("lora", "fwdllm", "fedkd"), "finished"
    ), done.stdout
    assert all(summary["bytes"]["wire_up"] > 0 for summary in summaries.values())
    assert "MEND" not in done.stdout

    def gone() -> bool:
        lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        return not any(str(tmp_path) in line or "federation/bundles" in line for line in lines)

    until(gone, 30)
