"""Methods and codec stages from outside: found, chosen, configured, and refused where they are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.node import NodeContext
from client.worker import answer
from fedllm import plugins
from fedllm.codecs import parse
from fedllm.codecs.catalogue import catalogue
from fedllm.errors import ConfigError
from fedllm.models.extra_adapters import kinds
from fedllm.protocol import wire
from fedllm.protocol.wire import Instruction
from fedllm.runs.checkpoint import load
from fedllm.runs.reader import Run
from simulations.engines.loopback import simulate
from simulations.keys import keys
from strategies.registry import method_names, resolve_run

METHOD = '''
from pydantic import Field

from fedllm.config import MethodOptions
from strategies.base import Step
from strategies.fedavg.method import FedAvg


class Options(MethodOptions):
    """Averaging that goes part of the way."""

    method = "damped"
    implementation = "{module}:Damped"

    share: float = Field(0.5, gt=0.0, le=1.0)
    """Share of the mean update that is taken."""


class Damped(FedAvg):
    Options = Options

    def step(self, state, acc):
        whole = super().step(state, acc)
        share = Options.model_validate(self.config.options).share
        moved = {{n: old + share * (whole.proposal[n] - old) for n, old in state.tensors.items()}}
        return Step(moved, whole.memory)
'''

STAGE = '''
from dataclasses import dataclass

from fedllm.codecs.stages.floats import Cast


@dataclass(frozen=True)
class Halves(Cast):
    """halves: bfloat16 by another name."""

    dtype: str = "bf16"

    name = "halves"
    example = "halves"


STAGES = (Halves,)
'''


ADAPTER = """
from fedllm.models.extra_adapters import Adapter


class Still(Adapter):
    name = "still"
"""


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a test's plug-ins end with it."""
    before = set(sys.modules)
    monkeypatch.setattr(plugins, "_named", {})
    yield
    for name in set(sys.modules) - before:
        if name.startswith("plugged"):
            del sys.modules[name]
    plugins._installed.cache_clear()


def written(folder: Path, name: str, text: str) -> str:
    file = folder / f"{name}.py"
    file.write_text(text.replace("{module}", name).replace("{{", "{").replace("}}", "}"), encoding="utf-8")
    return str(file)


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, entry: str) -> None:
    """Lay out a distribution as pip would, with one entry point."""
    written(folder, name, text)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(str(folder))
    plugins._installed.cache_clear()


def settings(encoder: Path, texts: Path) -> dict[str, object]:
    return {
        "method": "damped",
        "clients": 3,
        "rounds": 1,
        "model": {"name": str(encoder)},
        "data": {"path": str(texts), "text": "text", "label": "label"},
        "training": {"local_steps": 1, "batch_size": 4},
    }


def test_a_file_adds_a_method_that_runs(tmp_path: Path, tiny_encoder: Path, tiny_texts: Path) -> None:
    """Half of FedAvg's first step: the closed form of what the plug-in says it does."""
    file = written(tmp_path, "plugged_file", METHOD)
    document = settings(tiny_encoder, tiny_texts)
    config = resolve_run({**document, "plugins": [file]}, ["damped.share=0.5"])
    simulate(config, tmp_path / "damped")
    whole = resolve_run({**document, "method": "fedavg"})
    simulate(whole, tmp_path / "whole")

    def moved(name: str) -> dict[str, object]:
        states = [load(tmp_path / name / "checkpoints", number).groups["tensors"] for number in (0, 1)]
        return {key: states[1][key] - states[0][key] for key in states[0]}

    half, full = moved("damped"), moved("whole")
    for name in full:
        assert half[name].sub(full[name] * 0.5).abs().max() < 1e-6  # type: ignore[attr-defined]
    assert Run(tmp_path / "damped").config.plugins == (file,)


def test_its_options_are_checked_and_listed(tmp_path: Path, tiny_encoder: Path, tiny_texts: Path) -> None:
    document = {**settings(tiny_encoder, tiny_texts), "plugins": [written(tmp_path, "plugged_keys", METHOD)]}
    with pytest.raises(ConfigError, match=r"damped\.share = 2"):
        resolve_run(document, ["damped.share=2"])
    with pytest.raises(ConfigError, match=r"unknown key damped\.shares; did you mean share"):
        resolve_run(document, ["damped.shares=1"])
    assert "damped" in method_names()
    assert [key.meaning for key in keys() if key.name == "damped.share"] == [
        "Share of the mean update that is taken."
    ]


