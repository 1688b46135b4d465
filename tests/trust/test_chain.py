"""Signed rounds: what clients sent is found in the chain, and whatever is changed afterwards is named."""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.errors import StoreError
from fedllm.protocol.wire import Instruction, Reply
from fedllm.runs import checkpoint
from fedllm.runs.amending import forget
from fedllm.runs.provenance.chain import Signer, own_signer
from fedllm.runs.provenance.verify import Broken, verify
from fedllm.runs.reader import Run
from fedllm.runs.writer import RunStore
from server.federation.provision import provision, signer
from server.rounds.state import ServerState
from simulations.engines.loopback import loopback
from tests.commands.conftest import Fedllm
from tests.commands.conftest import fedllm as fedllm  # a fixture
from tests.rounds.federation import DeviceGrid, configuration, run
from tests.rounds.scripted import EXAMPLES, START, constant, engine_of, grid_of, scripted, send

LIAR = 2


def conduct(folder: Path, by: Signer | None = None, rounds: int = 2) -> dict[int, list[Reply]]:
    """Run, or go on, with a chain; client 2 claims too many texts. Return what each client sent."""
    config, sent = scripted(rounds=rounds, checkpoints={"every": 1}), dict[int, list[Reply]]()

    def script(node: int, asked: Instruction) -> Reply:
        claimed = 10_000 if node == LIAR else EXAMPLES
        told = {"metrics": {"loss": 0.5 + node, "seconds": 1e-3}, "examples": claimed}
        reply = send(config, node, asked, constant(1.0 + node), **told)
        sent.setdefault(node, []).append(reply)
        return reply

    begun = folder.is_dir()
    saved = checkpoint.latest(folder / "checkpoints") if begun else None
    opened = RunStore.open(folder) if begun else RunStore.create(folder, config)
    with loopback(config.clients, {}), opened as store:
        store.sign("scripted", by or own_signer(folder))
        store.truncate(-1 if saved is None else saved.number)
        if store.config.rounds != rounds:
            store.extend(rounds)
        start = START if saved is None else ServerState.load(saved)
        engine_of(config, store, start=start).start(grid_of(config, script))
    return sent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    conduct(tmp_path / "run")
    return tmp_path / "run"


def digest(reply: Reply, node: int) -> str:
    """As the page on trust says that it is made."""
    told = ["scripted", node, reply.round, reply.index, reply.examples, dict(reply.metrics)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode() + b"\0" + reply.payload).hexdigest()


def test_each_reply_that_counted_is_in_its_round_and_no_other_is(tmp_path: Path) -> None:
    sent = conduct(tmp_path / "run")
    found = verify(tmp_path / "run")
    assert found.rounds == {record.round: record.state_sha256 for record in Run(tmp_path / "run").rounds()}
    assert (found.links, found.unsigned, found.left) == (4, -1, [])
    assert set(found.checkpoints) == {0, 1, 2}
    for node, replies in sent.items():
        for reply in replies:
            counted = found.counted(digest(reply, node))
            if node == LIAR:
                assert counted is None
            else:
                assert counted == {
                    "round": reply.round,
                    "link": reply.round + 1,
                    "counts": True,
                    "node": node,
                }
    assert found.counted(digest(sent[0][0], 1)) is None
    assert len(found.replies) == 3 + 3


def change(statement: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        with sqlite3.connect(folder / "run.db") as connection:
            assert connection.execute(statement).rowcount

    return act


def swap_signatures(folder: Path) -> None:
    with sqlite3.connect(folder / "run.db") as connection:
        signed = dict(connection.execute("SELECT id, signature FROM chain").fetchall())
        connection.execute("UPDATE chain SET signature = ? WHERE id = 1", (signed[2],))


def retrain(folder: Path) -> None:
    """Put other tensors into the last checkpoint, with checksums that are right."""
    saved = checkpoint.load(folder / "checkpoints", 2)
    saved.groups["tensors"]["b"] = torch.ones(1)
    checkpoint.save(folder / "checkpoints", 2, saved.groups, saved.facts, keep=9)


def spoil(folder: Path) -> None:
    (folder / "checkpoints" / "round-000001" / "tensors.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (change("UPDATE chain SET body = replace(body, '\"round\": 1', '') WHERE id = 2"), "link 2"),
        (change("UPDATE chain SET body = 'x' WHERE id = 3"), "link 3"),
        (swap_signatures, "link 1"),
        (change("DELETE FROM chain WHERE id = 1"), "link 1"),
        (change("DELETE FROM chain WHERE id = 3"), "round 2 has no link"),
        (change("DELETE FROM chain WHERE id = 0"), "link 0"),
        (change("DELETE FROM rounds WHERE round = 2"), "round 2 was signed, and run.db has no such"),
        (change("UPDATE rounds SET state_sha256 = 'ab' WHERE round = 1"), "round 1 was signed"),
        (change("UPDATE replies SET node = 3 WHERE node = 1 AND link = 2"), "link 2 .* client 3"),
        (change("UPDATE meta SET value = replace(value, '0.001', '0.1') WHERE key = 'config'"), "link 3"),
        (retrain, "checkpoint of round 2 holds another state"),
        (spoil, "round 1 was signed, and its checkpoint cannot be read"),
    ],
    ids=[
        "body", "no body", "signature", "link gone", "last link gone", "first link gone", "round gone",
        "state", "client", "configuration", "checkpoint", "checkpoint gone",
    ],
)  # fmt: skip
def test_what_was_changed_is_named(folder: Path, tamper: Callable[[Path], None], named: str) -> None:
    tamper(folder)
    with pytest.raises(Broken, match=named):
        verify(folder)


