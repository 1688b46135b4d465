"""Secure aggregation on every engine: the bits of the plain run, whichever process a message meets."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations.engines.flower import simulate as on_flower
from simulations.engines.loopback import simulate as in_process
from tests.engines.test_same_numbers import outcome
from tests.rounds.federation import configuration

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_engines_and_workers_give_the_bits_of_the_plain_run(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    plain = configuration(tiny_encoder, tiny_texts, server={"sample": 4})
    secure = configuration(
        tiny_encoder, tiny_texts, server={"sample": 4}, privacy={"secure_aggregation": True}
    )
    in_process(plain, tmp_path / "plain")
    in_process(secure, tmp_path / "alone")
    in_process(secure, tmp_path / "pool", workers=2)
    on_flower(secure, tmp_path / "flower", workers=2)
    alone = outcome(tmp_path / "alone")
    assert alone["status"] == "finished"
    assert alone["state_sha256"] == outcome(tmp_path / "plain")["state_sha256"]
    assert outcome(tmp_path / "pool") == alone
    assert outcome(tmp_path / "flower") == alone
