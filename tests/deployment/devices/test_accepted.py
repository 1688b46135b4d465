"""A device runs what is installed on it, whatever the server sends."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from client.device.accepted import APP, refusal
from client.device.bundle import Bundle
from server.federation.control import build_bundle
from server.federation.link import open_link
from server.federation.submit import bundle_of
from tests.deployment.conftest import IDLE, supernode
from tests.processes import until

OURS = bundle_of("server.app:app", APP, {"fedllm": "", "run-dir": ""})


def repacked(**files: bytes) -> bytes:
    """Our bundle with other files in it or beside it."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(OURS)) as before, zipfile.ZipFile(made, "w") as after:
        kept = {name: before.read(name) for name in before.namelist()}
        for name, content in {**kept, **files}.items():
            after.writestr(name, content)
    return made.getvalue()


def project(text: str) -> bytes:
    return repacked(**{"pyproject.toml": text.encode()})


def test_our_own_bundle_is_run() -> None:
    assert refusal(OURS) is None


COMPONENTS = '[tool.flwr.app.components]\nclientapp = "client.app:app"\n'


@pytest.mark.parametrize(
    ("bundle", "reason"),
    [
        (bundle_of("server.app:app", "os:system", {}), "asks for 'os:system'"),
        (repacked(**{"client/app.py": b"import os"}), "brings 'client/app.py'"),
        (repacked(**{"../../etc/cron.d/x": b"*"}), "brings '../../etc/cron.d/x'"),
        (
            project(f'[project]\nname = "x"\ndependencies = ["evil"]\n{COMPONENTS}'),
            "asks to install ['evil']",
        ),
        (project(COMPONENTS.replace('"client.app:app"', "7")), "asks for '7'"),
        (project("[project"), "cannot be read"),
        (project("#" * 70_000), "larger than 65536 bytes"),
        (b"", "cannot be read"),
    ],
)
def test_anything_else_is_refused_with_what_would_be_right(bundle: bytes, reason: str) -> None:
    said = str(refusal(bundle))
    assert reason in said
    assert said.endswith("; this device runs client.app:app as it is installed, and nothing else")


def test_a_bundle_with_code_is_refused_even_where_it_is_named_rightly() -> None:
    project = b'[project]\nname = "fedllm"\nversion = "1"\nlicense = "x"\n[tool.flwr.app]\npublisher = "x"\n'
    project += b'[tool.flwr.app.components]\nserverapp = "server.app:app"\nclientapp = "client.app:app"\n'
    bundle = build_bundle({"pyproject.toml": project, "client/app.py": b"app = 1\n"})
    assert "brings 'client/app.py'" in str(refusal(bundle))


@pytest.mark.slow
def test_a_node_answers_a_foreign_app_with_its_reason_and_stays(
    keys: Callable[[int], tuple[Path, list[Bundle]]], tmp_path: Path
) -> None:
    """It is one process, whose local API hands the task to nobody else."""
    folder, bundles = keys(1)
    with open_link(folder) as link:
        node = supernode(bundles[0], tmp_path, app=APP)
        try:
            config: dict[str, str | int] = {"rounds": 1, "clients": 1, "out": ""}
            number = link.control.start(bundle_of(f"{IDLE}_server:app", f"{IDLE}_client:app", config), config)
            until(lambda: link.control.run(number).status == "finished", 120.0)
            log = (tmp_path / "node-0.log").read_text()
            assert "the run asks for 'simulations.bench.deployed.idle_client:app'" in log
            assert node.poll() is None
            assert psutil.Process(node.pid).children(recursive=True) == []
            port = next(line for line in log.splitlines() if "Uvicorn running on" in line).rpartition(":")[2]
            stranger = RuntimeHttpClient.from_server_address(
                f"127.0.0.1:{port.split()[0]}",
                True,
                None,
                [RuntimeVersionHttpInterceptor(component_name="flower-superexec")],
            )
            with stranger, pytest.raises(httpx.HTTPStatusError, match="401"):
                stranger.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
        finally:
            node.stop()
