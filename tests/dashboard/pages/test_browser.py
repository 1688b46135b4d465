"""A person at a browser: looks, acts, and is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from fedllm.config import RunConfig
from fedllm.runs.reader import Run
from fedllm.runs.records import NodeRound, RoundRecord
from fedllm.runs.writer import RunStore
from fedllm.tasks.metrics import spread
from tests.dashboard.browser import Served, log_in, serve
from tests.reports.made_up import make_run

pytestmark = pytest.mark.slow
expect.set_options(timeout=240_000)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("dashboard") / "runs"
    finished = make_run(root / "finished")
    (finished.folder / "adapter").mkdir()
    (finished.folder / "adapter" / "adapter_config.json").write_text('{"r": 8}')
    make_run(root / "broken", accuracies=(0.4, 0.5), status="failed")
    with serve(root) as found:
        yield found


@pytest.fixture(scope="module")
def operator(browser: Browser, served: Served) -> Page:
    return log_in(browser, served)


def test_without_login_there_is_only_the_form(browser: Browser, served: Served) -> None:
    page = browser.new_context(base_url=served.url).new_page()
    for path in ("/", "/runs/finished", "/access"):
        answer = page.goto(path)
        assert answer is not None
        assert answer.status == 401
        expect(page.get_by_role("button", name="Log in")).to_be_visible()
    assert "finished" not in page.content()


def test_nothing_is_loaded_from_elsewhere_and_nothing_goes_wrong(
    browser: Browser, served: Served, operator: Page
) -> None:
    page = operator.context.new_page()
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    for path in ("/", "/runs/finished", "/nodes", "/access"):
        page.goto(path)
        expect(page.locator("h1")).to_be_visible()
    page.goto("/runs/finished")
    expect(page.locator("canvas")).to_have_count(2)
    assert wrong == []
    assert [url for url in asked if not url.startswith((served.url, "data:", "blob:"))] == []


def test_the_three_questions_are_answered_at_once(operator: Page) -> None:
    operator.goto("/runs/finished")
    cards = operator.locator("section.verdict")
    expect(cards.nth(0)).to_contain_text("Is it running well?")
    expect(cards.nth(0)).to_contain_text("Finished")
    expect(cards.nth(1)).to_contain_text("Who is slow?")
    expect(cards.nth(2)).to_contain_text("2.4 kB")


def test_a_failed_run_says_why(operator: Page) -> None:
    operator.goto("/")
    row = operator.get_by_role("row").filter(has_text="broken")
    expect(row).to_contain_text("failed")
    expect(row).to_contain_text("quorum lost in round 3")
    row.get_by_role("link", name="broken").click()
    expect(operator.locator("section.verdict").first).to_contain_text("quorum lost in round 3")


def test_the_list_is_filtered(operator: Page) -> None:
    operator.goto("/")
    expect(operator.get_by_role("row")).to_have_count(3)
    operator.get_by_label("Filter by name, method, model").fill("BROK")
    expect(operator.get_by_role("row")).to_have_count(2)


def test_the_list_is_sorted_by_keyboard(operator: Page) -> None:
    operator.goto("/")
    header = operator.get_by_role("columnheader", name="Quality")
    expect(header).to_have_attribute("aria-sort", "none")
    for order, first in (("ascending", "broken"), ("descending", "finished")):
        header.get_by_role("button").focus()
        operator.keyboard.press("Enter")
        expect(header).to_have_attribute("aria-sort", order)
        expect(operator.locator("tbody tr").first).to_contain_text(first)


def test_a_page_that_is_not_there_leads_back(operator: Page) -> None:
    for path in ("/nothing", "/runs/nothing"):
        operator.goto(path)
        expect(operator.get_by_text("There is no")).to_be_visible()
        operator.get_by_role("link", name="All runs").click()
        expect(operator.get_by_role("heading", name="Runs")).to_be_visible()


def test_what_cannot_be_taken_back_is_asked_first(served: Served, operator: Page) -> None:
    run = make_run(served.root / "forgetful")
    operator.goto("/runs/forgetful")
    lever = operator.get_by_role("button", name="forget node 1")
    lever.click()
    operator.get_by_role("dialog").get_by_role("button", name="Keep").click()
    expect(operator.get_by_role("dialog")).to_have_count(0)
    assert {row.node for row in run.nodes()} == {0, 1}
    lever.click()
    operator.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(lever).to_have_count(0)
    assert {row.node for row in run.nodes()} == {0}


def test_the_phase_says_what_is_waited_for_and_until_when(served: Served, operator: Page) -> None:
    config = RunConfig(name="waiting", clients=5, rounds=9)
    with RunStore.create(served.root / "waiting", config) as store:
        store.phase("fit", round=1, have=3, need=5, closes_at=time.time() + 300)
        operator.goto("/runs/waiting")
        expect(operator.get_by_text("round 1: fit, 3 of 5 answers")).to_be_visible()
        expect(operator.get_by_text("quorum 3, deadline in 4 min")).to_be_visible()
        operator.get_by_role("tab", name="Log").click()
        expect(operator.get_by_role("log", name="What the nodes logged")).to_contain_text(
            "Nothing: only nodes"
        )


def test_a_run_that_goes_away_while_one_looks_is_told(served: Served, operator: Page) -> None:
    folder = make_run(served.root / "doomed").folder
    operator.goto("/runs/doomed")
    expect(operator.locator("canvas")).to_have_count(2)
    (folder / "summary.json").write_text("{}")
    expect(operator.get_by_role("heading", name="It cannot be read")).to_be_visible()
    shutil.rmtree(folder)
    expect(operator.get_by_text("This page stands still: there is no run 'doomed'")).to_be_visible()
    operator.goto("/nodes?run_name=doomed")
    expect(operator.get_by_role("heading", name="Nodes")).to_be_visible()


def test_the_adapter_is_downloaded(operator: Page, tmp_path: Path) -> None:
    operator.goto("/runs/finished")
    operator.get_by_role("button", name="Download").click()
    with operator.expect_download() as download:
        operator.get_by_text("adapter.zip").click()
    download.value.save_as(tmp_path / "adapter.zip")
    packed = zipfile.ZipFile(tmp_path / "adapter.zip")
    assert json.loads(packed.read("adapter/adapter_config.json")) == {"r": 8}


def test_the_best_round_and_the_worst_clients_are_shown(
    served: Served, operator: Page, tmp_path: Path
) -> None:
    settings = {"clients": 2, "rounds": 9, "evaluation": {"clients": True, "patience": 1}}
    data = {"client_test_fraction": 0.5}
    folder = served.root / "fair"
    own = [0.5, 0.125]
    told = {"spread": {"accuracy": spread(own, higher=True)}}
    with RunStore.create(
        folder, RunConfig.model_validate({"name": "fair", "data": data, **settings})
    ) as store:
        for number, accuracy in enumerate((0.5, 0.75, 0.7)):
            rows = [
                NodeRound(
                    round=number, node=node, status="accepted", exchange="evaluate", metrics={"accuracy": x}
                )
                for node, x in enumerate(own)
            ]
            store.round(RoundRecord(round=number, metrics={"accuracy": accuracy}, details=told), rows)
            (folder / "checkpoints" / f"round-{number:06d}").mkdir(parents=True)
        store.finish("finished")
    (folder / "adapter-best").mkdir()
    (folder / "adapter-best" / "adapter_config.json").write_text('{"r": 7}')
    operator.goto("/runs/fair")
    expect(operator.get_by_text("accuracy 0.7 (best 0.75 in round 1)")).to_be_visible()
    expect(operator.get_by_text("Finished early")).to_be_visible()
    expect(
        operator.get_by_text("ended after round 2 of 9: no better accuracy in 1 evaluations")
    ).to_be_visible()
    expect(operator.get_by_text("worst tenth 0.125, fairness gap 0.375")).to_be_visible()
    expect(operator.get_by_role("cell", name="accuracy 0.125")).to_be_visible()
    operator.get_by_role("tab", name="Checkpoints").click()
    expect(operator.get_by_text("after round 1, the best")).to_be_visible()
    operator.get_by_role("button", name="Download").click()
    with operator.expect_download() as download:
        operator.get_by_text("adapter-best.zip").click()
    download.value.save_as(tmp_path / "adapter-best.zip")
    packed = zipfile.ZipFile(tmp_path / "adapter-best.zip")
    assert json.loads(packed.read("adapter-best/adapter_config.json")) == {"r": 7}


def test_a_viewer_looks_and_is_refused(browser: Browser, served: Served) -> None:
    page = log_in(browser, served, "vera")
    page.goto("/runs/broken")
    expect(page.get_by_role("button", name="Resume")).to_be_disabled()
    status = page.evaluate(
        """async () => {
            const session = await (await fetch("/api/session")).json();
            const headers = {"X-CSRF-Token": session.csrf, "Content-Type": "application/json"};
            const asked = {method: "POST", headers, body: "{}"};
            return (await fetch("/api/runs/broken/continue", asked)).status;
        }"""
    )
    assert status == 403
    page.goto("/access")
    expect(page.get_by_text("This is for operators")).to_be_visible()


def test_the_form_says_what_cannot_be_started(operator: Page) -> None:
    operator.goto("/start")
    operator.get_by_label("clients", exact=True).fill("0")
    operator.get_by_role("button", name="Start").click()
    expect(operator.get_by_text("clients = 0 is not allowed")).to_be_visible()
    toast = operator.locator(".q-notification.bg-negative")
    expect(toast.get_by_role("button", name="OK")).to_have_css("color", "rgb(255, 255, 255)")
    expect(operator.get_by_role("heading", name="New run")).to_be_visible()


def test_a_page_whose_session_is_lost_asks_to_log_in_and_comes_back(browser: Browser, served: Served) -> None:
    page = log_in(browser, served)
    page.goto("/runs/broken")
    page.wait_for_function("window.socket && window.socket.connected")
    # What a restart of the dashboard does to an open page: its session and its socket are gone.
    page.context.clear_cookies()
    page.evaluate("window.socket.disconnect()")
    page.wait_for_url("**/login?next=%2Fruns%2Fbroken")
    page.get_by_label("User").fill("olive")
    page.get_by_label("Password").fill(served.operator)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", name="broken")).to_be_visible()


def test_logs_open_at_their_newest_line(served: Served, operator: Page) -> None:
    folder = make_run(served.root / "wordy").folder
    with RunStore.open(folder) as store:
        for number in range(100):
            store.event("note", f"line {number}.")
    operator.goto("/runs/wordy")
    operator.get_by_role("tab", name="Log").click()
    log = operator.get_by_role("log", name="What happened")
    expect(log).to_contain_text("line 99.")
    # Counted from the end of what is shown, as a reversed column is.
    assert log.evaluate("log => log.scrollTop") == 0
    assert log.evaluate("log => log.scrollHeight > log.clientHeight")
    assert log.evaluate("log => getComputedStyle(log).flexDirection") == "column-reverse"


def test_logging_out_ends_it(browser: Browser, served: Served) -> None:
    page = log_in(browser, served)
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_role("button", name="Log in")).to_be_visible()
    answer = page.goto("/runs/finished")
    assert answer is not None
    assert answer.status == 401


def test_a_round_shows_within_two_seconds_of_its_end(served: Served, operator: Page) -> None:
    config = RunConfig(name="moving", clients=3, rounds=99)
    with RunStore.create(served.root / "moving", config) as store:
        operator.goto("/runs/moving")
        expect(operator.get_by_text("round 0 of 99").first).to_be_visible()
        prompt = 0
        for number in range(1, 30):
            rows = [NodeRound(round=number, node=0, status="accepted", compute_seconds=1.0)]
            store.round(RoundRecord(round=number, metrics={"accuracy": 0.01 * number}, seconds=1.0), rows)
            ended = time.monotonic()
            expect(operator.get_by_text(f"round {number} of 99").first).to_be_visible()
            # All of them show; that it is soon is promised for an idle machine, and this one may be busy.
            prompt += time.monotonic() - ended < 2.0
            if prompt == 5:
                break
        assert prompt == 5


def test_what_server_and_nodes_log_shows_as_it_comes(served: Served, operator: Page) -> None:
    logs = served.root / ".dashboard" / "logs"
    logs.mkdir(exist_ok=True)
    with RunStore.create(served.root / "talking", RunConfig(name="talking", clients=3, rounds=9)) as store:
        operator.goto("/runs/talking")
        operator.get_by_role("tab", name="Log").click()
        store.event("joined", "client 2", node=2)
        store.node_log(2, "worker: the disk is slow\n<b>not bold</b>", round=1)
        (logs / "talking.log").write_text("Aggregating results\n")
        happened = operator.get_by_role("log", name="What happened")
        expect(happened).to_contain_text("client 2")
        expect(operator.get_by_role("log", name="server")).to_contain_text("Aggregating")
        nodes = operator.get_by_role("log", name="What the nodes logged")
        expect(nodes).to_contain_text("node 2  worker: the disk is slow")
        expect(nodes).to_contain_text("node 2  <b>not bold</b>")


def test_a_node_is_quarantined_and_released(served: Served, operator: Page) -> None:
    config = RunConfig(name="herd", clients=3, rounds=9)
    with RunStore.create(served.root / "herd", config) as store:
        store.round(RoundRecord(round=1), [NodeRound(round=1, node=2, status="accepted")])
        operator.goto("/runs/herd")
        operator.get_by_role("button", name="quarantine node 2").click()
        expect(operator.get_by_text("takes effect before the next round").first).to_be_visible()
        (command,) = store.take_commands()
        assert (command.kind, command.by, command.arguments) == ("quarantine", "olive", {"node": 2})
        # What the engine notes once it obeys.
        store.event("quarantine", "olive asked for quarantine", node=2)
        expect(operator.get_by_role("row").filter(has_text="quarantined")).to_have_count(1)
        operator.get_by_role("button", name="release node 2").click()
        expect(operator.get_by_text("release node 2: takes effect").first).to_be_visible()
        assert [command.kind for command in store.take_commands()] == ["release"]


def test_a_simulation_is_watched_paused_resumed_and_stopped(
    served: Served, operator: Page, tiny_texts: Path, tiny_encoder: Path
) -> None:
    folder = served.root / "simulated"
    settings = {
        "model.name": tiny_encoder, "data.path": tiny_texts, "clients": 3, "rounds": 10_000,
        "name": "simulated", "training.local_steps": 1, "tuning.targets": '["query", "value"]',
    }  # fmt: skip
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    fedllm = [sys.executable, "-c", "from fedllm.cli import main; main()"]
    process = subprocess.Popen(
        [*fedllm, "simulate", "quickstart", *overrides, "--out", str(folder), "--no-report"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _await_rounds(folder, 2, process)
        operator.goto("/runs/simulated")
        expect(operator.locator(".chip").first).to_have_text("running")
        before = Run(folder).rounds()[-1].round
        _await_rounds(folder, before + 1, process)
        operator.get_by_role("button", name="Pause").click()
        expect(operator.locator(".chip").first).to_have_text("paused")
        paused_at = Run(folder).rounds()[-1].round
        time.sleep(1.0)
        assert Run(folder).rounds()[-1].round == paused_at
        operator.get_by_role("button", name="Resume").click()
        expect(operator.locator(".chip").first).to_have_text("running")
        _await_rounds(folder, paused_at + 1, process)
        operator.get_by_role("button", name="Stop").click()
        operator.get_by_role("dialog").get_by_role("button", name="Stop").click()
        expect(operator.locator(".chip").first).to_have_text("stopped")
        assert process.wait(timeout=240) == 1
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    done = [(line["who"], line["action"]) for line in Run(folder).audit_log()]
    assert done == [("olive", "pause"), ("olive", "resume"), ("olive", "stop")]
    assert Run(folder).status == "stopped"


def _await_rounds(folder: Path, number: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, "the simulation ended"
        if (folder / "rounds.jsonl").is_file() and len(
            (folder / "rounds.jsonl").read_text().splitlines()
        ) > number:  # round 0 has a line too
            return
        time.sleep(0.1)
    raise AssertionError(f"round {number} never came")