def test_a_file_adds_a_codec_stage(tmp_path: Path) -> None:
    plugins.load([written(tmp_path, "plugged_stage", STAGE)])
    assert str(parse("halves | entropy")).startswith("halves")
    assert "halves" in [entry.name for entry in catalogue()]


def test_a_stage_that_does_not_say_its_kind_is_told_so(tmp_path: Path) -> None:
    text = STAGE.replace("stages.floats", "chain").replace("Cast", "Transform").replace("halves", "kindless")
    plugins.load([written(tmp_path, "plugged_kindless", text)])
    with pytest.raises(ConfigError, match="kindless does not say what it is: give its class a kind"):
        parse("kindless | sign")


def test_installed_ones_need_not_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they are called they say themselves, whatever the entry point is called."""
    entry = (
        "[fedllm.methods]\na = plugged_inst:Options\n[fedllm.codecs]\nb = plugged_inst:Halves\n"
        "[fedllm.adapters]\nc = plugged_inst:Still\n"
    )
    installed(tmp_path, monkeypatch, "plugged_inst", METHOD + STAGE + ADAPTER, entry)
    assert "damped" in method_names()
    assert str(parse(str(parse("halves")))) == str(parse("halves"))
    assert kinds()["still"].__module__ == "plugged_inst"
    plugins.require_installed(["plugged_inst"])


def test_a_device_takes_installed_plug_ins_only(
    tmp_path: Path, tiny_encoder: Path, tiny_texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file would leave a mark if it were imported."""
    mark = tmp_path / "mark"
    file = written(tmp_path, "plugged_evil", f"open({str(mark)!r}, 'w').close()\n")
    config = resolve_run({**settings(tiny_encoder, tiny_texts), "method": "fedavg"})
    asked = wire.pack_instruction(Instruction("r", "describe"))
    place = NodeContext(0, str(tiny_texts), str(tmp_path), str(tmp_path), keep_replies=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in (file, "plugged_evil"):
        hostile = json.loads(config.to_json()) | {"plugins": [name]}
        reply = wire.unpack_reply(answer(asked, json.dumps(hostile), place))
        assert "not installed on this device" in reply.error
    assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import no_such_module_at_all\n", "cannot be imported: ModuleNotFoundError"),
        ("1 / 0\n", "cannot be imported: ZeroDivisionError"),
        ("def broken(:\n", "cannot be imported: SyntaxError"),
    ],
    ids=["missing", "raises", "syntax"],
)
def test_a_plug_in_that_cannot_be_imported_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plugins.load([written(tmp_path, "plugged_broken", text)])


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no module 'plugged_nowhere'"):
        plugins.load(["plugged_nowhere"])
    with pytest.raises(ConfigError, match="no file"):
        plugins.load([str(tmp_path / "nothing.py")])
    with pytest.raises(ConfigError, match="no list of modules"):
        resolve_run({"plugins": "mine"})


def test_names_that_are_taken_are_refused(tmp_path: Path) -> None:
    plugins.load([written(tmp_path, "plugged_lora", METHOD.replace('"damped"', '"lora"'))])
    with pytest.raises(ConfigError, match="adds a method 'lora'"):
        resolve_run({})
    plugins._named.clear()
    plugins.load([written(tmp_path, "plugged_cast", STAGE.replace('"halves"', '"cast"'))])
    with pytest.raises(ConfigError, match="adds a codec stage 'cast'"):
        parse("none")


def test_two_of_one_name_and_one_without_a_name_are_refused(tmp_path: Path) -> None:
    plugins.load([written(tmp_path, "plugged_one", METHOD + STAGE), written(tmp_path, "plugged_two", METHOD)])
    with pytest.raises(ConfigError, match="two plug-ins add a method 'damped', plugged_one and plugged_two"):
        method_names()
    plugins._named.clear()
    plugins.load([written(tmp_path, "plugged_nameless", "class Stage: ...\n\n\nSTAGES = (Stage,)\n")])
    with pytest.raises(ConfigError, match=r"a codec stage without a name: .*Stage'> lacks name"):
        parse("none")


def test_options_are_known_without_torch() -> None:
    code = (
        "import sys; from strategies.registry import methods; from simulations.keys import keys; keys();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
