"""A node is who its key says: real keys, a real SuperLink, and bundles that say something else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from client.device.bundle import Bundle
from fedllm.certificates import CERTIFICATE
from fedllm.runs.provenance.verify import verify
from fedllm.runs.reader import Run as StoredRun
from server.federation.link import enrolled
from server.federation.provision import read
from tests.deployment.federation import configuration, federation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def renumbered(bundle: Bundle, number: int) -> Bundle:
    """Change what a bundle says of itself, as somebody with the device could."""
    path = bundle.folder / "bundle.toml"
    path.write_text(path.read_text().replace(f"node = {bundle.node}", f"node = {number}"))
    return Bundle.read(bundle.folder)


def test_a_node_under_another_number_is_refused_and_the_others_train(
    tmp_path: Path, tiny_encoder: Path, tiny_texts: Path
) -> None:
    """Node 2 wants to be client 0, and is first at the server."""
    with federation(tmp_path / "federation", 3) as made:
        made.bundles[2] = renumbered(made.bundles[2], 0)
        made.join(2)
        made.join(0, 1)
        assert sorted(enrolled(read(made.folder), made.link.control).values()) == [0, 1, 2]
        server = {"sample": 2, "quorum": 2, "deadline_s": 60.0}  # for the refused one it waits that long
        run = made.submit(configuration(tiny_encoder, tiny_texts, rounds=1, server=server))
        assert made.finish(run)["status"] == "finished"
        (refused,) = [event for event in StoredRun(run.folder).events() if event.kind == "refused"]
        assert refused.message.startswith("node 2 was not admitted: its key is that of node 2, and it says")
        assert {row.node for row in StoredRun(run.folder).nodes()} == {0, 1}


def test_each_reply_is_signed_and_found_by_what_its_node_logged(
    tmp_path: Path, tiny_encoder: Path, tiny_texts: Path
) -> None:
    """Node 2 has an older bundle, without a certificate: it says so, and the others train."""
    with federation(tmp_path / "federation", 3) as made:
        (made.bundles[2].folder / CERTIFICATE).unlink()
        made.join(0, 1, 2)
        server = {"sample": 2, "quorum": 2, "deadline_s": 60.0}
        run = made.submit(configuration(tiny_encoder, tiny_texts, rounds=2, server=server))
        assert made.finish(run)["status"] == "finished"
        (refused,) = [event for event in StoredRun(run.folder).events() if event.kind == "refused"]
        assert "node.pem is missing, which proves what this node signs" in refused.message
        found = verify(run.folder, made.folder / "ca.pem")
        assert found.certified == [0, 1]
        for node in (0, 1):
            log = (made.state(node) / "client.log").read_text(encoding="utf-8")
            told = re.findall(r"reply in round (\d+) of run \w+: ([0-9a-f]{64})", log)
            assert [int(number) for number, _ in told] == [1, 2]
            for number, digest in told:
                counted = found.counted(digest)
                assert counted is not None
                assert (counted["round"], counted["node"], counted["counts"]) == (int(number), node, True)
