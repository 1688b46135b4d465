"""Codecs in whole runs: what is decided before the first round, and what changes from round to round."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from fedllm.codecs.parse import Token
from fedllm.codecs.stages.low_rank import LowRank
from fedllm.errors import ConfigError
from fedllm.runs.reader import Run
from strategies.registry import resolve_run
from tests.rounds.federation import configuration, run


@pytest.mark.slow
def test_a_pattern_may_fit_one_half_of_alternating_factors(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    """Each round holds A's or B's only, and both patterns fit something of the run."""
    codec = 'per_tensor("*lora_A*"=quantize(bits=8), "*lora_B*"=quantize(bits=4), vectors=none)'
    config = configuration(
        tiny_encoder,
        tiny_texts,
        method="lora",
        rounds=2,
        options={"rule": "alternate"},
        codec={"up": codec, "down": codec},
    )
    assert run(config, tmp_path / "run")["status"] == "finished"


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize(
    "text", ['per_tensor("*no_such*"=sign)', 'error_feedback(per_tensor("*lora*"=sign, "*lora_A*"=none))']
)
def test_a_pattern_that_fits_nothing_ends_a_run_before_its_first_round(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, way: str, text: str
) -> None:
    config = configuration(tiny_encoder, tiny_texts, method="lora", codec={way: text})
    with pytest.raises(ConfigError, match=rf"codec\.{way} = .*no tensor is left that fits"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rising_share_of_energy_rises_on_both_sides_and_both_ways(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T(t) = 0.3 + 0.7 t, t the share of rounds that is done: 0, 1/4, 1/2, 3/4."""
    asked: list[float] = []
    plain = LowRank.share

    def spy(self: LowRank, progress: float) -> float:
        asked.append(progress)
        return plain(self, progress)

    monkeypatch.setattr(LowRank, "share", spy)
    read: list[str] = []
    parser = importlib.import_module("fedllm.codecs.parse")  # the package has a function of this name
    split = parser._tokens

    def tokens(text: str) -> list[Token]:
        read.append(text)
        return list(split(text))

    monkeypatch.setattr(parser, "_tokens", tokens)
    rising = 'low_rank(energy="0.3->1.0")'
    options: dict[str, Any] = {"method": "fedavg", "clients": 2, "rounds": 4, "server": {"sample": 2}}
    for way in ("up", "down"):
        asked.clear()
        read.clear()
        config = configuration(tiny_encoder, tiny_texts, **options, codec={way: rising})
        assert run(config, tmp_path / way)["status"] == "finished"
        assert sorted(read) == sorted([rising, "none"])  # once in a run, for whoever needs it
        assert sorted(set(asked) - {1.0}) == [0.0, 0.25, 0.5, 0.75]  # the rehearsal asks of the end too
        parts = [record.details["codec"][way] for record in Run(tmp_path / way).rounds() if record.round]
        sizes = [sum(part.values()) for part in parts]
        assert sizes[0] < sizes[2] < sizes[3]


def test_feedback_and_clipping_exclude_each_other() -> None:
    given = {"method": "lora", "codec": {"up": "error_feedback(sign)"}, "privacy": {"clip": 1.0}}
    with pytest.raises(ConfigError, match=r"codec\.up = .* privacy\.clip = 1"):
        resolve_run(given)
    assert resolve_run({**given, "codec": {"up": "sign"}}).privacy.clip == 1.0
