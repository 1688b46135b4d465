"""The commands of docs/deployment.md, as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import psutil
import pytest

from fedllm.host.processes import Child, open_log
from tests.processes import until

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(1800)]

PAGE = Path(__file__).parents[3] / "docs" / "deployment.md"


def test_three_nodes_on_one_machine(tmp_path: Path) -> None:
    """LoRA, FwdLLM and FedKD over TLS with authenticated nodes; one kill ends all that was started."""
    (commands,) = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    log = tmp_path / "shell.log"
    # A process of its own session, so that whatever ends this test ends all that the page started.
    shell = Child(["bash", "-e", "-c", f"cd {tmp_path}\n{commands}"], {"HF_HUB_OFFLINE": "1"}, open_log(log))
    try:
        until(lambda: shell.poll() is not None, 1700)
    finally:
        shell.stop()
    summaries = {
        file.parent.name: json.loads(file.read_text())
        for file in (tmp_path / "federation/runs").glob("*/summary.json")
    }
    assert {name: summary["status"] for name, summary in summaries.items()} == dict.fromkeys(
        ("lora", "fwdllm", "fedkd"), "finished"
    ), log.read_text()
    assert all(summary["bytes"]["wire_up"] > 0 for summary in summaries.values())
    assert "fix:" not in log.read_text()

    def gone() -> bool:
        lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        return not any(str(tmp_path) in line or "federation/bundles" in line for line in lines)

    until(gone)
