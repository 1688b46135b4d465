"""What the benchmark of secure aggregation says is so."""

from __future__ import annotations

import pytest
import scipy.stats

from fedllm.codecs import parse
from fedllm.config import RunConfig
from fedllm.tensors import TensorSpec
from simulations import planner
from simulations.bench.secagg import compare
from simulations.bench.secagg.odds import exposed, failing
from simulations.bench.secagg.sessions import proof


def test_bytes_are_those_of_the_ring_and_of_shares() -> None:
    found = compare(20, None, "fixed(bits=4, fraction=8)")
    assert found["bits"] == 9  # 20 * 14 + 1 sums
    values, others = 75_653 * 9 / 8, 19
    letters = 64 + 32 + others * 82 + 20 * 33  # keys, commitment, sealed shares, revealed ones
    assert found["secure"]["up"] == pytest.approx(values + letters, rel=0.01)
    assert found["plain"]["up"] == pytest.approx(75_653 / 2, abs=20)


def test_a_plan_counts_what_a_session_takes() -> None:
    privacy = {"secure_aggregation": True}
    config = RunConfig.validated({"clients": 100, "server": {"max_examples": 1}, "privacy": privacy})
    codec = parse("fixed(bits=4, fraction=8)")
    up, more = planner._secure(config, codec, {"update": TensorSpec((75_653,))})
    # `fedllm bench secagg`, whose bytes leave Flower's envelopes out.
    assert up - 4 * planner.HEADERS == pytest.approx(115_970, rel=0.01)
    assert more - 3 * planner.HEADERS == pytest.approx(16_472, rel=0.1)


@pytest.mark.parametrize(("clients", "neighbours", "share"), [(100, 20, 0.5), (300, 40, 0.667)])
def test_odds_are_hypergeometric(clients: int, neighbours: int, share: float) -> None:
    holders = neighbours + 1
    needed = int(share * holders) + 1
    gone = scipy.stats.hypergeom(clients, round(0.3 * clients), holders).sf(holders - needed)
    assert failing(clients, neighbours, 0.3, share) == pytest.approx(min(1.0, clients * gone))
    bad = scipy.stats.hypergeom(clients, round(0.3 * clients), neighbours).sf(needed - 1)
    assert exposed(clients, neighbours, 0.3, share) == pytest.approx(min(1.0, clients * bad))


def test_a_proof_holds_a_signature_and_a_certificate() -> None:
    found = proof(2)
    assert 72 + 300 < found["bytes"] < 800  # an ECDSA signature of P-384 is about 100 bytes in DER
    assert found["check_seconds"] > 0
