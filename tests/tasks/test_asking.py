"""Rows to be answered: what is wrong with one is told of the columns that it came with."""

from __future__ import annotations

import pytest

from fedllm.data.reading import Row
from fedllm.errors import DataError
from tests.parts import task_of


@pytest.mark.parametrize("name", ["span", "tokens", "instruct", "ranking", "regression", "choice"])
def test_no_column_is_named_that_a_row_need_not_have(name: str) -> None:
    with pytest.raises(DataError, match=r"the columns (are )?body($|; wanted)"):
        task_of(name).ask([Row({"body": "a"}, "asked.jsonl", "asked.jsonl, line 1")], ("O", "B-a"))


def test_a_row_keeps_the_columns_that_it_came_with() -> None:
    row = Row({"body": "a", "spans": None}, "asked.jsonl", "asked.jsonl, line 1")
    supposed = row.supposing({"spans": []}).supposing({"tags": []})
    assert supposed.columns == {"body": "a", "spans": [], "tags": []}
    assert supposed.found == ["body", "spans"]
