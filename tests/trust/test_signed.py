"""Replies that nodes sign: no other counts, and who gave each that did can be shown to anybody."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedllm.certificates import Holder, reply_statement
from fedllm.errors import StoreError
from fedllm.protocol import wire
from fedllm.protocol.wire import Instruction, Reply
from fedllm.runs.amending import forget
from fedllm.runs.provenance.verify import Broken, sentences, verify
from fedllm.runs.reader import Run
from fedllm.runs.writer import RunStore
from server.federation.provision import authority, provision, signer
from server.rounds.signatures import Signatures
from simulations.engines.loopback import loopback
from tests.rounds.scripted import ScriptedGrid, constant, engine_of, grid_of, scripted, send

BAD = 2
RUN = "scripted"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation") / "f"
    provision(folder, "localhost", 4)
    return folder


def holder(federation: Path, node: int) -> Holder:
    return Holder.read(federation / "bundles" / f"node-{node}")


def signed(by: Holder, reply: Reply, node: int, kind: str, run: str = RUN) -> Reply:
    statement = reply_statement(kind, wire.digest(reply, run, node))
    return replace(reply, signature=by.sign(statement), certificate=by.shown if kind == "describe" else b"")


Bend = Callable[[Reply, Reply, Callable[[Reply], Reply]], Reply]
"""Takes client 2's honest reply, client 1's of the round before, and what signs with client 2's key."""


def conduct(
    federation: Path,
    folder: Path,
    bend: Bend = lambda honest, before, sign: honest,
    introduce: Callable[[Reply], Reply] = lambda told: told,
) -> RunStore:
    """Run two rounds of four nodes with keys, of whom client 2 may send something else in the second."""
    # Whoever is not admitted is waited for until the deadline.
    config, earlier = scripted(rounds=2, server={"deadline_s": 0.5}), dict[int, Reply]()
    holders = {node: holder(federation, node) for node in range(4)}

    class Certified(ScriptedGrid):
        def introduction(self, node: int, told: Reply) -> Reply:
            shown = signed(holders[node], told, node, "describe")
            return introduce(shown) if node == BAD else shown

    def script(node: int, asked: Instruction) -> Reply:
        def sign(reply: Reply) -> Reply:
            return signed(holders[node], reply, node, asked.kind)

        reply = sign(send(config, node, asked, constant(1.0 + node), metrics={"loss": 0.5}))
        if node == BAD and asked.round == 2:
            return bend(reply, earlier[1], sign)
        if asked.round == 1:
            earlier[node] = reply
        return reply

    with loopback(config.clients, {}), RunStore.create(folder, config) as store:
        store.sign(RUN, signer(federation))
        engine = engine_of(
            config, store, signatures=Signatures(authority(federation), RUN),
            proven=lambda: {100 + node: node for node in range(4)},
        )  # fmt: skip
        engine.start(grid_of(config, script, kind=Certified))
    return store


def test_what_nodes_have_signed_counts_and_can_be_shown(federation: Path, tmp_path: Path) -> None:
    conduct(federation, tmp_path / "run")
    assert {row.status for row in Run(tmp_path / "run").nodes()} == {"accepted"}
    found = verify(tmp_path / "run", federation / "ca.pem")
    assert (found.authority, found.certified, found.nameless) == (True, [0, 1, 2, 3], 0)
    assert any("signed by their own nodes" in line for line in sentences(found))


@pytest.mark.parametrize(
    ("bend", "reason"),
    [
        (lambda honest, before, sign: replace(honest, signature=b""), "not signed"),
        (lambda honest, before, sign: replace(honest, examples=honest.examples + 1), "2 has not signed"),
        (lambda honest, before, sign: replace(honest, metrics={"loss": 0.4}), "2 has not signed"),
        (lambda honest, before, sign: replace(honest, payload=honest.payload + b"x"), "2 has not signed"),
        (lambda honest, before, sign: before, "2 has not signed"),
        (
            lambda honest, before, sign: replace(before, signature=sign(before).signature),
            r"answers exchange \(1, 0\)",
        ),
        (lambda honest, before, sign: replace(honest, signature=b"x" * 104), "2 has not signed"),
    ],
    ids=["none", "texts", "metrics", "payload", "another node's", "an old one", "no signature"],
)
def test_what_its_node_has_not_signed_does_not_count(
    bend: Bend, reason: str, federation: Path, tmp_path: Path
) -> None:
    conduct(federation, tmp_path / "run", bend)
    (row,) = [row for row in Run(tmp_path / "run").nodes(node=BAD) if row.round == 2]
    assert row.status == "rejected"
    assert re.search(reason, row.reason or "")
    assert Run(tmp_path / "run").rounds()[-1].details["accepted"] == [0, 1, 3]
    assert verify(tmp_path / "run", federation / "ca.pem").certified == [0, 1, 2, 3]


