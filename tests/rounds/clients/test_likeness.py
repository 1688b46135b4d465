"""A device with another model, other texts or another release has no part in a run; no shape tells."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
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
from fedllm.runs.records import OWN, TEXTS
from fedllm.runs.writer import RunStore
from simulations.engines.loopback import loopback
from strategies.likeness import MODEL, RELEASE, Likeness, require_alike
from strategies.registry import resolve_run
from strategies.session import Session, forget_sessions
from tests.architectures import Architecture
from tests.conftest import CLASSES
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


def introduced(config: RunConfig, folder: Path, own: str = "") -> Mapping[str, str]:
    """Return the facts of a device that loads model and texts as they lie there now."""
    forget_sessions()
    place = NodeContext(0, own, str(folder), str(folder), keep_replies=True)
    asked = wire.pack_instruction(Instruction("r", "describe"))
    told = wire.unpack_reply(answer(asked, config.to_json(), place))
    assert not told.error
    return told.facts


def test_the_same_files_make_the_same_of_the_sentence_and_leave_the_model_as_it_was(
    model: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config = config_of(model, tiny_texts)
    server = Session(config)
    facts = introduced(config, tmp_path)
    assert {name: facts[name] for name in server.shared} == server.shared
    require_alike(server.shared, facts, config)
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
    server = Session(config).shared
    changed(model)
    with pytest.raises(WireError, match=reason):
        require_alike(server, introduced(config, tmp_path), config)


def test_other_texts_under_the_same_name_are_told_apart_and_own_ones_not_told(
    model: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    texts = Path(shutil.copy(tiny_texts, tmp_path / "texts.jsonl"))
    plain = config_of(model, texts)
    config = plain.model_copy(
        update={"data": plain.data.model_copy(update={"classes": tuple(sorted(CLASSES))})}
    )
    server = Session(config).shared
    lines = texts.read_text(encoding="utf-8").splitlines(keepends=True)
    texts.write_text("".join([*lines[1:], lines[0]]), encoding="utf-8")
    with pytest.raises(WireError, match=f"the texts that it reads under the name of {texts}"):
        require_alike(server, introduced(config, tmp_path), config)
    facts = introduced(config, tmp_path, own=str(texts))
    assert facts[TEXTS] == OWN
    require_alike(server, facts, config)


def test_parts_that_are_dealt_otherwise_and_other_releases_are_told_apart(
    model: Path, tiny_texts: Path
) -> None:
    config = config_of(model, tiny_texts)
    ours = Session(config).shared
    other = {TEXTS: Session(config.model_copy(update={"seed": 1})).shared[TEXTS]}
    parts = {TEXTS: f"{ours[TEXTS].split()[0]} {other[TEXTS].split()[1]}"}
    for facts, reason in (
        (parts, "the parts of texts"),
        (other, "the texts that"),
        ({TEXTS: ""}, "the texts"),
    ):
        with pytest.raises(WireError, match=reason):
            require_alike(ours, {**ours, **facts}, config)
    with pytest.raises(WireError, match=r"its release of fedllm is 9\.9\.9, and the server's"):
        require_alike(ours, {**ours, RELEASE: "9.9.9"}, config)


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
        require_alike(server.shared, device.shared, config)


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
    texts.write_text(
        "".join(
            json.dumps({"text": f"fox {i}", "label": str(i % 3), "source": f"fox {i}", "target": "fox"})
            + "\n"
            for i in range(40)
        ),
        encoding="utf-8",
    )
    model = {"name": str(architecture(name)), "task": task, "pooling": pooling}
    label = "label" if task == "classification" else ""
    text = "" if task == "seq2seq" else "text"
    data = {"path": str(texts), "text": text, "label": label, "max_length": 16}
    session = Session(resolve_run({"clients": 2, "model": model, "data": data}))
    require_alike(session.shared, session.shared, session.config)


SUMS = list(LIKE.sums)


@pytest.mark.parametrize(
    "told",
    [7, {}, ["a5"], ["a5", *SUMS[1:]], ["a5", *SUMS[1:], math.nan], ["a5", *SUMS[1:], 10**400], [1, *SUMS]],
)
def test_what_is_no_likeness_is_refused(told: object) -> None:
    for said in (json.dumps(told), json.dumps(told)[:-1]):
        with pytest.raises(WireError, match="cannot be read"):
            Likeness.heard({MODEL: said})
    assert Likeness.heard({MODEL: LIKE.told()}) == LIKE


SHARED = {RELEASE: "1.2.3", TEXTS: "a b", MODEL: LIKE.told()}


class Introducing(ScriptedGrid):
    """Client 3 holds another model, client 2 tells nothing; client 1 has texts of its own."""

    def introduction(self, node: int, told: Reply) -> Reply:
        other = replace(LIKE, sums=(*LIKE.sums[:-1], 9.0))
        facts = {0: {}, 1: {TEXTS: OWN}, 3: {MODEL: other.told()}}
        return replace(told, facts={} if node == 2 else {**SHARED, **facts[node]})


def test_who_holds_another_model_is_not_admitted_and_the_others_go_on(tmp_path: Path) -> None:
    config = scripted(rounds=1, server={"deadline_s": 0.5})
    with loopback(4, {}), RunStore.create(tmp_path / "run", config) as store:
        engine = engine_of(config, store, shared=SHARED)
        engine.start(
            grid_of(config, lambda node, asked: send(config, node, asked, constant(1.0)), kind=Introducing)
        )
    found = Run(tmp_path / "run")
    refused = {event.fields["node"]: event.message for event in found.events() if event.kind == "refused"}
    assert refused.keys() == {2, 3}
    assert "its release of fedllm is none that it tells" in refused[2]
    assert "(off by 7.0%)" in refused[3]
    assert {row.node for row in found.nodes()} == {0, 1}
    joined = {e.fields["node"]: e.fields["device"] for e in found.events() if e.kind == "joined"}
    assert all(MODEL not in device for device in joined.values())
    assert [joined[node].get(TEXTS) for node in (0, 1)] == [None, OWN]
