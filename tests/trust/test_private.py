"""Client-level differential privacy: the noise, who takes part, what is spent, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, StoreError
from fedllm.privacy.accounting import epsilon_of
from fedllm.privacy.noise import gaussian
from fedllm.protocol.wire import Instruction, Reply
from fedllm.runs import checkpoint
from fedllm.runs.folder import PRIVACY
from fedllm.runs.reader import Run
from fedllm.runs.writer import RunStore
from fedllm.tensors import Tensors, TensorSpec
from server.rounds import privacy as rounds_privacy
from server.rounds.privacy import Privacy
from server.rounds.state import ServerState
from simulations.engines.loopback import loopback
from strategies import private
from strategies.private import PrivateSum, reach, with_noise
from strategies.registry import load_method, resolve_run
from tests.rounds.federation import configuration, cut, run
from tests.rounds.scripted import START, Mean, constant, engine_of, grid_of, scripted, send

SPEC = {"a": TensorSpec((4,)), "b": TensorSpec((2, 3))}
NOISED = {"clip": 1.0, "noise_multiplier": 2.0, "delta": 1e-3}


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def playing(
    config: RunConfig, folder: Path, update: float = 1.0, *, silent: int = -1, long: float = 0.0
) -> ServerState:
    """Run a scripted private federation, or go on with it; each client sends a constant update.

    Args:
        config: of the run; ``folder`` is its own.
        update: every value of it; ``long`` is that of client 0 in the last round, if it is another.
        silent: a client that never answers.
    """

    def script(node: int, asked: Instruction) -> Reply | None:
        length = long if asked.round == config.rounds and node == 0 and long else update
        if node == silent:
            return None
        return send(config, node, asked, constant(length), metrics={"update_norm": length, "loss": 1.0})

    saved = checkpoint.latest(folder / "checkpoints") if folder.is_dir() else None
    opened = RunStore.open(folder) if folder.is_dir() else RunStore.create(folder, config)
    with loopback(config.clients, {}), opened as store:
        store.truncate(-1 if saved is None else saved.number)
        start: Tensors | ServerState = START if saved is None else ServerState.load(saved)
        hidden = Privacy(config, folder, begun=saved is not None)
        engine = engine_of(config, store, Mean(config), start, privacy=hidden)
        engine.start(grid_of(config, script))
        store.finish("finished")
        return engine.state


def test_the_noise_is_gaussian() -> None:
    assert scipy.stats.kstest(gaussian(key(1), 200_000).numpy(), "norm").pvalue > 1e-3


def test_the_noise_has_the_variance_of_the_closed_form() -> None:
    """Of many draws: (z C / m)^2 for each value, around the sum over m, and no two values together."""
    drawn = []
    for number in range(3000):
        total = PrivateSum(SPEC, 5)
        total.add({"a": torch.full((4,), 0.1), "b": torch.zeros(2, 3)}, weight=77)
        total.blur(key(number), 2.0 * reach(0.8, SPEC))
        drawn.append(torch.cat([value.flatten() for value in total.mean().values()]))
    values = torch.stack(drawn).double().numpy()
    expected = (2.0 * 0.8 / 5) ** 2
    bound = 5 * math.sqrt(2 / 3000)  # five standard deviations of a sample variance
    np.testing.assert_allclose(values.var(axis=0), expected, rtol=bound)
    np.testing.assert_allclose(values.mean(axis=0), [0.02] * 4 + [0.0] * 6, atol=5 * 0.32 / math.sqrt(3000))
    apart = np.corrcoef(values.T) - np.eye(10)
    assert abs(apart).max() < 5 / math.sqrt(3000)


def test_a_sum_is_not_read_before_it_has_noise() -> None:
    with pytest.raises(RuntimeError, match="before noise"):
        PrivateSum(SPEC, 5).mean()


def test_a_client_moves_the_sum_by_its_clip_and_the_mean_by_a_fixed_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the noise: updates of norm 173 count for 1 each, over four clients, though one is silent."""
    monkeypatch.setattr(private, "gaussian", lambda key, count: torch.zeros(count, dtype=torch.float64))
    config = scripted(rounds=1, server={"deadline_s": 0.3}, privacy=NOISED)
    state = playing(config, tmp_path / "run", 100.0, silent=2)
    moved = torch.cat([value.flatten() for value in state.current.tensors.values()])
    torch.testing.assert_close(moved, torch.full((3,), 3 / math.sqrt(3) / 4))


