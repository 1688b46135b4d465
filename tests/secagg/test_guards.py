"""What a client or the server refuses, each by the line that refuses it."""

from __future__ import annotations

import pytest

from client.secure import require_session
from fedllm.errors import RunFailed, WireError
from fedllm.protocol.wire import Instruction
from fedllm.secagg import shamir
from fedllm.secagg.letters import Entry, Unmasking
from tests.secagg.test_session import masked, people, shared, summed


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