@pytest.mark.parametrize(("run", "kind"), [("another", "fit"), (RUN, "evaluate")])
def test_a_signature_is_of_one_run_and_one_kind_of_exchange(
    run: str, kind: str, federation: Path, tmp_path: Path
) -> None:
    def bend(honest: Reply, before: Reply, sign: Callable[[Reply], Reply]) -> Reply:
        return replace(signed(holder(federation, BAD), honest, BAD, kind, run), certificate=b"")

    conduct(federation, tmp_path / "run", bend)
    (row,) = [row for row in Run(tmp_path / "run").nodes(node=BAD) if row.round == 2]
    assert (row.status, "node 2 has not signed it so" in str(row.reason)) == ("rejected", True)


@pytest.mark.slow
def test_a_node_is_admitted_by_its_own_certificate_alone(federation: Path, tmp_path: Path) -> None:
    others, strangers = holder(federation, 1).shown, tmp_path / "strangers"
    provision(strangers, "localhost", 3)
    foreign = holder(strangers, BAD)
    cases: dict[str, tuple[Callable[[Reply], Reply], str]] = {
        "none": (lambda told: replace(told, certificate=b""), "shows no certificate"),
        "another node's": (lambda told: replace(told, certificate=others), "of somebody else"),
        "of another authority": (
            lambda told: signed(foreign, told, BAD, "describe"),
            "certificate is not the authority's",
        ),
        "garbage": (lambda told: replace(told, certificate=b"x"), "certificate is not the authority's"),
        "more texts than it signed": (
            lambda told: replace(told, examples=told.examples + 1),
            "has not signed it so",
        ),
    }
    for name, (introduce, reason) in cases.items():
        conduct(federation, tmp_path / name, introduce=introduce)
        run = Run(tmp_path / name)
        assert {row.node for row in run.nodes()} == {0, 1, 3}
        (event,) = [event for event in run.events() if event.kind == "refused"]
        assert reason in event.message


def change(statement: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        with sqlite3.connect(folder / "run.db") as connection:
            assert connection.execute(statement).rowcount

    return act


def swap(folder: Path) -> None:
    """Give each reply of client 1 the signature of its other one."""
    with sqlite3.connect(folder / "run.db") as connection:
        rows = connection.execute("SELECT digest, signature FROM signatures WHERE node = 1").fetchall()
        for (digest, _), (_, other) in zip(rows, reversed(rows), strict=True):
            connection.execute("UPDATE signatures SET signature = ? WHERE digest = ?", (other, digest))


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (change("DELETE FROM signatures WHERE node = 1"), "client 1's"),
        (swap, "client 1's"),
        (change("UPDATE signatures SET kind = 'setup' WHERE node = 3"), "client 3's"),
        (change("UPDATE signatures SET signature = 'zz' WHERE node = 3"), "client 3's"),
        (change("DELETE FROM certificates WHERE node = 0"), "client 0's"),
        (change("UPDATE certificates SET certificate = '00' WHERE node = 0"), "client 0's"),
        (change("UPDATE certificates SET node = 5 WHERE node = 0"), "client 0's"),
    ],
)
def test_a_reply_that_no_certified_node_signed_is_named(
    tamper: Callable[[Path], None], named: str, federation: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    conduct(federation, folder)
    tamper(folder)
    verify(folder)  # what nobody asks for is not missed
    with pytest.raises(Broken, match=f"as {named}, and no node with a certificate"):
        verify(folder, federation / "ca.pem")


def test_a_server_that_makes_a_reply_up_is_found_out(federation: Path, tmp_path: Path) -> None:
    """It signs its chain as it likes, and has no node's key."""

    folder = tmp_path / "run"
    commit = RunStore.round
    with pytest.MonkeyPatch.context() as patched:

        def lie(store: RunStore, record, nodes=(), entries=(), replies=()):  # type: ignore[no-untyped-def]
            told = [one._replace(digest="ab" * 32) if one.node == 3 else one for one in replies]
            return commit(store, record, nodes, entries, told)

        patched.setattr(RunStore, "round", lie)
        conduct(federation, folder)
    verify(folder)
    with pytest.raises(Broken, match=r"the reply abababababababab\.\.\. as client 3's"):
        verify(folder, federation / "ca.pem")


def test_a_client_that_is_forgotten_leaves_no_signature(federation: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    conduct(federation, folder)
    forget(folder, 1)
    found = verify(folder, federation / "ca.pem")
    assert (found.certified, found.nameless) == ([0, 2, 3], 2)
    assert any("2 replies are of clients that were forgotten" in line for line in sentences(found))
    with sqlite3.connect(folder / "run.db") as connection:
        for table in ("replies", "signatures", "certificates"):
            assert not connection.execute(f"SELECT 1 FROM {table} WHERE node = 1").fetchall()


def test_an_older_run_has_no_signatures_and_says_so(federation: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    conduct(federation, folder)
    with sqlite3.connect(folder / "run.db") as connection:
        connection.execute("DROP TABLE signatures")
        connection.execute("DROP TABLE certificates")
    assert verify(folder).certified is None
    with pytest.raises(StoreError, match="an earlier fedllm kept no signatures"):
        verify(folder, federation / "ca.pem")
    forget(folder, 1)
