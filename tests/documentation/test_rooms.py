"""The house of docs/architecture.md: every room stands there, and none is so full that one must search it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("fedllm", "strategies", "client", "server", "simulations")
FULL = 15


def test_no_room_holds_more_than_fifteen_files_at_one_level() -> None:
    files = [file for part in (*PACKAGES, "tests", "examples") for file in (ROOT / part).rglob("*.py")]
    rooms = Counter(str(file.parent.relative_to(ROOT)) for file in files)
    assert rooms["fedllm/models"] > 1, "nothing was counted"
    assert {room: files for room, files in rooms.items() if files > FULL} == {}


def test_every_room_of_a_package_is_explained_in_a_line() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    told = {name.split("/")[-2] for name in re.findall(r"`([\w/]+/)`", page)}
    rooms = {file.parent for part in PACKAGES for file in (ROOT / part).glob("*/**/__init__.py")}
    methods = {file.parent for file in (ROOT / "strategies").glob("*/options.py")}
    assert {room for room in rooms - methods if room.name not in told} == set()