def test_a_chain_that_somebody_else_made_is_not_the_federations(tmp_path: Path) -> None:
    provision(tmp_path / "ours", "localhost", 1)
    provision(tmp_path / "theirs", "localhost", 1)
    conduct(tmp_path / "run", signer(tmp_path / "ours"))
    conduct(tmp_path / "forged")
    with pytest.raises(Broken, match=r"round 1 counted the reply .* no node with a certificate"):
        verify(tmp_path / "run", tmp_path / "ours" / "ca.pem")  # whose key is good: test_signed.py
    with pytest.raises(Broken, match=r"link 0 .* another authority"):
        verify(tmp_path / "run", tmp_path / "theirs" / "ca.pem")
    with pytest.raises(Broken, match=r"link 0 .* key of the run's own"):
        verify(tmp_path / "forged", tmp_path / "ours" / "ca.pem")
    stolen = Signer(Ed25519PrivateKey.generate(), signer(tmp_path / "ours").certificate)
    conduct(tmp_path / "stolen", stolen)
    with pytest.raises(Broken, match=r"link 0 .* certificate is of another key"):
        verify(tmp_path / "stolen", tmp_path / "ours" / "ca.pem")


def test_a_round_that_was_left_stays_on_record(folder: Path) -> None:
    before = verify(folder)
    checkpoint.forget(folder / "checkpoints", 1)
    sent = conduct(folder, rounds=3)
    found = verify(folder)
    assert found.left == [2]
    assert found.rounds[2] == before.rounds[2]
    assert max(found.rounds) == 3
    again = found.counted(digest(sent[0][0], 0))
    assert again is not None
    assert (again["round"], again["link"], again["counts"]) == (2, 6, True)


def test_a_client_that_is_forgotten_leaves_the_chain_whole(folder: Path, tmp_path: Path) -> None:
    sent = conduct(tmp_path / "twin")
    forget(folder, 1)
    found = verify(folder)
    assert set(found.clients.values()) == {0, 3}
    counted = found.counted(digest(sent[1][-1], 1))
    assert counted is not None
    assert counted["round"] == 2


def test_a_run_without_a_chain_says_so_and_one_begun_late_says_from_where(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    conduct(folder)
    with sqlite3.connect(folder / "run.db") as connection:
        connection.execute("DROP TABLE chain")
        connection.execute("DROP TABLE replies")
    with pytest.raises(StoreError, match="keeps no chain"):
        verify(folder)
    conduct(folder, rounds=3)
    found = verify(folder)
    assert (found.unsigned, list(found.rounds)) == (2, [3])


@pytest.mark.slow
def test_a_whole_run_is_verified_and_a_device_finds_its_reply(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, fedllm: Fedllm, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    config = configuration(tiny_encoder, tiny_texts, clients=2, rounds=1, server={})
    with caplog.at_level(logging.INFO, "fedllm.worker"):
        run(config, folder, grid_of=DeviceGrid)
    logged = [one.getMessage() for one in caplog.records if one.getMessage().startswith("reply in round 1")]
    assert stat.S_IMODE((folder / "signing-key.pem").stat().st_mode) == 0o600
    told = json.loads(fedllm("verify", folder, "--json", "--reply", logged[0].rpartition(" ")[2]).out)
    assert told["reply"]["round"] == 1
    assert told["checkpoints"] == [0, 1]
    assert "as client" in fedllm("verify", folder, "--reply", logged[1].rpartition(" ")[2]).out
    answer = fedllm("verify", folder, "--reply", "ab")
    assert (answer.code, "no round of" in answer.err) == (1, True)
    (folder / "signing-key.pem").unlink()
    with Run(folder).extended(2) as more, pytest.raises(StoreError, match="cannot read"):
        run(more, folder)
    assert Run(folder).status == "finished"
    change("UPDATE rounds SET state_sha256 = 'ab' WHERE round = 1")(folder)
    answer = fedllm("verify", folder)
    assert (answer.code, "round 1 was signed" in answer.err) == (1, True)
