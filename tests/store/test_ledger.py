"""The ledger against sums written out by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.runs.ledger import Entry, Ledger

ENTRIES = st.lists(
    st.builds(
        Entry,
        round=st.integers(0, 4),
        node=st.integers(0, 3),
        direction=st.sampled_from(["up", "down"]),
        exchange=st.sampled_from(["setup", "fit"]),
        record=st.sampled_from(["update", "envelope"]),
        bytes=st.integers(0, 10**12),
        dense=st.none() | st.integers(0, 10**12),
    ),
    max_size=40,
)


@given(ENTRIES)
def test_totals_are_the_sums_over_entries(entries: list[Entry]) -> None:
    ledger = Ledger(entries)
    up = [e for e in entries if e.direction == "up"]
    assert ledger.bytes("up") == sum(e.bytes for e in up)
    assert ledger.bytes("down") == sum(e.bytes for e in entries) - sum(e.bytes for e in up)
    assert ledger.dense("up") == sum(e.bytes if e.dense is None else e.dense for e in up)
    assert ledger.bytes("up", 2) == sum(e.bytes for e in up if e.round == 2)
    assert ledger.setup_up == sum(e.bytes for e in up if e.round == 0)
    pairs = {(e.node, e.round) for e in up if e.round > 0}
    after_setup = sum(e.bytes for e in up if e.round > 0)
    assert ledger.up_per_client_round == (after_setup / len(pairs) if pairs else 0.0)


@given(ENTRIES, st.integers(-1, 5))
def test_a_truncated_ledger_is_the_ledger_of_what_is_left(entries: list[Entry], last: int) -> None:
    ledger = Ledger(entries)
    ledger.truncate(last)
    left = Ledger(e for e in entries if e.round <= last)
    for direction in ("up", "down"):
        assert ledger.bytes(direction) == left.bytes(direction)
        assert ledger.dense(direction) == left.dense(direction)
    assert ledger.up_per_client_round == left.up_per_client_round


@pytest.mark.slow
def test_store_and_ledger_import_without_torch() -> None:
    code = (
        "import sys, fedllm.runs.writer, fedllm.runs.reader, fedllm.runs.ledger;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
