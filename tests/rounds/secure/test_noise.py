"""Differential privacy under secure aggregation: noise of the clients' own, in integers that are summed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from flwr.app import Message

from client import secret
from client.node import NodeContext
from client.secret import Secret
from fedllm.codecs import parse
from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.privacy.accounting import epsilon_of, least_noise
from fedllm.privacy.noise import discrete_gaussian
from fedllm.protocol import wire
from fedllm.runs import checkpoint
from fedllm.runs.reader import Run
from fedllm.secagg import ring as rings
from fedllm.secagg import words
from fedllm.secagg.ring import Ring
from fedllm.tensors import Tensors
from strategies import private
from strategies.registry import resolve_run
from strategies.session import forget_sessions
from tests.rounds.federation import Killed, run
from tests.rounds.secure.test_resume import LAST, killing
from tests.rounds.secure.test_runs import SECURE, Asking, config_of, losing

NOISED = {"clip": 0.5, "noise_multiplier": 1.5, "delta": 1e-3}
BOTH = {**SECURE, **NOISED}
GRID = "fixed(bits=16, fraction=12)"


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def noised(**privacy: Any) -> RunConfig:
    return RunConfig.validated({"clients": 12, "server": {"quorum": 9}, "privacy": {**BOTH, **privacy}})


@pytest.mark.parametrize("deviation", [0.7, 1.0, 3.3])
def test_integers_have_the_probabilities_of_the_discrete_gaussian(deviation: float) -> None:
    drawn = discrete_gaussian(key(1), 200_000, deviation)
    places = np.arange(-40, 41)
    expected = np.exp(-(places**2) / (2 * deviation**2))
    expected *= drawn.size / expected.sum()
    often = expected > 5
    observed = (drawn[:, None] == places[often]).sum(axis=0)
    assert scipy.stats.chisquare(observed, expected[often], sum_check=False).pvalue > 1e-3


def test_far_from_the_grid_it_is_the_normal_distribution() -> None:
    deviation = 2.0**35 * 1.3
    drawn = discrete_gaussian(key(2), 100_000, deviation)
    assert scipy.stats.kstest(drawn / deviation, "norm").pvalue > 1e-3
    assert scipy.stats.chisquare(np.bincount(drawn & 7)).pvalue > 1e-3  # no pattern in the low bits


@pytest.mark.parametrize("codec", ["none", GRID])
def test_the_fewest_clients_make_the_noise_whole(codec: str) -> None:
    """Of nine shares the sum has the deviation z C, and of twelve there is more; none of it wraps around."""
    ring = Ring.of(noised(), parse(codec), 12)
    shares = [ring.private(np.zeros(20_000, np.int64), lambda _, n=n: key(n)) for n in range(12)]
    units = 1.5 * 0.5 * 2.0**ring.fraction
    bound = 5 * math.sqrt(2 / 20_000)
    assert abs(np.var(np.sum(shares[:9], axis=0)) / units**2 - 1) < bound
    assert abs(np.var(np.sum(shares, axis=0)) / units**2 - 12 / 9) < 12 / 9 * bound
    total = words.words_of(np.sum(shares, axis=0), ring.bits)
    assert (words.signed(total, ring.bits) == np.sum(shares, axis=0)).all()


def test_no_client_moves_the_sum_by_more_than_its_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding a thousand values of 0.5 / sqrt(1000) to the coarse grid up makes them 2 % longer."""
    monkeypatch.setattr(rings, "discrete_gaussian", lambda key, count, noise: np.zeros(count, np.int64))
    ring = Ring.of(noised(noise_multiplier=40.0), parse("fixed(bits=8, fraction=5)"), 12)
    update = {"a": torch.full((1000,), 0.5 / math.sqrt(1000))}
    rounded = ring.integers(update, 1)
    assert np.linalg.norm(rounded) > 16 * 1.02
    assert np.linalg.norm(ring.private(rounded, lambda _: key(0))) <= 16


