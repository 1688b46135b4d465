"""A server without the authority's key cannot show keys of its own under a node's number."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client import secure
from client.device.bundle import Bundle
from client.device.checks import check_peers
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
from server.federation.provision import add_node, provision
from tests.secagg.test_session import BITS, RULES, Kept, shared, values_of


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return provision(tmp_path_factory.mktemp("federation") / "f", "localhost", 4)


@pytest.fixture
def four(bundles: list[Path]) -> list[Path]:
    """The bundles, of which nobody has read one yet in this process."""
    secure._read_identity.cache_clear()
    return bundles


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


def test_a_device_takes_no_part_where_it_cannot_prove_its_keys(bundles: list[Path], tmp_path: Path) -> None:
    secured = RunConfig.validated({"privacy": {"secure_aggregation": True}})
    require_masked(secured, device(bundle=str(bundles[0])))
    with pytest.raises(ConfigError, match="--insecure"):
        require_masked(secured, device())
    older = shutil.copytree(bundles[3], tmp_path / "older")
    (older / CERTIFICATE).unlink()
    with pytest.raises(ConfigError, match=r"node\.pem is missing"):
        require_masked(secured, device(bundle=str(older)))


def test_a_device_may_insist_on_secure_aggregation() -> None:
    require_masked(RunConfig(), device())
    with pytest.raises(ConfigError, match="--secure-only"):
        require_masked(RunConfig(), device(secure_only=True))


def listed(path: Path, *certificates: Path) -> str:
    path.write_bytes(b"".join((bundle / CERTIFICATE).read_bytes() for bundle in certificates))
    return str(path)


def identity(bundle: Path, peers: str) -> Certified:
    found = secure._identity(device(bundle=str(bundle), peers=peers))
    assert isinstance(found, Certified)
    return found


def test_a_sum_with_somebody_outside_of_its_roster_is_refused(four: list[Path], tmp_path: Path) -> None:
    """Whoever holds the authority's key may certify nodes: it cannot put them beside this one."""
    clients = certified(four)
    for listed_nodes, stranger in (([0, 1, 2, 3], None), ([1, 2], 3)):
        peers = listed(tmp_path / "peers.pem", *(four[node] for node in listed_nodes))
        clients[0] = Participant(0, RULES, identity(four[0], peers), Kept())
        if stranger is None:
            mask(shared(clients), clients)
        else:
            with pytest.raises(WireError, match="its --peers alone, and client 3 is none of them"):
                shared(clients)
    # A list is read each time: whoever is struck off is no peer from then on.
    assert identity(four[0], peers).peers.keys() == {1, 2}  # type: ignore[union-attr]


def test_another_certificate_under_a_peer_s_number_is_noticed(four: list[Path], tmp_path: Path) -> None:
    """As an operator with the authority's key makes one: same number, another key."""
    federation = four[0].parents[1]
    peers = listed(tmp_path / "peers.pem", *four)
    document = (federation / "federation.toml").read_text()
    (federation / "federation.toml").write_text(document.replace("next_node = 4", "next_node = 1"))
    kept = four[1].rename(tmp_path / "kept")
    forged = add_node(federation)
    try:
        assert forged == four[1]
        clients = certified(four)
        mask(shared(clients), clients)  # by the authority's word alone
        clients[0] = Participant(0, RULES, identity(four[0], peers), Kept())
        with pytest.raises(WireError, match="client 1 shows another certificate than the one"):
            mask(shared(clients), clients)
    finally:
        shutil.rmtree(forged)
        kept.rename(four[1])
        (federation / "federation.toml").write_text(document)


def test_a_roster_of_something_else_is_refused(four: list[Path], tmp_path: Path) -> None:
    strangers = provision(tmp_path / "other", "localhost", 2)
    server = tmp_path / "server.pem"
    server.write_bytes((four[0].parents[1] / "server.pem").read_bytes())
    (tmp_path / "text.pem").write_text("node 3")
    for peers, reason in (
        (str(tmp_path / "missing"), "cannot be read: No such file"),
        (listed(tmp_path / "others.pem", *strangers), "certificate is not the authority's"),
        (str(server), "CN=fedllm server is no node"),
        (str(tmp_path / "text.pem"), "no list of certificates"),
    ):
        with pytest.raises(ConfigError, match=reason):
            identity(four[0], peers)
    bundle = Bundle(four[0], "localhost:1", 0)
    few = Path(listed(tmp_path / "few.pem", four[0], four[1]))
    enough = Path(listed(tmp_path / "enough.pem", *four[:3]))
    assert check_peers(bundle, enough) == ("peers", True, "sums with nodes 1, 2 alone")
    assert "names 1 others" in check_peers(bundle, few).sentence
    assert "--insecure" in check_peers(bundle, enough, insecure=True).sentence
    assert not check_peers(bundle, few).good
    assert check_peers(bundle, None).good


def test_a_roster_is_for_secure_sums_alone(four: list[Path], tmp_path: Path) -> None:
    peers = listed(tmp_path / "peers.pem", *four)
    with pytest.raises(ConfigError, match="started with --peers, and the run has no"):
        require_masked(RunConfig(), device(peers=peers))
    secured = RunConfig.validated({"privacy": {"secure_aggregation": True}})
    require_masked(secured, device(peers=peers, bundle=str(four[0])))
