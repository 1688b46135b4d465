"""A server without the authority's key cannot show keys of its own under a node's number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.node import NodeContext
from client.secure import require_masked
from fedllm.certificates import CERTIFICATE
from fedllm.config import RunConfig
from fedllm.errors import ConfigError, WireError
from fedllm.secagg import keys, words
from fedllm.secagg.coordinator import Coordinator
from fedllm.secagg.identity import Certified
from fedllm.secagg.letters import Entry, Masking, Shares
from fedllm.secagg.participant import Participant
from server.federation.provision import provision
from tests.secagg.test_session import BITS, RULES, Kept, shared, values_of


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return provision(tmp_path_factory.mktemp("federation") / "f", "localhost", 4)


def certified(bundles: list[Path]) -> dict[int, Participant]:
    return {
        node: Participant(node, RULES, Certified.read(bundle), Kept()) for node, bundle in enumerate(bundles)
    }


def mask(server: Coordinator, clients: dict[int, Participant]) -> words.Words:
    letter = Masking.read(server.masking(0, 10, 100))
    return clients[0].mask(server.context, letter, words.words_of(values_of(0), BITS), BITS)


def test_proven_keys_are_masked_against(bundles: list[Path]) -> None:
    clients = certified(bundles)
    drawn = mask(shared(clients), clients)
    assert not np.array_equal(drawn, words.words_of(values_of(0), BITS))


def test_keys_that_the_server_put_in_a_node_s_place_are_noticed(bundles: list[Path]) -> None:
    clients = certified(bundles)
    server = Coordinator(RULES, "run/1/0")
    for node in clients:
        server.take_keys(node, clients[node].keys(server.context))
    forged = keys.private_key()
    honest = dict(server._entries)
    server._entries[2] = Entry(keys.public_of(forged), keys.public_of(forged))  # as client 0 is shown them
    server.take_shares(0, clients[0].shares(server.context, server.roster()))
    server._group, shown = None, server.group
    for node in (1, 2, 3):  # who have seen client 2's own
        server._entries = honest
        server._group = None
        server.take_shares(node, clients[node].shares(server.context, server.roster()))
    server._group = shown
    with pytest.raises(WireError, match="not proven to be its own"):
        mask(server, clients)


def test_a_proof_of_an_earlier_session_is_none_of_this_one(bundles: list[Path]) -> None:
    clients = certified(bundles)
    old = shared(clients)
    new = shared(clients)
    one = new.sharers[1]
    new.sharers[1] = Shares(one.commitment, one.sealed, old.sharers[1].proof)
    with pytest.raises(WireError, match="client 1 are not proven"):
        mask(new, clients)


def test_another_node_s_proof_is_none(bundles: list[Path]) -> None:
    clients = certified(bundles)
    server = shared(clients)
    one = server.sharers[1]
    server.sharers[1] = replace(one, proof=server.sharers[2].proof)
    with pytest.raises(WireError, match="somebody else"):
        mask(server, clients)
    server.sharers[1] = replace(one, proof=b"")
    with pytest.raises(WireError, match="does not prove"):
        mask(server, clients)


def test_another_authority_s_certificate_is_none(bundles: list[Path], tmp_path: Path) -> None:
    strangers = provision(tmp_path / "other", "localhost", 2)
    clients = certified(bundles)
    clients[1] = Participant(1, RULES, Certified.read(strangers[1]), Kept())
    server = shared(clients)
    with pytest.raises(WireError, match="client 1 are not proven"):
        mask(server, clients)


def device(**facts: object) -> NodeContext:
    return replace(NodeContext(0, "", "state", "state", keep_replies=True), **facts)  # type: ignore[arg-type]


def test_a_device_takes_no_part_where_it_cannot_prove_its_keys(bundles: list[Path]) -> None:
    secure = RunConfig.validated({"privacy": {"secure_aggregation": True}})
    require_masked(secure, device(bundle=str(bundles[0])))
    with pytest.raises(ConfigError, match="--insecure"):
        require_masked(secure, device())
    (bundles[3] / CERTIFICATE).unlink()
    with pytest.raises(ConfigError, match=r"node\.pem is missing"):
        require_masked(secure, device(bundle=str(bundles[3])))


def test_a_device_may_insist_on_secure_aggregation() -> None:
    require_masked(RunConfig(), device())
    with pytest.raises(ConfigError, match="--secure-only"):
        require_masked(RunConfig(), device(secure_only=True))