def test_noise_is_of_a_secret_the_round_and_the_values(tmp_path: Path) -> None:
    place, other = (
        NodeContext(0, "", str(tmp_path / name), str(tmp_path), keep_replies=False) for name in "ab"
    )
    mine, again, theirs = Secret.of(place, "run"), Secret.of(place, "run"), Secret.of(other, "run")
    found = {mine.key("sum", *at) for at in [(1, 0, b"a"), (1, 0, b"b"), (2, 0, b"a"), (1, 1, b"a")]}
    assert len(found | {theirs.key("sum", 1, 0, b"a")}) == 5
    assert mine.key("sum", 1, 0, b"a") == again.key("sum", 1, 0, b"a")
    assert (tmp_path / "a" / "run" / "noise.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("noise", [0.7, 2.0, 10.0])
def test_concentrated_privacy_lies_between_the_exact_gaussian_and_its_closed_form(noise: float) -> None:
    """Bun and Steinke (TCC 2016), proposition 1.3: epsilon <= rho + 2 sqrt(rho log(1 / delta))."""
    found = epsilon_of({1: 5, 2: 1}, 1.0, noise, 1e-4, discrete=True)
    rho = 7 / (2 * noise**2)
    assert epsilon_of({1: 7}, 1.0, noise, 1e-4) < found < rho + 2 * math.sqrt(rho * math.log(1e4))


@pytest.mark.parametrize("target", [0.5, 8.0])
def test_a_budget_becomes_noise_of_the_clients(target: float) -> None:
    noise = least_noise(target, 6, 1.0, 1e-3, discrete=True)
    assert 0.99 * target < epsilon_of({1: 6}, 1.0, noise, 1e-3, discrete=True) <= target


def test_sampling_buys_nothing_where_the_server_knows_who_takes_part() -> None:
    sections = {"clients": 40, "rounds": 6, "server": {"sample": 8}}
    config = resolve_run({**sections, "privacy": {**SECURE, "clip": 1.0, "target_epsilon": 4.0}})
    assert config.privacy.noise_multiplier == least_noise(4.0, 6, 1.0, 40**-1.1, discrete=True)
    assert "the shares of 4 of a round's 8 make it whole" in private.promise(config)


@pytest.mark.parametrize(
    ("codec", "privacy", "said"),
    [
        ("fixed(bits=8, fraction=0)", {}, r"share of the noise would be 1 of them.*larger by 2"),
        ("none", {"noise_multiplier": 1e6, "clip": 1e3}, "bits a value"),
    ],
)
def test_integers_that_are_not_made_for_the_noise_are_refused(
    codec: str, privacy: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve_run(
            {
                "clients": 12,
                "server": {"quorum": 9},
                "codec": {"up": codec},
                "privacy": {**BOTH, "noise_multiplier": 6.0, **privacy},
            }
        )


def tensors_of(folder: Path) -> Tensors:
    saved = checkpoint.latest(folder / "checkpoints")
    assert saved is not None
    return saved.groups["tensors"]


@pytest.mark.parametrize(("codec", "atol"), [("none", 1e-6), (GRID, 2.0**-11)])
def test_without_the_noise_it_is_the_sum_of_clipped_updates_over_all_who_were_asked(
    codec: str, atol: float, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As where the server adds noise, though two of six drop out."""
    monkeypatch.setattr(rings, "discrete_gaussian", lambda key, count, noise: np.zeros(count, np.int64))
    monkeypatch.setattr(private, "gaussian", lambda key, count: torch.zeros(count, dtype=torch.float64))
    found = []
    for name, privacy in {"plain": NOISED, "secure": BOTH}.items():
        config = config_of(
            tiny_encoder, tiny_texts, rounds=1, privacy=privacy,
            codec={"up": codec if name == "secure" else "none"},
        )  # fmt: skip
        run(config, tmp_path / name, losing((0, 4), "fit"), Asking)
        found.append(tensors_of(tmp_path / name))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=atol)


@pytest.mark.slow
def test_the_same_bits_after_a_kill_and_nothing_spent_twice(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server dies when it has three of six masked updates: client 0 masks the same noise anew."""
    monkeypatch.setattr(secret, "token_bytes", bytes)
    config = config_of(tiny_encoder, tiny_texts, privacy=BOTH)
    whole = run(config, tmp_path / "whole", grid_of=Asking)
    seen: list[bytes] = []
    with pytest.raises(Killed):
        run(config, tmp_path / "run", killing("fit", seen), Asking)
    forget_sessions()
    again = run(config, tmp_path / "run", killing("", seen), Asking)
    assert again["state_sha256"] == whole["state_sha256"]
    assert len(set(seen)) == 2
    assert again["privacy"] == whole["privacy"]
    spent = epsilon_of({1: LAST}, 1.0, 1.5, 1e-3, discrete=True)
    assert Run(tmp_path / "run").summary["privacy"] == {"epsilon": spent, "delta": 1e-3}


@pytest.mark.slow
def test_a_client_whose_noise_would_be_another_masks_nothing_more_in_a_round(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    """Two sums of one round with other noise would tell more than is accounted for."""
    config = config_of(tiny_encoder, tiny_texts, server={"quorum": 6, "retries": 0}, privacy=BOTH)
    folder, refused = tmp_path / "run", []
    with pytest.raises(Killed):
        run(config, folder, killing("unmask", []), Asking)
    forget_sessions()
    for path in folder.glob("clients/0/*/noise.key"):
        path.unlink()

    def note(reply: Message) -> Message:
        refused.append(wire.failure_of(reply.content))
        return reply

    with pytest.raises(Exception, match="5 clients answered in step 'fit'"):
        run(config, folder, note, Asking)
    assert sum("has masked other values in this round before" in one for one in refused) == 1
