"""A node with a valid key sends what a page, a terminal or a file might obey: all show it as words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedllm.codecs import CodecContext, parse
from fedllm.errors import FedllmError
from fedllm.protocol import claims, wire
from fedllm.protocol.wire import Instruction, Reply
from fedllm.runs.reader import Run
from fedllm.runs.writer import RunStore
from fedllm.tensors import TensorSpec
from simulations.engines.loopback import loopback
from simulations.results import report
from tests.reports.test_report import _read
from tests.rounds.scripted import ScriptedGrid, constant, engine_of, grid_of, scripted, send

HTML = '<img src=x onerror="alert(1)"><script>alert(2)</script>'
SENT = f"{HTML} [click](javascript:alert(3)) \x1b[2J\x1b]0;owned\x07 ../../etc/passwd"


def test_words_of_a_node_are_words_wherever_they_are_shown(tmp_path: Path) -> None:
    config = scripted(rounds=2, server={"deadline_s": 0.5})

    class Rude(ScriptedGrid):
        def introduction(self, node: int, told: Reply) -> Reply:
            facts = {"platform": SENT, "python": SENT, wire.LOG: SENT}
            return replace(told, facts=facts) if node == 3 else told

    def script(node: int, asked: Instruction) -> Reply | str:
        reply = send(config, node, asked, constant(1.0), metrics={"loss": 0.5, "seconds": 0.1})
        if node == 3:
            return replace(reply, facts={wire.LOG: SENT}) if asked.round == 1 else f"failed: {SENT}"
        if node == 2 and asked.round == 2:
            return replace(reply, metrics={HTML: 1.0})
        return reply

    with loopback(config.clients, {}), RunStore.create(tmp_path / "run", config) as store:
        engine_of(config, store).start(grid_of(config, script, kind=Rude))
        store.finish("finished")
    run = Run(tmp_path / "run")
    reasons = {row.node: row.reason or "" for row in run.nodes() if row.status in ("failed", "rejected")}
    assert "a metric is named" in reasons[2]
    assert HTML in reasons[3]
    page = _read(report.render(run, {}))
    assert not page.tags & {"script", "img"}
    assert not any("javascript" in link for link in page.links)
    assert "<script>alert(2)</script>" in page.text
    kept = json.dumps([[vars(row) for row in run.nodes()], [vars(one) for one in run.events()]], default=str)
    assert "\\u001b" not in kept  # no terminal obeys what is left
    assert not (tmp_path / "etc").exists()


@pytest.mark.parametrize("name", ["../x", "a\nb", "<b>", "x" * 101, "", "=1+1", "__class__.x\0"])
def test_names_are_plain_or_refused(name: str) -> None:
    for check in (claims.metrics, claims.facts):
        with pytest.raises(FedllmError):
            check({name: 1.0 if check is claims.metrics else "x"})


@pytest.mark.parametrize(
    "codec", ["quantize(bits=8) | entropy", "sign | entropy", "top_k(fraction=0.5) | cast(bf16)"]
)
def test_a_bomb_is_not_unpacked(codec: str) -> None:
    """An update a thousand times as long: the payload's checksum is right, its length not what is due."""
    long, due = TensorSpec((4_000_000,)), TensorSpec((4_000,))
    context = CodecContext()
    made, _ = parse(codec).encode({"a": torch.zeros(long.shape)}, {}, context)
    with pytest.raises(FedllmError):
        parse(codec).decode(made, {"a": due}, {}, context)


@pytest.mark.parametrize("run", ["../../home", "/etc", "a/b", "", ".", "x" * 65, "a\n"])
def test_a_server_names_no_folder_of_a_device(run: str) -> None:
    with pytest.raises(FedllmError, match="is not a plain name"):
        wire.unpack_instruction(wire.pack_instruction(Instruction(run, "fit")))
