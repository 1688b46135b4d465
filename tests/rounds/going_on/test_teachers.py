"""FedKD's teachers live on their clients: a run that is killed leaves them where an undisturbed one does."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedllm.tensors import fingerprint
from tests.rounds.federation import configuration, run
from tests.rounds.killed import conducted

FEEDBACK = 'error_feedback(low_rank(energy="0.95->0.98", method=power) | quantize(bits=8) | entropy)'


def _kept(folder: Path) -> dict[str, str]:
    """The hash of every client's newest state (teacher, Wh, moments, residual), as it lies on the disk."""
    newest = {}
    for path in sorted(folder.rglob("local-*-*.safetensors"), key=_exchange):
        state = load_file(path)
        assert any(name.startswith("method/teacher/") for name in state)
        newest[path.parent.parent.name] = fingerprint(state)  # clients/NODE/RUN/local-ROUND-INDEX
    return newest


def _exchange(path: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in path.stem.split("-")[1:])


@pytest.mark.slow
def test_teachers_go_on_after_the_process_is_killed(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    """Killed in round 2 of 3, when one client has answered and the other still holds round 1's state."""
    config = configuration(
        tiny_encoder,
        tiny_texts,
        method="fedkd",
        clients=2,
        rounds=3,
        server={},
        tuning={"peft": "full"},
        codec={"up": FEEDBACK, "down": FEEDBACK},
        options={"layers": (0,)},
    )
    undisturbed = run(config, tmp_path / "undisturbed")

    folder = tmp_path / "killed"
    assert conducted(config, folder, "reply:3") == -signal.SIGKILL
    halfway = _kept(folder)
    assert len(halfway) == 2

    resumed = run(config, folder)
    assert resumed["state_sha256"] == undisturbed["state_sha256"]
    kept = _kept(folder)
    assert kept == _kept(tmp_path / "undisturbed")
    assert all(kept[node] != state for node, state in halfway.items())