def test_no_client_is_refused_for_what_others_sent(tmp_path: Path) -> None:
    """An update 10,000 times as long as the usual is clipped: else others would decide whether it counts."""
    config = scripted(rounds=4, server={"norm_ratio": 10.0}, privacy=NOISED)
    playing(config, tmp_path / "run", 0.01, long=100.0)
    assert Run(tmp_path / "run").summary["rejected"] == 0


def test_clients_take_part_by_secret_coins(tmp_path: Path) -> None:
    config = scripted(clients=200, server={"sample": 50}, privacy=NOISED)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one, other = (Privacy(config, tmp_path / name, begun=False) for name in ("one", "other"))
    cohorts = [one.cohort(round, range(200)) for round in range(1, 41)]
    assert abs(np.mean([len(cohort) for cohort in cohorts]) - 50) < 5 * math.sqrt(200 * 0.25 * 0.75 / 40)
    assert len({len(cohort) for cohort in cohorts}) > 5
    assert other.cohort(1, range(200)) != cohorts[0] == one.cohort(1, range(200))
    assert one.cohort(1, range(0, 200, 2)) == [node for node in cohorts[0] if node % 2 == 0]


def test_a_round_without_a_client_is_one_of_noise(tmp_path: Path) -> None:
    config = scripted(clients=400, rounds=3, server={"sample": 1, "quorum": 1}, privacy=NOISED)
    playing(config, tmp_path / "run")
    rounds = Run(tmp_path / "run").rounds()[1:]
    assert len({record.state_sha256 for record in rounds}) == len(rounds) == 3


def test_what_is_spent_is_told_and_clients_tell_nothing(tmp_path: Path) -> None:
    config = scripted(rounds=3, privacy=NOISED)
    playing(config, tmp_path / "run")
    told = Run(tmp_path / "run")
    spent = [epsilon_of({1: rounds}, 1.0, 2.0, 1e-3) for rounds in range(4)]
    assert [record.epsilon for record in told.rounds()] == spent
    assert told.summary["privacy"] == {"epsilon": spent[-1], "delta": 1e-3}
    assert not {"loss", "update_norm"} & told.rounds()[-1].details.keys()
    assert stat.S_IMODE((tmp_path / "run" / PRIVACY).stat().st_mode) == 0o600


def test_the_budget_ends_the_run(tmp_path: Path) -> None:
    noise = {"clip": 1.0, "delta": 1e-3, "target_epsilon": 2.0}
    config = with_noise(scripted(rounds=2, privacy=noise))
    config = config.model_copy(update={"rounds": 5})
    playing(config, tmp_path / "run")
    told = Run(tmp_path / "run")
    assert told.rounds()[-1].round == 2
    assert 1.98 <= told.summary["privacy"]["epsilon"] <= 2.0
    assert told.summary["ended_early"] == (
        "ended after round 2 of 5: another would spend more than privacy.target_epsilon = 2"
    )
    assert "round 3 would bring epsilon to" in told.events()[-2].message


def test_going_back_gives_no_budget_back(tmp_path: Path) -> None:
    """The same replies have the same noise, and cost nothing more; others have other noise, and cost more."""
    config, folder = scripted(rounds=2, privacy=NOISED), tmp_path / "run"
    first = playing(config, folder)
    same, other = tmp_path / "same", tmp_path / "other"
    for copy in (same, other):
        shutil.copytree(folder, copy)
        for place in (copy / "checkpoints").glob("*2*"):
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        assert checkpoint.latest(copy / "checkpoints").number == 1
    again = playing(config, same)
    assert all(
        torch.equal(value, again.current.tensors[name]) for name, value in first.current.tensors.items()
    )
    assert Run(same).summary["privacy"] == Run(folder).summary["privacy"]
    moved = playing(config, other, -1.0)
    apart = [first.current.tensors[name] - moved.current.tensors[name] for name in START]
    assert not torch.allclose(apart[0], apart[0][0].expand(2))  # as it were, had the noise been the same
    spent = epsilon_of({1: 1, 2: 1}, 1.0, 2.0, 1e-3)
    assert Run(other).summary["privacy"]["epsilon"] == spent > Run(folder).summary["privacy"]["epsilon"]


