"""Clients with keys sign whose values came, and reveal shares for no set that a threshold has not signed."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest

from fedllm.errors import WireError
from fedllm.secagg.coordinator import Coordinator
from fedllm.secagg.identity import Certified
from fedllm.secagg.letters import Unmasking, survivors
from fedllm.secagg.participant import Participant
from fedllm.secagg.rules import Rules
from server.federation.provision import provision
from tests.secagg.test_session import RULES, Kept, masked, shared, summed, values_of

CLIENTS, THRESHOLD = 6, 5


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return provision(tmp_path_factory.mktemp("federation") / "f", "localhost", CLIENTS)


def certified(bundles: list[Path], rules: Rules = RULES) -> dict[int, Participant]:
    return {
        node: Participant(node, rules, Certified.read(bundle), Kept()) for node, bundle in enumerate(bundles)
    }


def agreed(server: Coordinator, clients: dict[int, Participant], gone: Collection[int] = ()) -> None:
    for node in server.survivors - set(gone):
        server.take_agreement(node, clients[node].agree(server.context, server.agreeing()))


def unmask(server: Coordinator, clients: dict[int, Participant], node: int) -> bytes:
    return clients[node].unmask(server.context, Unmasking.read(server.unmasking(node)))


@pytest.mark.parametrize("degree", [None, 4])
def test_the_sum_opens_once_enough_have_signed(bundles: list[Path], degree: int | None) -> None:
    clients = certified(bundles, Rules(0.5, degree, 3))
    server = shared(clients)
    masked(server, clients, gone=[5])
    agreed(server, clients, gone=[0])
    assert np.array_equal(summed(server, clients, gone=[0]), sum(map(values_of, range(5))))


def test_shares_are_revealed_from_the_threshold_on_and_not_below(bundles: list[Path]) -> None:
    for signed, enough in ((THRESHOLD, True), (THRESHOLD - 1, False)):
        clients = certified(bundles)
        server = shared(clients)
        masked(server, clients)
        agreed(server, clients, gone=range(signed, CLIENTS))
        if enough:
            unmask(server, clients, 0)
        else:
            with pytest.raises(WireError, match=r"4 holders .* have signed .* 5 is the least"):
                unmask(server, clients, 0)


def test_a_server_that_leaves_the_signing_out_opens_nothing(bundles: list[Path]) -> None:
    clients = certified(bundles)
    server = shared(clients)
    masked(server, clients)
    with pytest.raises(WireError, match="has not signed these survivors"):
        unmask(server, clients, 0)


def test_a_client_signs_one_set_and_reveals_for_no_other(bundles: list[Path]) -> None:
    clients = certified(bundles)
    server = shared(clients)
    masked(server, clients)
    agreed(server, clients)
    with pytest.raises(WireError, match="another question of step 'agree'"):
        clients[0].agree(server.context, survivors(range(5)))
    server.survivors = set(range(5))
    with pytest.raises(WireError, match="has not signed these survivors"):
        unmask(server, clients, 0)


def test_of_two_sets_that_the_server_shows_one_at_most_is_opened(bundles: list[Path]) -> None:
    """It tells half that client 5 dropped out, the others that client 4 did, and gets neither sum."""
    clients = certified(bundles)
    server = shared(clients)
    masked(server, clients)
    sets = {0, 1, 2, 3, 4}, {0, 1, 2, 3, 5}
    shown = {node: sets[node % 2] | {node} for node in range(4)} | {4: sets[0], 5: sets[1]}
    for node, told in shown.items():
        server.survivors = set(told)
        server.take_agreement(node, clients[node].agree(server.context, server.agreeing()))
    for node, told in shown.items():
        server.survivors = set(told)
        with pytest.raises(WireError, match="3 holders of this client's shares have signed"):
            unmask(server, clients, node)


@pytest.mark.parametrize("forged", ["garbage", "another node's", "another session's"])
def test_a_signature_that_is_none_counts_for_none_and_is_named(bundles: list[Path], forged: str) -> None:
    clients = certified(bundles)
    old = shared(clients)
    masked(old, clients)
    agreed(old, clients)
    server = shared(clients)
    masked(server, clients)
    agreed(server, clients, gone=[4, 5])
    shown = {"garbage": b"x" * 104, "another node's": server._agreed[3], "another session's": old._agreed[4]}
    with pytest.raises(WireError, match="the signature is another"):
        server.take_agreement(4, shown[forged])
    server._agreed[4] = shown[forged]  # a server that passes it on all the same
    with pytest.raises(WireError, match=r"4 holders .* have signed"):
        unmask(server, clients, 0)


def test_nobody_signs_what_it_would_not_open(bundles: list[Path]) -> None:
    clients = certified(bundles)
    server = shared(clients)
    with pytest.raises(WireError, match="has masked nothing"):
        clients[0].agree(server.context, survivors(range(CLIENTS)))
    masked(server, clients)
    for told, reason in (
        (range(4), "4 of 6 clients are left"),
        (range(1, 6), "leaves out the one"),
        (range(7), "names strangers"),
    ):
        with pytest.raises(WireError, match=reason):
            clients[0].agree(server.context, survivors(told))
