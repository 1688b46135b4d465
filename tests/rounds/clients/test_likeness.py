"""A device with another model than the server's has no part in a run, though every shape is right."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from client.node import NodeContext
from client.worker import answer
from fedllm.config import RunConfig
from fedllm.errors import WireError
from fedllm.protocol import wire
from fedllm.protocol.wire import Instruction, Reply
from fedllm.runs.reader import Run
from fedllm.runs.writer import RunStore
from simulations.engines.loopback import loopback
from strategies.likeness import FACT, Likeness
from strategies.registry import resolve_run
from strategies.session import Session, forget_sessions
from tests.architectures import Architecture
from tests.parts import quick
from tests.rounds.scripted import ScriptedGrid, constant, engine_of, grid_of, scripted, send

LIKE = Likeness("a5", (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0) * 2)


@pytest.fixture
def model(tiny_encoder: Path, tmp_path: Path) -> Path:
    """A model's folder that a test may change; its layers count for as much as those of a trained one."""
    folder = Path(shutil.copytree(tiny_encoder, tmp_path / "model"))
    _multiply(folder, "dense.weight", 10.0)
    _multiply(folder, "value.weight", 10.0)
    return folder


def _multiply(folder: Path, ending: str, by: float) -> None:
    file = folder / "model.safetensors"
    tensors = {name: t * by if name.endswith(ending) else t for name, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def config_of(model: Path, texts: Path, **tuning: object) -> RunConfig:
    return resolve_run(
        {
            "clients": 2,
            "model": {"name": str(model)},
            "data": {"path": str(texts), "text": "text", "label": "label"},
            "tuning": {"peft": "lora", "rank": 4, **tuning},
        }
    )


def introduced(config: RunConfig, folder: Path) -> Likeness:
    """Return what a device says that loads the model as it lies there now."""
    forget_sessions()
    place = NodeContext(0, "", str(folder), str(folder), keep_replies=True)
    told = wire.unpack_reply(
        answer(wire.pack_instruction(Instruction("r", "describe")), config.to_json(), place)
    )
    assert not told.error
    return Likeness.heard(told.facts)


def test_the_same_files_make_the_same_of_the_sentence_and_leave_the_model_as_it_was(
    model: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config = config_of(model, tiny_texts)
    server = Session(config)
    measured = server.likeness
    assert introduced(config, tmp_path) == measured
    measured.require(measured, config)
    assert server.model.module.training
    now = server.model.read()
    assert all(torch.equal(now[name], value) for name, value in server.initial.items())


def _weights(folder: Path) -> None:
    _multiply(folder, "layer.1.output.dense.weight", 1.1)


def _words(folder: Path) -> None:
    """Let two words change places."""
    file = folder / "tokenizer.json"
    described = json.loads(file.read_bytes())
    vocabulary = described["model"]["vocab"]
    last, before = sorted(vocabulary, key=vocabulary.get)[-1:-3:-1]
    vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]
    file.write_text(json.dumps(described), encoding="utf-8")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [(_weights, "does not answer as the server's does"), (_words, "its tokenizer of .* is not the server's")],
)
def test_other_weights_and_other_words_are_told_apart(
    changed: Callable[[Path], None], reason: str, model: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config = config_of(model, tiny_texts)
    server = Session(config).likeness
    changed(model)
    with pytest.raises(WireError, match=reason):
        server.require(introduced(config, tmp_path), config)


def test_frozen_factors_with_other_signs_are_told_apart(model: Path, tiny_texts: Path) -> None:
    """A decomposition may flip a pair of singular vectors: a trained matrix between them is then another."""
    config = config_of(model, tiny_texts, peft="tinylora", options={"u": 16}, targets=["query", "value"])
    server, device = Session(config), Session(config)
    for module in device.model.module.modules():
        if "default" in getattr(module, "tinylora_A", {}):
            module.tinylora_A["default"][0] *= -1.0  # type: ignore[index]
            module.tinylora_B["default"][:, 0] *= -1.0  # type: ignore[index]
    assert all(torch.equal(device.initial[name], value) for name, value in server.initial.items())
    with pytest.raises(WireError, match="releases of torch and peft"):
        server.likeness.require(device.likeness, config)


ANSWERING = {
    "BertModel": ("classification", "mean"),
    "T5Model": ("classification", "own"),
    "T5ForConditionalGeneration": ("seq2seq", "mean"),
    "MambaForCausalLM": ("causal", "mean"),
    "BertForSequenceClassification": ("classification", "own"),
}


@pytest.mark.parametrize("name", quick(ANSWERING, "T5Model"))
def test_models_of_every_shape_answer(architecture: Architecture, name: str, tmp_path: Path) -> None:
    task, pooling = ANSWERING[name]
    texts = tmp_path / "texts.jsonl"
    rows = ({"text": "red fox", "label": str(i % 3), "source": "red", "target": "fox"} for i in range(40))
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = {"name": str(architecture(name)), "task": task, "pooling": pooling}
    label = "label" if task == "classification" else ""
    text = "" if task == "seq2seq" else "text"
    data = {"path": str(texts), "text": text, "label": label, "max_length": 16}
    session = Session(resolve_run({"clients": 2, "model": model, "data": data}))
    assert Likeness.heard({FACT: session.likeness.told()}) == session.likeness


SUMS = list(LIKE.sums)


@pytest.mark.parametrize("told", [7, {}, ["a5"], ["a5", *SUMS[1:]], ["a5", *SUMS[1:], math.nan], [1, *SUMS]])
def test_what_is_no_likeness_is_refused(told: object) -> None:
    for said in (json.dumps(told), json.dumps(told)[:-1]):
        with pytest.raises(WireError, match="cannot be read"):
            Likeness.heard({FACT: said})
    assert Likeness.heard({FACT: LIKE.told()}) == LIKE


class Introducing(ScriptedGrid):
    """Client 3 holds another model, client 2 says nothing of its own."""

    def introduction(self, node: int, told: Reply) -> Reply:
        sums = (*LIKE.sums[:-1], 9.0) if node == 3 else LIKE.sums
        facts = {} if node == 2 else {FACT: replace(LIKE, sums=sums).told()}
        return replace(told, facts=facts)


def test_who_holds_another_model_is_not_admitted_and_the_others_go_on(tmp_path: Path) -> None:
    config = scripted(rounds=1, server={"deadline_s": 0.5})
    with loopback(4, {}), RunStore.create(tmp_path / "run", config) as store:
        engine = engine_of(config, store, like=LIKE)
        engine.start(
            grid_of(config, lambda node, asked: send(config, node, asked, constant(1.0)), kind=Introducing)
        )
    found = Run(tmp_path / "run")
    refused = {event.fields["node"]: event.message for event in found.events() if event.kind == "refused"}
    assert refused.keys() == {2, 3}
    assert "it does not say what its model makes of a sentence" in refused[2]
    assert "(off by 7%)" in refused[3]
    assert {row.node for row in found.nodes()} == {0, 1}
    joined = [event for event in found.events() if event.kind == "joined"]
    assert all(FACT not in event.fields.get("device", {}) for event in joined)
