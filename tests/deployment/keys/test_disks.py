"""What lies on the disks of server and devices after a run under secure aggregation, and who may read it."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from fedllm.runs.provenance.verify import verify
from fedllm.runs.reader import Run as StoredRun
from tests.deployment.federation import configuration, federation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MARK = "zebraquartz"


def holding(folder: Path, word: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]


def test_no_text_lies_where_it_was_not_and_no_secret_where_others_read(
    tmp_path: Path, tiny_encoder: Path, tiny_texts: Path, rows: list[dict[str, str]]
) -> None:
    notes = tmp_path / "notes.jsonl"
    notes.write_text("".join(json.dumps({**row, "text": f"{MARK} {row['text']}"}) + "\n" for row in rows))
    with federation(tmp_path / "federation", 3) as made:
        made.join(0, 1, 2, data=notes)
        config = configuration(
            tiny_encoder, tiny_texts, rounds=2, server={"sample": 3, "quorum": 3, "deadline_s": 120.0},
            privacy={"secure_aggregation": True},
            data={"path": str(tiny_texts), "max_length": 16, "classes": ("animal", "fruit", "metal")},
        )  # fmt: skip
        run = made.submit(config)
        assert made.finish(run)["status"] == "finished"
        stored = StoredRun(run.folder)
        kinds = [row.exchange for row in stored.nodes(node=0) if row.round == 1]
        assert kinds == ["keys", "shares", "fit", "agree", "unmask"]
        assert verify(run.folder, made.folder / "ca.pem").certified == [0, 1, 2]
        assert holding(made.folder, MARK) == []  # the devices' state folders lie in it too
        for node in range(3):
            state = made.state(node)
            assert stat.S_IMODE(state.stat().st_mode) == 0o700
            (kept,) = state.glob("*/secure.json")
            secrets = json.loads(kept.read_text())
            assert stat.S_IMODE(kept.stat().st_mode) == 0o600
            assert [secrets[name] for name in ("seal", "mask", "seed", "own_share")] == ["", "", "", ""]
        for path in made.folder.rglob("*key*.pem"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700