def test_a_run_that_lost_its_record_of_spending_does_not_go_on(tmp_path: Path) -> None:
    config = scripted(rounds=1, privacy=NOISED)
    playing(config, tmp_path / "run")
    (tmp_path / "run" / PRIVACY).unlink()
    with pytest.raises(StoreError, match="nobody knows what the run has spent"):
        Privacy(config, tmp_path / "run", begun=True)


FOLLOWING = {**NOISED, "clip_quantile": 0.5}


@pytest.mark.parametrize(("cohort", "noise"), [(10, 2.0), (1000, 2.0)])
def test_sum_and_count_together_spend_what_is_accounted_for(cohort: int, noise: float) -> None:
    """Two Gaussians at once are one whose deviation^-2 is the sum of theirs; clients move a count by 1/2."""
    privacy = {**FOLLOWING, "noise_multiplier": noise}
    config = RunConfig.validated({"clients": cohort, "privacy": privacy})
    of_sum = private.deviation(config, SPEC, 0.8) / reach(0.8, SPEC)
    count = private.count_noise(config)
    assert count == (50.0 if cohort == 1000 else 2.0)
    assert noise < of_sum < 1.16 * noise
    assert of_sum**-2 + (0.5 / count) ** 2 == pytest.approx(noise**-2, rel=1e-12)


