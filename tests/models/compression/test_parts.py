"""Layers, neurons, heads and weights go by what texts show to matter; transformers loads what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from fedllm.errors import ConfigError, ModelError
from fedllm.models.anatomy import layers
from fedllm.models.compression import importance
from fedllm.models.compression.structure import feed_forward
from simulations.compressing import Wanted, compress

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def written(backbone: Any, base: Path, folder: Path) -> str:
    """Save a changed model with the tokenizer of its base; return its name."""
    backbone.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


def test_influence_and_inputs_are_what_the_hidden_states_say(tiny_causal: Path) -> None:
    backbone = AutoModelForCausalLM.from_pretrained(tiny_causal)
    found = importance.measure(backbone, [(IDS, MASK)])
    with torch.no_grad():
        hidden = backbone(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
    alike = torch.nn.functional.cosine_similarity(hidden[0], hidden[1], dim=-1)
    assert found.influence[0] == pytest.approx(float((1 - alike)[MASK.bool()].sum()), rel=1e-5)
    assert found.tokens == 6
    with torch.no_grad():
        normed = layers(backbone)[0].input_layernorm(hidden[0])[MASK.bool()]
    query = layers(backbone)[0].self_attn.q_proj
    expected = query.weight.abs() * normed.square().mean(0).sqrt()
    torch.testing.assert_close(importance.strength(found, query), expected, rtol=1e-5, atol=1e-7)


def test_a_layer_that_does_nothing_goes_first(tiny_causal: Path, tiny_texts: Path, tmp_path: Path) -> None:
    backbone = AutoModelForCausalLM.from_pretrained(tiny_causal)
    idle = layers(backbone)[0]
    for matrix in (idle.self_attn.o_proj, idle.mlp.down_proj):
        torch.nn.init.zeros_(matrix.weight)
    name = written(backbone, tiny_causal, tmp_path / "base")
    told = compress(name, tmp_path / "out", Wanted(layers=1), str(tiny_texts), max_length=16)
    assert told["layers"] == [1]
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        ours, theirs = (model(input_ids=IDS[:1]).logits for model in (small, backbone))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["tiny_encoder", "tiny_causal"])
def test_neurons_that_say_nothing_go_first(
    kind: str, tiny_texts: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(kind)
    auto = AutoModelForCausalLM if kind == "tiny_causal" else AutoModel
    backbone = auto.from_pretrained(base)
    for layer in layers(backbone):
        fall = feed_forward(layer).fall
        fall.weight.data[:, : fall.in_features // 2] = 0
    name = written(backbone, base, tmp_path / "base")
    compress(name, tmp_path / "out", Wanted(neurons=0.5), str(tiny_texts), max_length=16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 32
    small = auto.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        ours, theirs = (model.eval()(input_ids=IDS[:1])[0] for model in (small, backbone))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_heads_go_with_their_keys(tiny_causal: Path, tiny_texts: Path, tmp_path: Path) -> None:
    backbone = AutoModelForCausalLM.from_pretrained(tiny_causal)
    for layer in layers(backbone):
        layer.self_attn.o_proj.weight.data[:, :16] = 0  # two of four heads, which share keys
    name = written(backbone, tiny_causal, tmp_path / "base")
    compress(name, tmp_path / "out", Wanted(heads=0.5), str(tiny_texts), max_length=16)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2, 1)
    with torch.no_grad():
        ours, theirs = (model(input_ids=IDS[:1]).logits for model in (small, backbone))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("wanda", "left"), [("0.25", 24), ("2:4", 16)])
def test_each_row_loses_its_share(
    wanda: str, left: int, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    told = compress(str(tiny_encoder), tmp_path / "out", Wanted(wanda=wanda), str(tiny_texts), max_length=16)
    small = AutoModel.from_pretrained(tmp_path / "out", add_pooling_layer=False)
    assert told["zeros"] == pytest.approx(1 - left / 32)
    for layer in layers(small):
        assert ((layer.attention.self.query.weight != 0).sum(1) == left).all()


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Wanted(), "nothing is to be compressed"),
        (Wanted(layers=2), "has 2 layers"),
        (Wanted(neurons=1.5), "between 0 and 1"),
        (Wanted(wanda="4:2"), "--wanda takes"),
        (Wanted(heads=0.5), "heads cannot go from a bert"),
    ],
)
def test_what_cannot_be_is_refused(
    wanted: Wanted, said: str, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, ModelError), match=said):
        compress(str(tiny_encoder), tmp_path / "out", wanted, str(tiny_texts), max_length=16)
    assert not (tmp_path / "out").exists()
