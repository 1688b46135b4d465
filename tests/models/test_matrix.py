"""docs/adapters.md says what trains on what, for today's methods, and is true."""

from __future__ import annotations

import pytest

from tests.models import matrix


def written() -> dict[tuple[str, str, str], str]:
    """Return what the page says of each base, method and column."""
    found: dict[tuple[str, str, str], str] = {}
    base, columns = "", list[str]()
    for line in matrix.PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("## "):
            base = line.removeprefix("## ")
        elif line.startswith("| `tuning.peft`"):
            columns = cells[1:]
        elif line.startswith("| `"):
            found |= {
                (base, cells[0].strip("`"), way): text for way, text in zip(columns, cells[1:], strict=True)
            }
    return found


def test_the_page_has_a_cell_for_every_combination() -> None:
    expected = {
        (base, peft, way) for base in matrix.BASES for peft in matrix.names() for way in matrix.ways(base)
    }
    assert written().keys() == expected, "write it again: python -m tests.models.matrix"


@pytest.mark.parametrize(
    ("base", "peft", "way"),
    [
        ("BERT", "lora", "lora"),
        ("Llama", "bitfit", "fwdllm antithetic"),
        ("Llama", "lily", "mezo"),
        ("Llama", "shadow", "lora"),
        ("Llama", "randlora", "fwdllm jvp"),
        ("BERT", "prompt", "fedkd"),
        ("GPT-2", "ia3", "fwdllm jvp"),
    ],
)
def test_a_sample_of_the_page_is_true(base: str, peft: str, way: str) -> None:
    cell = matrix.tried(matrix.Cell(peft, base, way))
    assert (written()[base, peft, way] == "yes") is not bool(cell.refused)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_whole_page_is_true() -> None:
    assert matrix.page(matrix.cells()) == matrix.PAGE.read_text(encoding="utf-8")
