"""What a client or the server refuses, each by the line that refuses it."""

from __future__ import annotations

import numpy as np
import pytest

from client.secure import require_session
from fedllm.codecs import parse
from fedllm.config import RunConfig
from fedllm.errors import RunFailed, WireError
from fedllm.protocol.wire import Instruction
from fedllm.secagg import shamir
from fedllm.secagg.identity import Unproven
from fedllm.secagg.letters import NONCE_BYTES, Entry, Masking, Unmasking
from fedllm.secagg.participant import Participant
from fedllm.secagg.ring import Ring
from fedllm.secagg.rules import Rules
from fedllm.secagg.words import pack, words_of
from fedllm.sums import WeightedSum
from fedllm.tensors import TensorSpec
from server.rounds.exchange.secure import Secure
from tests.secagg.test_session import Kept, masked, people, shared, summed


def test_coefficients_of_shares_are_drawn_anew_and_one_by_one() -> None:
    secret = bytes(range(32))
    seen = set()
    for _ in range(4):
        first, second, _ = (int.from_bytes(one) for one in shamir.split(secret, 3, [1, 2, 3]).values())
        # s + a + b and s + 2 a + 4 b: their a and b.
        above = [(value - int.from_bytes(secret)) % shamir.PRIME for value in (first, second)]
        b = (above[1] - 2 * above[0]) * pow(2, -1, shamir.PRIME) % shamir.PRIME
        seen |= {b, (above[0] - b) % shamir.PRIME}
    assert len(seen) == 8
    assert min(seen) > 2**192  # or less, once in 2^61 times


def test_a_client_that_has_masked_nothing_reveals_nothing() -> None:
    clients = people(4)
    server = shared(clients)
    masked(server, clients, gone=[0])
    with pytest.raises(WireError, match="asked for shares, and has masked nothing"):
        clients[0].unmask(server.context, Unmasking.read(server.unmasking(0)))


def test_a_key_put_together_from_shares_must_be_the_one_that_was_shown() -> None:
    clients = people(6)
    server = shared(clients)
    masked(server, clients, gone=[5])
    members = dict(server.group.members)
    object.__setattr__(server.group, "members", members | {5: Entry(members[5].seal, members[4].mask)})
    with pytest.raises(RunFailed, match="client 5's key do not give it"):
        summed(server, clients)


@pytest.mark.parametrize(("kind", "session"), [("fit", b""), ("evaluate", bytes(16)), ("setup", bytes(16))])
def test_nothing_is_answered_outside_of_a_session(kind: str, session: bytes) -> None:
    with pytest.raises(WireError, match=f"asked for '{kind}' outside of a session"):
        require_session(Instruction("run", kind, session=session))
    require_session(Instruction("run", "fit", session=bytes(16)))


@pytest.mark.parametrize(("counted", "refused"), [(10, False), (11, True)])
def test_a_sum_that_counts_for_more_texts_than_were_introduced_is_not_folded(
    counted: int, refused: bool
) -> None:
    """The ring is as wide as what was introduced: a sum of more may have wrapped around in it."""
    privacy = {"secure_aggregation": True, "threshold": 0.5}
    config = RunConfig.validated({"clients": 3, "server": {"quorum": 3}, "privacy": privacy})
    codec = parse("fixed(bits=4, fraction=8)")
    secure = Secure(
        config,
        codec,
        "run/1/0",
        dict.fromkeys(range(3), 10),
        100,
        agreed=False,
        task=lambda most, weight: b"t",
    )
    ring = Ring.of(config, codec, 30)
    clients = {node: Participant(node, Rules.of(config), Unproven(), Kept()) for node in range(3)}
    context = secure._session.context

    def told(step: str, node: int) -> bytes:
        return secure.letter(step, node)[NONCE_BYTES:]

    for node, one in clients.items():
        secure.take("keys", node, one.keys(context))
    for node, one in clients.items():
        secure.take("shares", node, one.shares(context, told("shares", node)))
    for node, one in clients.items():
        given = words_of(np.array([node]), ring.bits)
        drawn = one.mask(context, Masking.read(told("fit", node)), given, ring.bits, b"t")
        secure.take_masked(node, pack(drawn, ring.bits), 1, counted if node == 2 else 10, b"t".hex())
    for node, one in clients.items():
        secure.take("unmask", node, one.unmask(context, Unmasking.read(told("unmask", node))))
    total = WeightedSum({"update": TensorSpec((1,))})
    if refused:
        with pytest.raises(RunFailed, match="counted for 31 texts, and had introduced themselves with less"):
            secure.add_to(total)
    else:
        secure.add_to(total)
    assert total.weight == (0 if refused else 30)
