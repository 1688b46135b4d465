"""Downloads that take work: made once, beside the threads that serve, and never from outside a run."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from fedllm.errors import ConfigError
from server.dashboard.actions.launch import Launcher
from server.dashboard.actions.operations import Operations
from server.dashboard.reading.prepared import Prepared
from tests.dashboard.client import TestClient
from tests.reports.made_up import make_run


def test_however_many_ask_it_is_made_once_and_other_threads_are_free(tmp_path: Path) -> None:
    prepared, begun, go_on, made = Prepared(tmp_path / "kept"), threading.Event(), threading.Event(), []

    def make(place: Path) -> None:
        made.append(threading.current_thread().name)
        begun.set()
        assert go_on.wait(240)
        place.write_text("report")

    async def ask_at_once() -> list[Path]:
        asked = [asyncio.create_task(prepared.file("a", 1, make)) for _ in range(45)]
        # The loop's own threads are as free as before while the file is being made.
        await asyncio.to_thread(begun.wait, 240)
        go_on.set()
        return list(await asyncio.gather(*asked))

    found = asyncio.run(ask_at_once())
    assert {path.read_text() for path in found} == {"report"}
    assert len(made) == 1
    assert made[0].startswith("prepared")


def test_it_is_made_anew_once_its_run_has_changed_or_it_went_wrong(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path / "kept")

    def ask(stamp: int, text: str) -> str:
        return asyncio.run(prepared.file("a", stamp, lambda place: void(place.write_text(text)))).read_text()

    def refuse(place: Path) -> None:
        raise ConfigError("no")

    assert [ask(1, "one"), ask(1, "two"), ask(2, "three")] == ["one", "one", "three"]
    with pytest.raises(ConfigError):
        asyncio.run(prepared.file("a", 3, refuse))
    assert ask(3, "four") == "four"
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["a"]


def void(_: object) -> None:
    """Say nothing."""


def test_a_report_is_drawn_once_until_the_run_changes(
    ops: Operations, operator: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, drawn = make_run(ops.root / "a"), []

    def draw(self: Launcher, name: str) -> Path:
        drawn.append(name)
        (run.folder / "report.html").write_text(f"<p>{len(drawn)}</p>")
        return run.folder / "report.html"

    monkeypatch.setattr(Launcher, "report", draw)
    get = lambda: operator.get("/api/runs/a/files/report.html").text  # noqa: E731
    assert [get(), get()] == ["<p>1</p>", "<p>1</p>"]
    (run.folder / "summary.json").write_bytes((run.folder / "summary.json").read_bytes() + b"\n")
    assert get() == "<p>2</p>"


@pytest.mark.parametrize(
    "file", ["config.toml", "summary.json", "report.html", "adapter.zip", "adapter-best.zip"]
)
def test_links_in_a_run_lead_nowhere(
    ops: Operations, operator: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    folder = make_run(ops.root / "a").folder
    monkeypatch.setattr(Launcher, "report", lambda self, name: folder / "report.html")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "shadow").write_text("root")
    packed = file.endswith(".zip")
    link = folder / (file.removesuffix(".zip") if packed else file)
    link.unlink(missing_ok=True)
    link.symlink_to(secret if packed else secret / "shadow")
    answer = operator.get(f"/api/runs/a/files/{file}")
    assert (answer.status_code, "is a link" in answer.json()["detail"]) == (404, True)
