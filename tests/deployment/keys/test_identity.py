"""A node is who its key says: real keys, a real SuperLink, and bundles that say something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.device.bundle import Bundle
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
