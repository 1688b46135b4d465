"""The table that is sorted, narrowed and cut into pages on the server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from nicegui import Client, ui
from nicegui.page import page

from server.dashboard.pages.table import Table, column


@pytest.fixture
def table() -> Table:
    with Client(page("/made-up"), request=None):
        found = Table([column("key", "Node"), column("loss", "Loss")], "Nodes", size=2)
        assert isinstance(found, ui.element)
    losses = [0.3, None, 0.1, 0.2, 0.5]
    found.show(
        [
            {"key": key, "loss": loss, "search": f"node {key}", "state": "ok" if key < 4 else "gone"}
            for key, loss in enumerate(losses)
        ]
    )
    return found


def _look(table: Table, **asked: Any) -> list[int]:
    table._look(SimpleNamespace(args={"page": 1, "sortBy": None, "descending": False} | asked))  # type: ignore[arg-type]
    return _shown(table)


def _shown(table: Table) -> list[int]:
    return [row["key"] for row in table._props["rows"]]


def test_a_page_at_a_time_is_sent(table: Table) -> None:
    assert (_shown(table), table._props["total"]) == ([0, 1], 5)
    assert _look(table, page=3) == [4]
    assert _look(table, page=9) == [4]


def test_all_rows_are_sorted_and_what_has_no_value_comes_last(table: Table) -> None:
    assert _look(table, sortBy="loss") + _look(table, sortBy="loss", page=2) == [2, 3, 0, 4]
    assert _look(table, sortBy="loss", page=3) == [1]
    assert _look(table, sortBy="loss", descending=True) == [4, 0]
    assert _look(table, sortBy="loss", descending=True, page=3) == [1]


def test_narrowing_starts_at_the_first_page(table: Table) -> None:
    _look(table, page=3)
    table.narrow("NODE 3", "")
    assert (_shown(table), table._props["total"], table._props["page"]) == ([3], 1, 1)
    table.narrow("", "gone")
    assert _shown(table) == [4]