def test_the_clip_follows_the_quantile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise: of updates that are all longer it grows by exp(0.1) a round, and so do steps."""

    def still(key: bytes, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.float64)

    monkeypatch.setattr(private, "gaussian", still)
    monkeypatch.setattr(rounds_privacy, "gaussian", still)
    config = scripted(rounds=3, privacy=FOLLOWING)
    state = playing(config, tmp_path / "run", 100.0)
    clips = [math.exp(0.1 * number) for number in range(3)]
    moved = torch.cat([value.flatten() for value in state.current.tensors.values()])
    torch.testing.assert_close(moved, torch.full((3,), sum(clips) / math.sqrt(3)))
    told = [record.details["clip"] for record in Run(tmp_path / "run").rounds()[1:]]
    assert told == pytest.approx(clips)
    shorter = playing(config, tmp_path / "shorter", 1e-3)
    assert shorter.clip == pytest.approx(math.exp(-0.3))


def test_the_count_of_short_updates_is_noised() -> None:
    config = RunConfig.validated({"clients": 40, "privacy": FOLLOWING})
    at = [private.next_clip(config, 1.0, 30, 36, drawn) for drawn in (0.0, 1.0)]
    assert at[0] == pytest.approx(math.exp(-0.2 * (30 - 18) / 40))
    assert math.log(at[0] / at[1]) == pytest.approx(0.2 * 2.0 / 40)


def test_a_run_whose_clip_follows_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    config, folder = scripted(rounds=3, privacy=FOLLOWING), tmp_path / "run"
    first = playing(config, folder, 0.3)
    for place in (folder / "checkpoints").glob("*3*"):
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    saved = checkpoint.latest(folder / "checkpoints")
    assert saved is not None
    assert saved.number == 2
    again = playing(config, folder, 0.3)
    assert all(torch.equal(one, again.current.tensors[name]) for name, one in first.current.tensors.items())
    assert again.clip == first.clip != 0
    assert len(json.loads((folder / PRIVACY).read_text())["released"]["3"]) == 1


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"privacy": {"clip": 1.0, "clip_quantile": 0.5}}, r"privacy\.clip_quantile is for"),
        ({"privacy": {**NOISED, "clip_rate": 0.1}}, r"privacy\.clip_rate is for"),
        ({"privacy": {**FOLLOWING, "secure_aggregation": True}}, r"clip_quantile counts"),
        ({"privacy": {"noise_multiplier": 1.0}}, r"without privacy\.clip"),
        ({"clients": 1}, "clients = 1"),
        ({"server": {"over_select": 1, "sample": 2}}, "over_select"),
        ({"server": {"robust": "median"}}, 'robust = "median"'),
        ({"server": {"outliers": "reject"}}, "outliers"),
        ({"server": {"mode": "async", "buffer": 2}}, 'mode is "async"'),
        ({"evaluation": {"clients": True}, "data": {"client_test_fraction": 0.2}}, r"evaluation\.clients"),
        ({"training": {"class_weights": "balanced"}}, "by class"),
        ({"method": "fwdllm"}, 'method = "fwdllm"'),
        ({"method": "fwdllm", "fwdllm": {"shared": True, "warm_start": "means"}}, 'method = "fwdllm"'),
        ({"method": "mezo"}, 'method = "mezo"'),
        ({"method": "scaffold"}, 'method = "scaffold"'),
        ({"method": "fednova"}, 'method = "fednova"'),
        ({"method": "lora", "lora": {"rule": "svd"}}, r'lora\.rule = "svd"'),
        ({"method": "lora", "lora": {"rule": "fed-sb"}}, r'lora\.rule = "fed-sb"'),
        ({"codec": {"up": "error_feedback(sign)"}}, r"codec\.up"),
        ({"privacy": {"clip": 1.0, "delta": 0.1}}, r"privacy\.delta is for"),
        ({"privacy": {**NOISED, "target_epsilon": 0.01}}, "in a round, more than"),
    ],
)
def test_what_noise_does_not_cover_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve_run({"privacy": NOISED, "method": "lora", **sections})


def test_a_budget_becomes_noise_before_the_run(tmp_path: Path) -> None:
    config = resolve_run({"clients": 20, "rounds": 4, "privacy": {"clip": 1.0, "target_epsilon": 3.0}})
    noise = config.privacy.noise_multiplier
    assert noise is not None
    assert 2.97 <= epsilon_of({1: 4}, 1.0, noise, 20**-1.1) <= 3.0
    assert f"noise_multiplier = {noise}" in config.to_toml()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [("fwdllm", {"shared": True, "warm_start": "none"}), ("mezo", {"candidates": 16})],
)
def test_sums_of_slopes_along_shared_directions_are_hidden_like_updates(
    method: str, options: dict[str, Any], tiny_encoder: Path, tiny_texts: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Without the noise it is the mean of clipped slopes, in which clients count alike; with it another."""
    options = load_method(method).Options(**options).model_dump(mode="json", exclude_none=True)
    sections: dict[str, Any] = {"rounds": 2, "method": method, "options": options}
    alike = {"max_examples": 1}
    found = []
    for name, privacy in {"plain": {"clip": 0.05}, "noised": {**NOISED, "clip": 0.05}, "still": None}.items():
        if privacy is None:
            monkeypatch.setattr(private, "gaussian", lambda key, count: torch.zeros(count).double())
        given = {"server": alike, "privacy": privacy or {**NOISED, "clip": 0.05}}
        run(configuration(tiny_encoder, tiny_texts, **sections, **given), tmp_path / name)
        saved = checkpoint.latest(tmp_path / name / "checkpoints")
        assert saved is not None
        found.append(torch.cat([one.flatten() for _, one in sorted(saved.groups["tensors"].items())]))
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-6)
    assert float((found[1] - found[0]).abs().max()) > 1e-4


@pytest.mark.slow
def test_a_private_run_that_is_killed_ends_with_the_same_bits(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds_privacy.secrets, "token_bytes", bytes)
    config = configuration(tiny_encoder, tiny_texts, rounds=3, privacy={**NOISED, "target_epsilon": 9.0})
    whole = run(config, tmp_path / "whole")
    cut(config, tmp_path / "run", 2)  # after its sum was released, and before the round was written down
    again = run(config, tmp_path / "run")
    assert again["state_sha256"] == whole["state_sha256"]
    assert again["privacy"] == whole["privacy"]
    with (
        pytest.raises(Exception, match=r"above privacy\.target_epsilon"),
        Run(tmp_path / "run").extended(900) as more,
    ):
        run(more, tmp_path / "run")
    assert Run(tmp_path / "run").goes_on_to is None
