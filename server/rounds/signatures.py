"""Whose reply one is: each is signed by its node, whose certificate came with the node's introduction."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedllm.certificates import key_in, reply_statement, require_signed
from fedllm.errors import WireError
from fedllm.protocol import wire
from fedllm.protocol.wire import Reply

__all__ = ["Signatures"]


class Signatures:
    """Checks the signatures of one run's replies, where nodes have keys.

    Args:
        authority: the certificate of the federation's authority.
        run: identity of the run.
    """

    def __init__(self, authority: x509.Certificate, run: str) -> None:
        self._authority, self._run = authority, run
        self._keys: dict[int, ec.EllipticCurvePublicKey] = {}

    def introduce(self, node: int, reply: Reply) -> None:
        """Take the certificate in which a node introduces itself.

        Raises:
            WireError: it is none of the authority's for this node, or the introduction is not signed by it.
        """
        if not reply.certificate:
            raise WireError("it shows no certificate of its key: upgrade fedllm on the device")
        key = key_in(reply.certificate, self._authority, node)
        self._check(key, node, "describe", reply)
        self._keys[node] = key

    def check(self, node: int, kind: str, reply: Reply) -> None:
        """Raise ``WireError`` unless a node has signed what came as its answer to an exchange."""
        self._check(self._keys[node], node, kind, reply)

    def _check(self, key: ec.EllipticCurvePublicKey, node: int, kind: str, reply: Reply) -> None:
        if not reply.signature:
            raise WireError("it is not signed with the node's key")
        statement = reply_statement(kind, wire.digest(reply, self._run, node))
        try:
            require_signed(key, statement, reply.signature)
        except WireError as error:
            raise WireError(
                f"node {node} has not signed it so: it is another run's, round's or node's, or was altered"
            ) from error
