"""Devices that sit in a secure sum with those on a list of their own, whoever else was certified."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedllm.certificates import CERTIFICATE
from fedllm.errors import FedllmError
from fedllm.runs.reader import Run
from tests.deployment.federation import configuration, federation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_stranger_with_a_certificate_gets_no_sum_with_them(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    """Nodes 0 to 2 list one another. Node 3 is certified and takes part: no update is masked beside it."""

    def secure(name: str, clients: int, deadline: float) -> dict[str, object]:
        server = {"sample": clients, "quorum": 3, "deadline_s": deadline, "retries": 0}
        return {"name": name, "clients": clients, "server": server, "privacy": {"secure_aggregation": True}}

    with federation(tmp_path / "federation", 4) as made:
        peers = tmp_path / "peers.pem"
        listed = [bundle.folder / CERTIFICATE for bundle in made.bundles[:3]]
        peers.write_bytes(b"".join(path.read_bytes() for path in listed))
        made.join(0, 1, 2, peers=peers)
        among = made.submit(configuration(tiny_encoder, tiny_texts, **secure("among", 3, 300.0)))
        assert made.finish(among)["status"] == "finished"
        made.join(3)
        beside = made.submit(configuration(tiny_encoder, tiny_texts, **secure("beside", 4, 60.0)))
        with pytest.raises(FedllmError):
            made.finish(beside)
        run = Run(beside.folder)
        assert run.status == "failed"
        assert not run.rounds(after=0)
        told = {row.node: row.reason or "" for row in run.nodes() if row.status == "failed"}
        assert {0, 1, 2} <= told.keys()
        assert all("those in its --peers alone, and client 3" in told[node] for node in (0, 1, 2))
        assert {row.exchange for row in run.nodes()} <= {"keys", "shares"}
