"""Rule fedsa: A is shared and B stays, against the algorithm written out with torch."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, StoreError
from fedllm.models.evaluation import evaluate
from fedllm.models.training import minibatches
from fedllm.randomness import stream
from fedllm.runs import checkpoint
from fedllm.runs.reader import Run
from fedllm.tensors import Tensors
from simulations.engines.loopback import simulate
from simulations.results.predict import export, predict
from strategies.lora.method import Lora
from strategies.session import Session
from tests.rounds.federation import DeviceGrid, configuration, run
from tests.rounds.killed import conducted

RATE = 2.0
SGD = {"optimizer": "sgd", "local_steps": 3, "batch_size": 8, "learning_rate": RATE}


@pytest.fixture(scope="module")
def of(tiny_encoder: Path, tiny_texts: Path) -> Any:
    def make(**sections: Any) -> RunConfig:
        data = {"path": str(tiny_texts), "max_length": 16, "client_test_fraction": 0.25}
        mine = {
            "options": {"rule": "fedsa"},
            "data": data | {"partition": "dirichlet", "alpha": 1.0},
            "evaluation": {"every": 0, "clients": True},
            "rounds": 2,
            "clients": 4,
            "server": {"sample": 3},
        }
        return configuration(tiny_encoder, tiny_texts, **(mine | sections))

    return make


@pytest.fixture(scope="module")
def finished(of: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; leave it as it is."""
    folder = tmp_path_factory.mktemp("fedsa") / "run"
    run(of(), folder)
    return folder


def tensors(folder: Path, round: int) -> Tensors:
    return checkpoint.load(folder / "checkpoints", round).groups["tensors"]


def test_two_rounds_are_the_algorithm_written_out(of: Any, tmp_path: Path) -> None:
    """Plain SGD of A, B and head; A and head are averaged by texts, B goes on where its client left it."""
    config = of(training=SGD, server={})
    run(config, tmp_path)
    session = Session(config)
    shared, parameters = dict(session.initial), session.model.trainable()
    own: dict[int, Tensors] = {
        node: {name: torch.zeros(p.shape) for name, p in parameters.items() if "lora_B" in name}
        for node in range(4)
    }
    assert own[0].keys() == parameters.keys() - shared.keys()
    texts = {node: session.client_tokens(node) for node in range(4)}
    total = sum(len(train) for train, _ in texts.values())
    for round in (1, 2):
        mean = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in shared.items()}
        for node, (train, _) in texts.items():
            session.model.write(shared | own[node])
            for batch in minibatches(train, 8, 3, stream(config.seed, "batches", round, node)):
                gradients = torch.autograd.grad(session.model.loss(batch), list(parameters.values()))
                with torch.no_grad():
                    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                        parameter.sub_(gradient, alpha=RATE)
            after = session.model.read()
            own[node] = {name: after[name] for name in own[node]}
            mean = {name: value + after[name].double() * len(train) / total for name, value in mean.items()}
        shared = {name: value.float() for name, value in mean.items()}
        told = {
            row.node: row for row in Run(tmp_path).nodes() if (row.round, row.exchange) == (round, "evaluate")
        }
        for node, (_, test) in texts.items():
            session.model.write(shared | own[node])
            wanted = evaluate(session.model, test, 64)["loss"]
            assert told[node].loss == pytest.approx(wanted, rel=1e-4)
    found = tensors(tmp_path, 2)
    assert found.keys() == shared.keys()
    for name, value in shared.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    assert all(not torch.equal(own[0][name], own[1][name]) and own[0][name].any() for name in own[0])


@pytest.mark.slow
def test_nothing_tells_of_a_model_for_all(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert {value for value in summary["metrics"].values()} == {None}
    assert summary["best"]["round"] is None
    assert [record.metrics for record in Run(finished).rounds()] == [{}, {}, {}]
    assert Run(finished).rounds()[-1].details["clients"]["accuracy"] > 0
    assert not (finished / "adapter-best").exists()
    card = (finished / "adapter" / "README.md").read_text()
    assert "half of a model" in card
    assert "Not evaluated." in card
    with pytest.raises(StoreError, match="keeps a B of its own"):
        predict(finished, ["the old apple"])


def test_adapter_holds_the_shared_factor_and_a_zero(finished: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    place = export(finished, tmp_path)
    saved = load_file(place / "adapter_model.safetensors")
    shared = tensors(finished, 2)
    for name, value in saved.items():
        if "lora_B" in name:
            assert not value.any()
        else:
            assert torch.equal(value, shared["backbone." + name.replace("lora_A", "lora_A.default")])
    assert "half of a model" in (place / "README.md").read_text()


@pytest.mark.slow
def test_clients_keep_their_factor_over_restarts(of: Any, finished: Path, tmp_path: Path) -> None:
    """Stopped and gone on with, on devices that share nothing, it is the same run."""
    run(of(rounds=1), tmp_path / "run", grid_of=DeviceGrid)
    with Run(tmp_path / "run").extended(2) as config:
        again = run(config, tmp_path / "run", grid_of=DeviceGrid)
    assert again["state_sha256"] == Run(finished).summary["state_sha256"]
    told = [[(row.node, row.loss) for row in Run(folder).nodes()] for folder in (tmp_path / "run", finished)]
    assert sorted(told[0], key=str) == sorted(told[1], key=str)


@pytest.mark.slow
def test_more_workers_and_a_kill_change_no_bit(of: Any, finished: Path, tmp_path: Path) -> None:
    wanted = Run(finished).summary["state_sha256"]
    simulate(of(), tmp_path / "pool", workers=2)
    assert Run(tmp_path / "pool").summary["state_sha256"] == wanted
    assert conducted(of(), tmp_path / "killed", "reply:8") == -signal.SIGKILL
    assert run(of(), tmp_path / "killed")["state_sha256"] == wanted


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a score of half a model": ({"evaluation": {"every": 1, "clients": True}}, "evaluation.every = 0"),
    "no score": ({"evaluation": {"every": 0}}, "evaluation.clients = true"),
    "one step": ({"training": {"local_steps": 1}}, "local_steps must be at least 2"),
    "B of its own": ({"tuning": {"options": {"init_lora_weights": "pissa"}}}, "leave out init_lora_weights"),
    "mixed ranks": ({"options": {"rule": "fedsa", "ranks": [4] * 4}}, "one rank for all"),
}


@pytest.mark.parametrize(("given", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant_is_refused(of: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Lora(of(**given))
