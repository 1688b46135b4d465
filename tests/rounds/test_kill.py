"""``kill -9`` at any moment loses nothing: the resumed run ends with the bits of one never killed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm.config import CodecConfig
from fedllm.runs import Run
from tests.rounds.federation import configuration, run

KILLS = 10
FEEDBACK = CodecConfig(up="error_feedback(quantize(bits=2))", down="error_feedback(quantize(bits=8))")
"""Both sides carry residuals from round to round, so that a lost or doubled one would show."""


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_with_the_same_bits(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config = configuration(tiny_encoder, tiny_texts, codec=FEEDBACK.model_dump(), rounds=24)
    undisturbed = run(config, tmp_path / "undisturbed")

    written = tmp_path / "config.json"
    written.write_text(config.to_json(), encoding="utf-8")
    folder = tmp_path / "killed"
    pick = random.Random(11)
    moments = [f"reply:{pick.randrange(1, 8)}" for _ in range(KILLS // 2)]
    moments += [f"time:{pick.uniform(0.0, 0.4):.3f}" for _ in range(KILLS - len(moments))]
    pick.shuffle(moments)
    for moment in moments:
        killed = subprocess.run(
            [sys.executable, "-m", "tests.rounds.killed", str(written), str(folder), moment], check=False
        )
        assert killed.returncode == -9, f"not killed at {moment}"
    done = Run(folder).rounds()[-1].round
    assert 0 < done < config.rounds

    subprocess.run([sys.executable, "-m", "tests.rounds.killed", str(written), str(folder)], check=True)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["state_sha256"] == undisturbed["state_sha256"]
    assert summary["bytes"]["up"] > 0
    assert [record.round for record in Run(folder).rounds()] == list(range(config.rounds + 1))
