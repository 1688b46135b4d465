"""Robust averages against scipy, numpy and a Krum by brute force; and what the server makes of outliers."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from fedllm.config import ServerConfig
from fedllm.errors import ConfigError, RejectedReply
from fedllm.protocol.wire import Instruction, Reply
from fedllm.runs import checkpoint
from fedllm.runs.reader import Run
from fedllm.tensors import Tensors, fingerprint, norm_of, spec_of
from server.rounds.gates import Usual
from server.rounds.state import ServerState
from strategies import robust
from strategies.base import State
from strategies.registry import open_method, resolve_run
from tests.rounds.scripted import constant, play, scripted, send

COUNT = 11


def updates(count: int = COUNT) -> list[Tensors]:
    generator = torch.Generator().manual_seed(3)
    drawn = [
        {name: torch.randn(shape, generator=generator) for name, shape in {"a": (3, 4), "b": (5,)}.items()}
        for _ in range(count)
    ]
    drawn[1] = {name: 50 * value for name, value in drawn[1].items()}
    drawn[4] = {name: value.clone() for name, value in drawn[3].items()}
    return drawn


def averaged(config: ServerConfig, given: list[Tensors]) -> Tensors:
    total = robust.average(config, spec_of(given[0]))
    for number, update in enumerate(given):
        total.add(update, 1 + number % 3)
    return total.mean()


@pytest.mark.parametrize("share", [0.1, 0.2, 0.45])
def test_the_trimmed_mean_is_scipys(share: float) -> None:
    given = updates()
    found = averaged(ServerConfig(robust="trimmed_mean", byzantine=share), given)
    for name, value in found.items():
        stacked = np.stack([update[name].double().numpy() for update in given])
        np.testing.assert_allclose(value, scipy.stats.trim_mean(stacked, share, axis=0), rtol=1e-6)
        assert value.dtype is torch.float32


@pytest.mark.parametrize("count", [10, 11])
def test_the_median_is_numpys(count: int) -> None:
    given = updates(count)
    for name, value in averaged(ServerConfig(robust="median"), given).items():
        np.testing.assert_allclose(
            value, np.median(np.stack([one[name] for one in given]), axis=0), rtol=1e-6
        )


def krum(given: list[Tensors], bad: int) -> list[int]:
    """Blanchard et al., section 3: for each the least sum over any n - f - 2 of the others; n - f win."""
    flat = [np.concatenate([one[name].double().numpy().ravel() for name in sorted(one)]) for one in given]
    scores = []
    for mine, point in enumerate(flat):
        others = [float(((point - other) ** 2).sum()) for k, other in enumerate(flat) if k != mine]
        scores.append(min(map(sum, itertools.combinations(others, len(flat) - bad - 2))))
    return sorted(range(len(flat)), key=lambda k: scores[k])[: len(flat) - bad]


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_multi_krum_is_the_one_by_brute_force(share: float) -> None:
    given = updates()
    chosen = krum(given, int(share * COUNT))
    assert 1 not in chosen
    found = averaged(ServerConfig(robust="multi_krum", byzantine=share), given)
    for name, value in found.items():
        expected = np.mean([given[k][name].double().numpy() for k in chosen], axis=0)
        np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("given_norm", [2.5, None], ids=["a length given", "the median length"])
def test_no_update_counts_for_more_than_the_length_it_is_scaled_to(given_norm: float | None) -> None:
    given = updates()
    found = averaged(ServerConfig(robust="norm_bound", robust_norm=given_norm), given)
    norms = [norm_of(one) for one in given]
    most = given_norm or sorted(norms)[COUNT // 2]
    weights = [1 + number % 3 for number in range(COUNT)]
    for name, value in found.items():
        scaled = [
            weight * one[name].double() * min(1.0, most / norm)
            for one, norm, weight in zip(given, norms, weights, strict=True)
        ]
        torch.testing.assert_close(
            value.double(), torch.stack(scaled).sum(0) / sum(weights), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("rule", ["trimmed_mean", "median", "multi_krum", "norm_bound"])
def test_the_order_of_replies_decides_nothing(rule: str) -> None:
    config = ServerConfig.model_validate({"robust": rule})
    given = [(update, 1 + number % 3) for number, update in enumerate(updates())]
    found = set()
    for seed in range(5):
        total = robust.average(config, spec_of(given[0][0]))
        for update, weight in random.Random(seed).sample(given, len(given)):
            total.add(update, weight)
        found.add(fingerprint(total.mean()))
    assert len(found) == 1


def test_what_a_sum_would_refuse_is_refused_and_not_kept() -> None:
    total = robust.average(ServerConfig(robust="median"), spec_of(constant(1.0)))
    for update in (constant(1e30), constant(float("nan"))):
        with pytest.raises(RejectedReply, match="too large"):
            total.add(update, 10)
    assert total.count == 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"server.robust": "trimmed_mean"}, "server.byzantine = 0.2 of the 2 replies"),
        ({"server.robust": "multi_krum", "server.byzantine": 0.49}, "have 5, 2 of them bad"),
        ({"server.robust": "median", "server.byzantine": 0.3}, "server.byzantine is for"),
        ({"server.robust": "median", "server.robust_norm": 1.0}, "server.robust_norm is for"),
        ({"server.robust": "median", "server.mode": "async"}, "compares updates that began from the same"),
        ({"server.robust": "median", "lora.rule": "svd"}, 'lora.rule = "svd" takes none'),
        ({"server.robust": "median", "lora.rule": "fed-sb"}, 'lora.rule = "fed-sb" takes none'),
        ({"server.robust": "median", "method": "fwdllm"}, 'method = "fwdllm" takes none'),
        ({"server.robust": "median", "method": "scaffold", "training.optimizer": "sgd"}, "takes none"),
    ],
)
def test_what_a_robust_average_cannot_do_is_refused_before_the_run(
    settings: dict[str, object], sentence: str
) -> None:
    clients = 4 if settings["server.robust"] == "trimmed_mean" else 10
    given = [(tuple(key.split(".")), value) for key, value in settings.items()]
    with pytest.raises(ConfigError, match=sentence):
        resolve_run({"clients": clients}, given)


@pytest.mark.parametrize("rule", ["fedit", "ffa", "alternate", "fedsa"])
def test_lora_rules_that_average_take_the_robust_average(rule: str) -> None:
    document: dict[str, Any] = {"lora": {"rule": rule}, "server": {"robust": "median"}}
    if rule == "fedsa":
        document |= {"evaluation": {"every": 0, "clients": True}, "data": {"client_test_fraction": 0.2}}
    method = open_method(resolve_run(document))
    state = State(
        0, {"x.lora_A.default.weight": torch.zeros(2, 3), "x.lora_B.default.weight": torch.zeros(3, 2)}
    )
    assert isinstance(method.begin(state, 1).sum, robust.Kept)


def test_a_run_by_the_median_ignores_a_liar_within_its_bounds(tmp_path: Path) -> None:
    def script(node: int, asked: Instruction) -> Reply:
        return send(config, node, asked, constant(-100.0 if node == 2 else 1.0 + node / 10))

    config = scripted(server={"robust": "median"})
    left = play(config, tmp_path / "run", script).state.current.tensors
    for value in left.values():
        torch.testing.assert_close(value, torch.full_like(value, 2 * 1.05))


@pytest.mark.parametrize("outliers", ["name", "reject"])
def test_an_update_far_longer_than_the_cohorts_is_named_and_rejected_if_asked(
    tmp_path: Path, outliers: str
) -> None:
    def script(node: int, asked: Instruction) -> Reply:
        far = node == 2 and asked.round == 6
        return send(config, node, asked, constant(9.0 if far else 1.0 + node / 10))

    config = scripted(rounds=6, server={"outliers": outliers})
    play(config, tmp_path / "run", script)
    run = Run(tmp_path / "run")
    (event,) = [event for event in run.events() if event.kind == "outlier"]
    assert (event.round, event.fields["node"], event.message.startswith("client 2's")) == (6, 2, True)
    status = {row.node: row.status for row in run.nodes(round=6)}[2]
    assert (status, "rejected" in event.message) == (
        ("rejected", True) if outliers == "reject" else ("accepted", False)
    )


def test_a_few_updates_say_nothing_of_what_is_far() -> None:
    assert Usual(recent=[[1.0] * 15]).far(6.0) is None
    assert Usual(recent=[[1.0] * 16]).far(6.0) == 2.0


def test_a_run_that_goes_on_knows_the_norms_of_recent_rounds(tmp_path: Path) -> None:
    config = scripted()
    engine = play(
        config, tmp_path / "run", lambda node, asked: send(config, node, asked, constant(1.0 + node))
    )
    saved = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert ServerState.load(saved).usual == engine.state.usual
    assert len(engine.state.usual.recent) == 2
