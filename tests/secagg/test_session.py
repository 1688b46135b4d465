"""Whole sessions between participants and a coordinator, honest and not."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pytest

from fedllm.errors import RunFailed, WireError
from fedllm.secagg import graph, words
from fedllm.secagg.coordinator import Coordinator
from fedllm.secagg.identity import Unproven
from fedllm.secagg.letters import Entry, Masking, Shares, Unmasking, entries, roster
from fedllm.secagg.participant import Participant
from fedllm.secagg.rules import Rules

RULES = Rules(share=2 / 3, degree=None, least=3)
COUNT, BITS = 40, 19


@dataclass
class Kept:
    """A vault in memory."""

    content: bytes | None = None

    def load(self) -> bytes | None:
        return self.content

    def save(self, content: bytes) -> None:
        self.content = content


def people(clients: int, rules: Rules = RULES) -> dict[int, Participant]:
    return {node: Participant(node, rules, Unproven(), Kept()) for node in range(clients)}


def values_of(node: int) -> np.ndarray:
    return np.random.default_rng(node).integers(-1000, 1000, COUNT)


def shared(
    clients: dict[int, Participant], at_keys: Collection[int] = (), at_shares: Collection[int] = ()
) -> Coordinator:
    """Hold the first two steps; some leave at either."""
    server = Coordinator(next(iter(clients.values())).rules, "run/3/0")
    for node in clients.keys() - set(at_keys):
        server.take_keys(node, clients[node].keys(server.context))
    for node in server.group.members.keys() - set(at_shares):
        server.take_shares(node, clients[node].shares(server.context, server.roster()))
    return server


def masked(
    server: Coordinator, clients: dict[int, Participant], gone: Collection[int] = ()
) -> dict[int, words.Words]:
    found = {}
    for node in server.sharers.keys() - set(gone):
        letter = Masking.read(server.masking(node, 10, 100))
        given = words.words_of(values_of(node), BITS)
        found[node] = clients[node].mask(server.context, letter, given, BITS)
        server.take_masked(node, words.pack(found[node], BITS), COUNT, BITS)
    return found


def summed(server: Coordinator, clients: dict[int, Participant], gone: Collection[int] = ()) -> np.ndarray:
    for node in server.survivors - set(gone):
        letter = Unmasking.read(server.unmasking(node))
        server.take_unmasking(node, clients[node].unmask(server.context, letter))
    return server.total()


@pytest.mark.parametrize("degree", [None, 6])
@pytest.mark.parametrize(
    ("keys", "shares", "fit", "unmask"),
    [
        ((), (), (), ()),
        ((1,), (), (), ()),
        ((), (2,), (), ()),
        ((), (), (0, 3), ()),
        ((), (), (), (9,)),
        ((1,), (2,), (3,), (4,)),
    ],
)
def test_the_sum_is_that_of_all_whose_values_came(
    keys: tuple[int, ...], shares: tuple[int, ...], fit: tuple[int, ...], unmask: tuple[int, ...], degree: int
) -> None:
    clients = people(12, Rules(0.5, degree, 3))
    server = shared(clients, keys, shares)
    masked(server, clients, fit)
    left = set(clients) - {*keys, *shares, *fit}
    assert server.survivors == left
    assert np.array_equal(summed(server, clients, unmask), sum(values_of(node) for node in left))


def test_what_the_server_sees_of_a_client_is_not_its_values() -> None:
    clients = people(4)
    server = shared(clients)
    seen = masked(server, clients)
    for node, drawn in seen.items():
        # Uniform words: each bit is set in about half, where small values have their high bits all alike.
        assert 5 < sum(int(word) >> BITS - 1 for word in drawn) < COUNT - 5
        assert not np.array_equal(words.signed(drawn, BITS), values_of(node))


def test_down_to_the_threshold_and_not_below() -> None:
    for left, enough in ((7, True), (6, False)):  # of ten more than two thirds must stay
        clients = people(10)
        server = shared(clients)
        masked(server, clients, range(10 - left) if enough else ())
        if enough:
            assert np.array_equal(summed(server, clients), sum(values_of(n) for n in range(10 - left, 10)))
        else:
            with pytest.raises(RunFailed, match=r"6 shares .* 7 are needed"):
                summed(server, clients, range(4))


def test_a_client_helps_no_sum_of_fewer_than_the_threshold() -> None:
    clients = people(10)
    server = shared(clients)
    masked(server, clients)
    server.survivors = set(range(6))
    with pytest.raises(WireError, match="6 of 10 clients are left, 7 is the least"):
        clients[0].unmask(server.context, Unmasking.read(server.unmasking(0)))


def test_nobody_reveals_both_shares_of_a_peer() -> None:
    clients = people(10)
    server = shared(clients)
    masked(server, clients)
    first = clients[0].unmask(server.context, Unmasking.read(server.unmasking(0)))
    assert clients[0].unmask(server.context, Unmasking.read(server.unmasking(0))) == first
    server.survivors -= {5}  # whose values came: now the server would have its key as well
    with pytest.raises(WireError, match="another question of step 'unmask'"):
        clients[0].unmask(server.context, Unmasking.read(server.unmasking(0)))


@pytest.mark.parametrize("told_of_it", range(11))
def test_however_the_server_splits_its_clients_it_never_gets_both_secrets_of_one(told_of_it: int) -> None:
    clients = people(10, Rules(0.5, None, 3))
    server = shared(clients)
    masked(server, clients)
    enough = 0
    for survivors, asked in ((range(1, 10), range(10 - told_of_it, 10)), (range(10), range(10 - told_of_it))):
        server.survivors, server._revealed = set(survivors), {}
        for node in asked:
            if node in server.survivors:
                letter = Unmasking.read(server.unmasking(node))
                server.take_unmasking(node, clients[node].unmask(server.context, letter))
        enough += len(server._revealed.get(0, {})) >= server.group.threshold(0)
    assert enough <= 1  # of the shares of client 0's key, and of those of its own mask's seed


def test_nothing_is_left_to_reveal_after_a_session() -> None:
    clients = people(4)
    server = shared(clients)
    masked(server, clients)
    summed(server, clients)
    kept = clients[0]._vault.load().decode()  # type: ignore[union-attr]
    assert all(f'"{name}": ""' in kept for name in ("seal", "mask", "seed", "own_share"))
    with pytest.raises(WireError, match="secrets are gone"):
        clients[0].mask(
            server.context, Masking.read(server.masking(0, 10, 100)), np.zeros(4, np.uint32), BITS
        )


def test_no_second_vector_goes_under_the_same_mask() -> None:
    clients = people(4)
    server = shared(clients)
    letter = Masking.read(server.masking(0, 10, 100))
    given = words.words_of(values_of(0), BITS)
    once = clients[0].mask(server.context, letter, given, BITS)
    assert np.array_equal(clients[0].mask(server.context, letter, given, BITS), once)
    with pytest.raises(WireError, match="another question of step 'mask'"):
        clients[0].mask(server.context, letter, given + np.uint32(1), BITS)
    del server.sharers[3]  # other peers, other masks
    fewer = Masking.read(server.masking(0, 10, 100))
    with pytest.raises(WireError, match="another question of step 'mask'"):
        clients[0].mask(server.context, fewer, given, BITS)


def test_a_new_session_has_new_keys_and_the_old_one_is_over() -> None:
    clients = people(4)
    old = shared(clients)
    masked(old, clients)
    new = shared(clients)
    assert not {entry.mask for entry in old.group.members.values()} & {
        entry.mask for entry in new.group.members.values()
    }
    with pytest.raises(WireError, match="no such session"):
        clients[0].unmask(old.context, Unmasking.read(old.unmasking(0)))
    again = clients[0].keys(old.context)  # asked to take up the old one, it begins anew
    assert again != old.group.members[0].write()


def test_a_round_begun_anew_gives_the_sum_of_the_same_clients_or_none() -> None:
    clients = people(10)
    first = shared(clients)
    masked(first, clients)
    told = summed(first, clients)
    again = shared(clients)  # as after a kill: the same round, and everybody still there
    masked(again, clients)
    assert np.array_equal(summed(again, clients), told)
    fewer = shared(clients)  # its sum and the first would differ by client 9's update
    masked(fewer, clients, [9])
    with pytest.raises(WireError, match="single update could be told"):
        clients[0].unmask(fewer.context, Unmasking.read(fewer.unmasking(0)))


def test_a_round_begun_anew_has_the_same_values() -> None:
    clients = people(4)
    masked(shared(clients), clients)
    again = shared(clients)  # the server would have client 0 count for less: the difference is its update
    letter = Masking.read(again.masking(0, 1, 100))
    with pytest.raises(WireError, match="masks no second ones"):
        clients[0].mask(again.context, letter, words.words_of(values_of(0) // 2, BITS), BITS)
    wider = words.words_of(values_of(0), BITS + 5)
    clients[0].mask(again.context, letter, wider, BITS + 5)  # in whatever ring


def test_a_second_list_of_keys_is_not_shared_with() -> None:
    clients = people(4)
    server = shared(clients)
    members = dict(server.group.members) | {3: Entry(bytes([9]) * 32, bytes([9]) * 32)}
    with pytest.raises(WireError, match="another question of step 'shares'"):
        clients[0].shares(server.context, roster(members))


def test_a_list_without_ones_own_key_is_refused() -> None:
    clients = people(4)
    server = Coordinator(RULES, "run/1/0")
    for node in clients:
        server.take_keys(node, clients[node].keys(server.context))
    members = dict(server.group.members) | {0: server.group.members[1]}
    with pytest.raises(WireError, match="does not hold this client's own"):
        clients[0].shares(server.context, roster(members))


def test_two_clients_are_no_crowd() -> None:
    clients = people(2, Rules(0.5, None, 2))
    server = Coordinator(Rules(0.5, None, 2), "run/1/0")
    listed = {node: Entry.read(clients[node].keys(server.context)) for node in clients}
    with pytest.raises(WireError, match="2 clients are too few"):
        clients[0].shares(server.context, roster(listed))


def test_a_share_that_was_passed_on_altered_or_to_the_wrong_one_counts_for_none() -> None:
    clients = people(10)
    server = shared(clients)
    masked(server, clients)
    letter = Unmasking.read(server.unmasking(0))
    swapped = Unmasking(letter.survivors, [*letter.sealed[1:], letter.sealed[0]])
    revealed = clients[0].unmask(server.context, swapped)
    assert revealed[33:] == b"\xff" * 33 * 9  # its own share is all it has


def test_shares_that_do_not_fit_end_the_round_instead_of_a_wrong_sum() -> None:
    clients = people(4)
    server = shared(clients)
    masked(server, clients)
    one = server.sharers[2]
    server.sharers[2] = Shares(hashlib.sha256(b"other").digest(), one.sealed, one.proof)
    with pytest.raises(RunFailed, match="client 2's mask do not give"):
        summed(server, clients)


@pytest.mark.parametrize("cut", [-1, 1])
def test_letters_of_another_length_are_refused(cut: int) -> None:
    clients = people(4)
    server = shared(clients)
    for read, data in (
        (entries, server.roster()),
        (Masking.read, server.masking(0, 10, 100)),
        (Unmasking.read, server.unmasking(0)),
        (Entry.read, server.group.members[0].write()),
    ):
        with pytest.raises(WireError):
            read(data[:cut] if cut < 0 else data + b"\0")


def test_a_graph_of_neighbours_needs_fewer_shares() -> None:
    rules = Rules(0.5, 6, 3)
    clients = people(20, rules)
    server = shared(clients)
    assert {len(found.sealed) for found in server.sharers.values()} == {6}
    assert {server.group.threshold(node) for node in clients} == {graph.quorum(7, 0.5)} == {4}


def test_a_client_whose_neighbours_have_gone_masks_nothing() -> None:
    clients = people(20, Rules(0.5, 6, 3))
    server = shared(clients)
    for gone in server.group.neighbours(0)[:4]:
        del server.sharers[gone]
    letter = Masking.read(server.masking(0, 10, 100))
    with pytest.raises(WireError, match="3 holders of this client's shares are left, 4 is the least"):
        clients[0].mask(server.context, letter, words.words_of(values_of(0), BITS), BITS)


def told_apart(
    clients: dict[int, Participant], apart: Collection[int]
) -> tuple[Coordinator, dict[int, words.Words]]:
    """Let a server tell some clients another task than the rest, whose values are then nothing."""
    server = shared(clients)
    found = {}
    for node in server.sharers:
        letter = Masking.read(server.masking(node, 10, 100))
        values = values_of(node) if node in apart else 0 * values_of(node)
        told = b"apart" if node in apart else b"task"
        found[node] = clients[node].mask(server.context, letter, words.words_of(values, BITS), BITS, told)
        server.take_masked(node, words.pack(found[node], BITS), COUNT, BITS)
    server.task = b"task"
    return server, found


def test_whoever_was_told_something_else_is_not_seen_in_the_sum() -> None:
    """A server trains one client as said, the others on what gives nothing, and would see its update."""
    clients = people(5)
    server, _ = told_apart(clients, {2})
    seen = summed(server, clients)
    assert not np.array_equal(seen, values_of(2))
    assert sum(abs(value) > 1000 for value in seen) > COUNT // 2  # uniform in 2^19, where updates end at 1000
    clients = people(5)
    server, _ = told_apart(clients, ())
    assert not summed(server, clients).any()


@pytest.mark.parametrize("degree", [2, 4])
def test_a_neighbourhood_of_two_is_no_crowd(degree: int) -> None:
    """Two whose other neighbours are said to be gone are masked against each other alone."""
    clients = people(12, Rules(0.5, degree, 3))
    server = shared(clients)
    circle = {node: server.group.neighbours(node) for node in clients}
    one = 0
    other = circle[one][0]
    masked(server, clients, ({*circle[one], *circle[other]}) - {one, other})
    letter = Unmasking.read(server.unmasking(one))
    with pytest.raises(WireError, match="2 holders of this client's shares are left, 3 is the least"):
        clients[one].unmask(server.context, letter)


def test_one_sum_is_opened_in_a_round_whatever_the_exchange() -> None:
    """The same update, asked for as the round's second exchange, with one client fewer."""
    clients = people(5)
    for index, gone in ((0, ()), (1, (4,))):
        server = Coordinator(RULES, f"run/3/{index}")
        for node in clients:
            server.take_keys(node, clients[node].keys(server.context))
        for node in clients:
            server.take_shares(node, clients[node].shares(server.context, server.roster()))
        masked(server, clients, gone)
        if index == 0:
            summed(server, clients)
        else:
            with pytest.raises(WireError, match="helped to open this round's sum of other clients before"):
                summed(server, clients)
