"""The report is one page that needs nothing else and says what the run says."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedllm import wording
from fedllm.config import RunConfig
from fedllm.errors import StoreError
from fedllm.runs.reader import Run
from fedllm.runs.writer import RunStore
from simulations.results import report
from tests.reports.made_up import make_run

_VOID = {"meta", "br", "link", "img", "hr", "input", "path", "use", "rect"}


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [v for k, v in attrs if k in ("href", "src", "xlink:href", "action") and v]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + " "


def _read(text: str) -> _Page:
    page = _Page(text)
    assert page.open == []
    return page


def _page_without_plots(folder: Path) -> _Page:
    return _read(report.render(Run(folder), {}))


@pytest.mark.slow
def test_the_page_stands_alone(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    page = _read(report.write(tmp_path / "run").read_text())
    assert all(link.startswith("#") for link in page.links), page.links
    assert not page.tags & {"script", "link", "img", "iframe"}
    raw = (tmp_path / "run" / "report.html").read_text()
    assert "prefers-color-scheme: dark" in raw
    assert "@import" not in raw
    names = {"accuracy-bytes", "accuracy-round", "accuracy-seconds", "loss-round", "partition", "traffic"}
    plots = {path.name for path in (tmp_path / "run" / "plots").iterdir()}
    assert plots == {f"{name}.{form}" for name in names for form in ("png", "pdf", "svg")}
    assert raw.count("<svg") == len(names)


def test_the_page_says_what_the_run_says(tmp_path: Path) -> None:
    make_run(tmp_path / "run", codec={"up": "quantize(bits=8)"})
    text = _page_without_plots(tmp_path / "run").text
    for piece in (
        "finished",
        "best 0.9 in round 3",
        "600 B",  # uploaded: 3 rounds x 2 nodes x 100
        "4x fewer by the codec",
        "quantize(bits=8)",
        "norm <9> exceeds 5",
        "3 in all",
        "1.8 kB",
        "local_steps = 8",
        "loopback",
    ):
        assert piece in text, piece


def test_names_from_outside_are_escaped(tmp_path: Path) -> None:
    make_run(tmp_path / "run", model={"name": "<script>alert(1)</script>"})
    page = _page_without_plots(tmp_path / "run")
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "<b>sport</b>" in page.text


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    make_run(tmp_path / "run", status="failed")
    text = _page_without_plots(tmp_path / "run").text
    assert "failed" in text
    assert "quorum lost in round 3" in text


def test_a_run_without_rounds_has_a_page(tmp_path: Path) -> None:
    RunStore.create(tmp_path / "run", RunConfig()).close()
    text = _read(report.write(tmp_path / "run").read_text()).text
    assert "interrupted" in text
    assert "No round has been committed yet" in text


def test_a_causal_run_leads_with_perplexity(tmp_path: Path) -> None:
    make_run(tmp_path / "run", (30.0, 20.0), metric="perplexity")
    text = _page_without_plots(tmp_path / "run").text
    assert "Test perplexity" in text
    assert "Test accuracy" not in text


def test_without_a_run_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no run"):
        report.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_499, "999 kB"), (999_500, "1 MB"),
        (1_234_567, "1.23 MB"), (5e9, "5 GB"), (7.25e12, "7.25 TB"), (2e15, "2000 TB"), (None, "-"),
    ],
)  # fmt: skip
def test_bytes_for_people(count: float | None, text: str) -> None:
    assert wording.human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"), (9.99, "9.99 s"), (12.34, "12.3 s"), (59.97, "1 min"), (3599.6, "1 h 0 min"),
        (None, "-"),
    ],
)  # fmt: skip
def test_seconds_for_people(seconds: float | None, text: str) -> None:
    assert wording.human_seconds(seconds) == text
