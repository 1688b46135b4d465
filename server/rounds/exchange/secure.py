"""An exchange as a session of secure aggregation: of the replies the server gets their sum, and no other.

    keys       each client draws keys of its own for this session
    shares     each learns the others' and seals shares of its two secrets for its neighbours
    fit        the method's own exchange; values come masked
    agree      where clients have keys of their own, each that is left signs who is
    unmask     who is left reveals of each client the one share that takes its masks off the sum

Each step asks those who answered the one before. Who is missing at ``keys`` or ``shares`` has no part in the
sum, who is missing at ``fit`` neither; after that some may be missing, down to the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from fedllm.codecs.base import FramedCodec
from fedllm.config import RunConfig
from fedllm.errors import RunFailed, WireError
from fedllm.protocol.wire import SESSION
from fedllm.secagg.coordinator import Coordinator
from fedllm.secagg.ring import Ring
from fedllm.secagg.rules import LEAST, Rules
from fedllm.sums import WeightedSum

if TYPE_CHECKING:
    from server.rounds.exchange.messages import OpenExchange

__all__ = ["Secure"]

_KEYS, _SHARES, _AGREE, _UNMASK = SESSION


class Secure:
    """One session, for one exchange of one attempt at a round.

    Args:
        config: of the run.
        codec: of the uplink.
        place: names run, round and exchange.
        declared: texts that each client has said it has.
        most: texts that one client counts for at most.
        agreed: whether clients sign who is left, with keys of their own.
        task: digests what clients are told to do, given what one and what all count for at most.
    """

    def __init__(
        self,
        config: RunConfig,
        codec: FramedCodec,
        place: str,
        declared: Mapping[int, int],
        most: int,
        *,
        agreed: bool,
        task: Callable[[int, int], bytes],
    ) -> None:
        self._agreed, self._task = agreed, task
        self._config, self._codec, self._most = config, codec, most
        self._declared = declared
        self._rules = Rules.of(config)
        self._session = Coordinator(self._rules, place)
        self._weights: dict[int, int] = {}

    def hold(
        self, kind: str, open_step: Callable[[str, list[int] | None], OpenExchange]
    ) -> OpenExchange | str:
        """Hold one step after the other.

        Args:
            kind: of the method's exchange.
            open_step: holds a step with these clients; None for those that the exchange is for.

        Returns:
            The exchange in which masked values came; or why their sum stays hidden.
        """
        nodes, masked = None, None
        for step in (_KEYS, _SHARES, kind, *([_AGREE] if self._agreed else []), _UNMASK):
            opened = open_step(step, nodes)
            nodes = sorted(opened.accepted)
            if step not in SESSION:
                masked = opened
            if lack := self._lack(step, nodes):
                return lack
        assert masked is not None
        return masked

    def _lack(self, step: str, left: list[int]) -> str:
        """Say how many clients are wanting after a step; empty where none is."""
        needed = max(self._rules.least, LEAST) if step == _KEYS else self._session.group.quorum
        if len(left) >= needed:
            return ""
        return (
            f"{len(left)} clients answered in step {step!r} of secure aggregation, which takes {needed} "
            "(privacy.threshold, server.quorum): the sum stays hidden"
        )

    def letter(self, step: str, node: int) -> bytes:
        """Return what a client is told in a step: the session's nonce, and what the step needs."""
        session, told = self._session, b""
        if step == _SHARES:
            told = session.roster()
        elif step == _AGREE:
            told = session.agreeing()
        elif step == _UNMASK:
            told = session.unmasking(node)
        elif step != _KEYS:
            session.task = self._task(self._most, self._weight)
            told = session.masking(node, self._most, self._weight)
        return bytes.fromhex(session.nonce) + told

    def take(self, step: str, node: int, payload: bytes) -> None:
        """Take in what a client answers to one of the steps around the method's own."""
        session = self._session
        takes = {
            _KEYS: session.take_keys,
            _SHARES: session.take_shares,
            _AGREE: session.take_agreement,
            _UNMASK: session.take_unmasking,
        }
        takes[step](node, payload)

    def take_masked(self, node: int, payload: bytes, count: int, weight: int, task: str) -> None:
        """Take in a client's masked values: ``count`` of them, which count for ``weight`` texts.

        Raises:
            WireError: they are not as many, or answer something else: their masks would never come off.
        """
        if task != self._session.task.hex():
            raise WireError(
                "it was told something else to do than the others (settings, tensors, or texts that count), "
                "or runs another fedllm: its masks would not come off"
            )
        ring = Ring.of(self._config, self._codec, self._weight)
        self._session.take_masked(node, payload, count, ring.bits)
        self._weights[node] = weight

    def add_to(self, total: WeightedSum) -> None:
        """Take the masks off and fold the sum in.

        Raises:
            RunFailed: too few shares came, or they do not fit: nothing was folded.
        """
        ring = Ring.of(self._config, self._codec, self._weight)
        summed = self._session.total()
        weight = sum(self._weights.values())
        if weight > self._weight:
            raise RunFailed(f"clients counted for {weight} texts, and had introduced themselves with less")
        total.add_total(ring.tensors(summed, total.spec), ring.fraction, weight, len(self._weights))

    @cached_property  # asked for only once all have shared who will
    def _weight(self) -> int:
        """Texts that all who have shared count for at most."""
        return sum(min(self._declared[node], self._most) for node in self._session.sharers)
