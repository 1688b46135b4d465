"""``kill -9`` at any moment loses nothing: the resumed run ends with the bits of one never killed."""

from __future__ import annotations

import json
import random
import signal
import statistics
from pathlib import Path
from unittest import mock

import pytest

from client.node import CONFIG_KEY, FOLDER_KEY
from fedllm.config import CodecConfig
from fedllm.runs import checkpoint
from fedllm.runs.amending import unsettled
from fedllm.runs.provenance.verify import verify
from fedllm.runs.reader import Run
from server.rounds.conduct import Transport, conduct
from simulations.engines.loopback import LoopbackGrid, loopback
from tests.rounds.federation import configuration, run
from tests.rounds.killed import conducted

KILLS = 10
FEEDBACK = CodecConfig(up="error_feedback(quantize(bits=2))", down="error_feedback(quantize(bits=8))")
"""Both sides carry residuals from round to round, so that a lost or doubled one would show."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_ten_times_ends_with_the_same_bits(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config = configuration(tiny_encoder, tiny_texts, codec=FEEDBACK.model_dump(), rounds=40)
    undisturbed = run(config, tmp_path / "undisturbed")
    seconds = [record.seconds for record in Run(tmp_path / "undisturbed").rounds()]
    a_round = statistics.median(seconds)

    folder = tmp_path / "killed"
    pick = random.Random(11)
    moments = [f"reply:{pick.randrange(1, 8)}" for _ in range(KILLS // 2)]
    # By the clock: anywhere in the three rounds that a process has, as long as they take it.
    moments += [f"time:{pick.uniform(0.0, 3.0) * a_round:.4f}" for _ in range(KILLS - len(moments))]
    pick.shuffle(moments)
    for moment in moments:
        assert conducted(config, folder, moment) == -signal.SIGKILL, f"not killed at {moment}"
    done = Run(folder).rounds()[-1].round
    assert 0 < done < config.rounds

    assert conducted(config, folder) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["state_sha256"] == undisturbed["state_sha256"]
    assert summary["bytes"]["up"] > 0
    assert summary["best"] == undisturbed["best"]
    weights = Path("adapter-best", "adapter_model.safetensors")
    assert (folder / weights).read_bytes() == (tmp_path / "undisturbed" / weights).read_bytes()
    held = (tmp_path / "undisturbed" / "checkpoints", folder / "checkpoints")
    assert checkpoint.numbers(held[0]) == checkpoint.numbers(held[1])
    assert [record.round for record in Run(folder).rounds()] == list(range(config.rounds + 1))
    assert verify(folder).rounds == verify(tmp_path / "undisturbed").rounds


def test_a_deployed_run_that_is_interrupted_leaves_the_word_to_its_server(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    """It was not stopped: it went down with its SuperLink, and goes on with the next one."""
    config = configuration(tiny_encoder, tiny_texts)
    run_config = {CONFIG_KEY: config.to_json(), FOLDER_KEY: str(tmp_path / "run")}
    transport = Transport(lambda: (None, None), None, lambda most: None)
    with loopback(config.clients, run_config):
        grid = LoopbackGrid(config.clients, run_config, None)
        grid.push_messages = mock.Mock(side_effect=KeyboardInterrupt)  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            conduct(grid, config, tmp_path / "run", transport=transport)
    assert unsettled(tmp_path / "run")
