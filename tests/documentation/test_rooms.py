"""The house of docs/architecture.md: no room is so full that one has to search it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ("fedllm", "strategies", "client", "server", "simulations", "tests", "examples")
FULL = 15


def test_no_room_holds_more_than_fifteen_files_at_one_level() -> None:
    rooms = Counter(
        str(file.parent.relative_to(ROOT)) for part in PARTS for file in (ROOT / part).rglob("*.py")
    )
    assert rooms["fedllm/models"] > 1, "nothing was counted"
    assert {room: files for room, files in rooms.items() if files > FULL} == {}
