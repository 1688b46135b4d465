"""Kinds of adapters from outside: attached, trained, saved, read back, and refused where they are wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from fedllm import plugins
from fedllm.config import RunConfig
from fedllm.errors import ConfigError, ModelError
from fedllm.models import extra_adapters
from fedllm.models.model import load
from fedllm.models.tuning.adapters import method_names
from simulations.results.predict import predict
from tests.rounds.federation import configuration, run

KIND = '''
import torch
from torch import nn

from fedllm.models.extra_adapters import Adapter


class Turn(Adapter):
    """A trained gain, after an offset that is drawn at random and stays."""

    name = "turn"
    behind = "linear"

    def __init__(self, width, rank):
        super().__init__(width, rank)
        self.gain = nn.Parameter(torch.ones(width))
        self.register_buffer("offset", torch.randn(width) / 100)

    def forward(self, y):
        return self.gain * (y + self.offset)


ADAPTERS = (Turn,)
'''

Plug = Callable[..., str]


@pytest.fixture
def plug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plug]:
    """Write a plug-in, altered, and load it until the test ends."""
    monkeypatch.setattr(plugins, "_named", {})
    made: list[str] = []

    def plug(old: str = "", new: str = "") -> str:
        assert old in KIND
        name = f"plugged_adapter_{len(made)}"
        made.append(name)
        file = tmp_path / f"{name}.py"
        file.write_text(KIND.replace(old, new) if old else KIND, encoding="utf-8")
        plugins.load([str(file)])
        return str(file)

    yield plug
    for name in made:
        sys.modules.pop(name, None)


def turning(encoder: Path, texts: Path, **sections: Any) -> RunConfig:
    return configuration(encoder, texts, **{"rounds": 1, "tuning": {"peft": "turn"}, **sections})


def test_a_run_with_it_is_read_back_on_the_plain_base(
    plug: Plug, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    """The answer again, from the base, the saved numbers and the formula; no class of the plug-in."""
    file = plug()
    folder = tmp_path / "run"
    run(turning(tiny_encoder, tiny_texts, plugins=(file,)), folder)
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"

    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    places = {name.split(".small_adapter.")[0] for name in stored}
    base = AutoModel.from_pretrained(tiny_encoder).eval()
    linear = {n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and ".layer." in n}
    assert places == linear
    assert any(not torch.equal(stored[f"{n}.small_adapter.gain"], torch.ones(())) for n in places)
    with torch.no_grad():
        for name in places:
            gain, offset = (stored[f"{name}.small_adapter.{part}"] for part in ("gain", "offset"))
            module = base.get_submodule(name)
            module.weight.copy_(gain[:, None] * module.weight)  # type: ignore[operator, union-attr, index]
            module.bias.copy_(gain * (module.bias + offset))  # type: ignore[operator, union-attr]
    again = extra_adapters.load(AutoModel.from_pretrained(tiny_encoder), folder / "adapter").eval()
    words = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(
            again(words).last_hidden_state, base(words).last_hidden_state, rtol=1e-4, atol=1e-5
        )
    assert predict(folder, ["iron near the copper"])[0]["label"] in ("fruit", "metal", "animal")
    card = (folder / "adapter" / "README.md").read_text()
    assert f'load(["{Path(file).name}"])' in card


def test_an_adapter_of_our_own_needs_no_plug_in_to_load(
    plug: Plug, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    run(turning(tiny_encoder, tiny_texts, plugins=(plug(),), tuning={"peft": "bitfit"}), tmp_path / "run")
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "extra_adapters.load(" in card
    assert "fedllm.plugins" not in card


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fwdllm", {"directions": 4, "estimator": "jvp"}),
        ("fwdllm", {"directions": 4, "estimator": "antithetic"}),
        ("mezo", {}),
        ("fedkd", {}),
    ],
    ids=["jvp", "antithetic", "mezo", "fedkd"],
)
def test_other_methods_train_it_too(
    plug: Plug, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    """A run ends as finished only if each tensor is trained, and what was saved scores as the run did."""
    run(
        turning(tiny_encoder, tiny_texts, plugins=(plug(),), method=method, options=options), tmp_path / "run"
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


def test_it_counts_as_an_adapter_and_not_as_the_base(
    plug: Plug, tiny_encoder: Path, tiny_texts: Path
) -> None:
    from strategies.registry import open_method

    plug()
    sizes = []
    for peft in ("turn", "bitfit"):
        config = turning(tiny_encoder, tiny_texts, tuning={"peft": peft})
        method = open_method(config)
        sizes.append(method.reference_parameters(method.build(("a", "b", "c"))))
    assert sizes[0] == sizes[1]


def test_it_stands_among_the_methods_and_is_told_when_it_is_missing(
    plug: Plug, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    from fedllm.models.saving import save

    plug()
    assert "turn" in method_names()
    place = save(load(turning(tiny_encoder, tiny_texts), ("a", "b")), tmp_path)
    plugins._named.clear()
    assert "turn" not in method_names()
    with pytest.raises(
        ModelError, match=r"'turn', which a plug-in adds \(plugged_adapter_0\.Turn\): load that first"
    ):
        extra_adapters.load(AutoModel.from_pretrained(tiny_encoder), place)
    with pytest.raises(ModelError, match="'turn' is unknown"):
        load(turning(tiny_encoder, tiny_texts), ("a", "b"))


def test_a_saved_adapter_that_lacks_a_tensor_is_refused(
    plug: Plug, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    from fedllm.models.saving import save

    plug()
    place = save(load(turning(tiny_encoder, tiny_texts), ("a", "b")), tmp_path)
    stored = load_file(place / "adapter_model.safetensors")
    name = max(stored)
    del stored[name]
    save_file(stored, place / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=f"it lacks {name}"):
        extra_adapters.load(AutoModel.from_pretrained(tiny_encoder), place)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"turn"', '"bitfit"', "adds a kind of adapter 'bitfit', which is fedllm's own"),
        ('"turn"', '"head"', "adds a kind of adapter 'head', which is fedllm's own"),
        ('"turn"', '"lora"', "adds a kind of adapter 'lora', which is taken already"),
        ('"turn"', '"p-tuning"', "adds a kind of adapter 'p-tuning', which is taken already"),
        ('"turn"', '"full"', "adds a kind of adapter 'full', which is taken already"),
        ('"turn"', '"My Turn"', "'My Turn'; its name must be lower case, digits and hyphens"),
        ('    name = "turn"\n', "", "without a name"),
        ("class Turn(Adapter)", "class Turn(nn.Module)", "'turn' that is no subclass of Adapter"),
    ],
    ids=["own", "head", "peft", "alias", "full", "spelling", "nameless", "stranger"],
)
def test_wrong_kinds_are_refused(plug: Plug, old: str, new: str, words: str) -> None:
    plug(old, new)
    with pytest.raises(ConfigError, match=words):
        method_names()


def test_two_plug_ins_of_one_name_are_refused(plug: Plug) -> None:
    plug()
    plug()
    with pytest.raises(ConfigError, match="two plug-ins add a kind of adapter 'turn', plugged_adapter_0 and"):
        method_names()


def test_an_adapter_without_a_parameter_is_refused(plug: Plug, tiny_encoder: Path, tiny_texts: Path) -> None:
    plug("nn.Parameter(torch.ones(width))", "1.0")
    with pytest.raises(ModelError, match='"turn": Turn has no parameter to train'):
        load(turning(tiny_encoder, tiny_texts), ("a", "b"))


def test_an_adapter_that_changes_the_shape_is_refused(
    plug: Plug, tiny_encoder: Path, tiny_texts: Path
) -> None:
    plug("return self.gain * (y + self.offset)", "return (self.gain * y)[..., :3]")
    model = load(turning(tiny_encoder, tiny_texts), ("a", "b"))
    backbone: Any = model.module.backbone
    with pytest.raises(ModelError, match=r'"turn" makes \[1, 2, 3\] of \[1, 2, 32\]'):
        backbone(torch.tensor([[5, 6]]))


def test_on_a_bfloat16_base_it_works_in_float32(plug: Plug, tiny_encoder: Path, tiny_texts: Path) -> None:
    plug()
    model = load(
        turning(tiny_encoder, tiny_texts, model={"name": str(tiny_encoder), "dtype": "bfloat16"}), ("a", "b")
    )
    backbone: Any = model.module.backbone
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    assert backbone(torch.tensor([[5, 6]])).last_hidden_state.dtype == torch.bfloat16
