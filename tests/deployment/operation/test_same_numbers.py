"""A deployment of three nodes gives the numbers of the simulation, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.device.participation import parse_bytes
from fedllm.privacy.accounting import epsilon_of
from fedllm.runs.reader import Run as StoredRun
from fedllm.wording import number
from server.dashboard.actions.operations import Operations
from server.dashboard.reading.prometheus import render
from server.dashboard.reading.verdict import cost
from simulations.engines.loopback import simulate
from strategies.private import with_noise
from strategies.registry import load_method
from tests.deployment.federation import Federation, configuration, federation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

METHODS = {
    "lora": {"codec": {"up": "quantize(bits=8) | entropy", "down": "quantize(bits=8)"}},
    "fedavg": {},
    "fwdllm": {},
    "fedkd": {},
    "mixed": {},
}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("f") / "federation", 3) as made:
        made.join(0, 1, 2)
        yield made


@pytest.mark.parametrize("method", METHODS)
def test_deployment_equals_simulation(
    three: Federation, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, method: str
) -> None:
    options = load_method(method).Options().model_dump(mode="json", exclude_none=True)
    config = configuration(tiny_encoder, tiny_texts, method=method, options=options, **METHODS[method])
    simulate(config, tmp_path / "simulated")
    summary = three.finish(three.submit(config))
    simulated = StoredRun(tmp_path / "simulated").summary
    assert summary["status"] == simulated["status"] == "finished"
    # A device that was late would be no fault of the numbers.
    assert (summary["failures"], summary["rejected"]) == (0, 0)
    assert summary["state_sha256"] == simulated["state_sha256"]
    assert summary["metrics"] == simulated["metrics"]
    # What the ledger counts is what crosses, but for Flower's own framing of each message.
    told, messages = summary["bytes"], 2 * 3 + 3
    assert 0 < told["wire_up"] - told["up"] < parse_bytes("4KiB") * (messages + 3)
    assert 0 < told["wire_down"] - told["down"] < parse_bytes("4KiB") * (messages + 3)


def test_asynchronous_rounds_of_all_nodes_are_synchronous_ones(
    three: Federation, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    """Whatever order answers come in; and rounds of two of them go on while the third node is at work."""
    synchronous = configuration(tiny_encoder, tiny_texts, server={"quorum": 3, "deadline_s": 600.0})
    simulate(synchronous, tmp_path / "simulated")
    for buffer in (3, 2):
        server = {"mode": "async", "buffer": buffer, "deadline_s": 600.0}
        run = three.submit(configuration(tiny_encoder, tiny_texts, name=f"async-{buffer}", server=server))
        summary = three.finish(run)
        assert (summary["status"], summary["failures"], summary["rejected"]) == ("finished", 0, 0)
        assert [len(record.details["accepted"]) for record in StoredRun(run.folder).rounds(after=0)] == [
            buffer
        ] * 3
        same = summary["state_sha256"] == StoredRun(tmp_path / "simulated").summary["state_sha256"]
        assert same == (buffer == 3)


def test_a_secure_sum_of_nodes_that_prove_their_keys_is_the_plain_one(
    three: Federation, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    server, privacy = {"quorum": 3, "deadline_s": 600.0}, {"secure_aggregation": True}
    simulate(configuration(tiny_encoder, tiny_texts, server=server), tmp_path / "simulated")
    secure = configuration(tiny_encoder, tiny_texts, name="secure", server=server, privacy=privacy)
    run = three.submit(secure)
    summary = three.finish(run)
    assert (summary["status"], summary["failures"], summary["rejected"]) == ("finished", 0, 0)
    assert summary["state_sha256"] == StoredRun(tmp_path / "simulated").summary["state_sha256"]
    held = {row.exchange for row in StoredRun(run.folder).nodes()}
    assert held == {"keys", "shares", "fit", "agree", "unmask"}


PRIVATE = {
    "noise-of-clients": {"secure_aggregation": True, "clip": 0.5, "noise_multiplier": 2.0, "delta": 1e-3},
    "noise-on-steps": {"unit": "example", "clip": 0.5, "target_epsilon": 3.0, "delta": 1e-3},
    "clip-that-follows": {"clip": 0.5, "clip_quantile": 0.5, "target_epsilon": 3.0},
}


@pytest.mark.parametrize("name", PRIVATE)
def test_what_a_private_run_spends_is_told(
    three: Federation, tiny_encoder: Path, tiny_texts: Path, name: str
) -> None:
    """Nodes have secrets of their own, so that numbers are no simulation's; what is spent is."""
    privacy: dict[str, Any] = PRIVATE[name]
    config = configuration(
        tiny_encoder, tiny_texts, name=name, server={"quorum": 3, "deadline_s": 600.0}, privacy=privacy
    )
    run = three.submit(with_noise(config))
    summary = three.finish(run)
    assert (summary["status"], summary["failures"], summary["rejected"]) == ("finished", 0, 0)
    spent = summary["privacy"]["epsilon"]
    if "target_epsilon" in privacy:
        assert 2.95 < spent <= 3.0
    else:
        assert spent == epsilon_of({1: config.rounds}, 1.0, 2.0, 1e-3, discrete=True)
    ops = Operations(run.folder.parent)
    view = ops.overview(run.folder.name)
    assert f"epsilon {number(spent, 3)} of privacy" in cost(view).detail
    assert f'fedllm_run_epsilon{{run="{run.folder.name}"}} {spent}' in render(ops).decode()
    secrets = [three.state(node) for node in range(3)]
    if "clip_quantile" not in privacy:
        assert len({path.read_bytes() for one in secrets for path in one.glob("*/noise.key")}) >= 3
