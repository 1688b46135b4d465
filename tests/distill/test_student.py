"""The student: which layers it keeps, how it is narrowed, whom it can learn from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, ModelError
from fedllm.models import model as models
from fedllm.models.model import Model
from fedllm.models.saving import save
from fedllm.tensors import fingerprint
from strategies.fedkd.student import (
    check_pair,
    depth,
    freeze_embeddings,
    keep_layers,
    narrow,
    principal_directions,
    width,
)
from tests.distill.conftest import Start

IDS = torch.tensor([[2, 6, 9, 20, 3], [2, 14, 25, 3, 0]])
MASK = (IDS != 0).long()


def _load(name: Path, task: str = "classification") -> Model:
    config = RunConfig.model_validate(
        {"model": {"name": str(name), "task": task}, "data": {"label": "label"}, "tuning": {"peft": "full"}}
    )
    model = models.load(config, ("a", "b", "c"))
    model.module.eval()
    return model


def _hidden(model: Model) -> tuple[torch.Tensor, ...]:
    output = model.module(IDS, MASK, output_hidden_states=True)
    assert output.hidden_states is not None
    return output.hidden_states


def test_the_first_layers_alone_compute_what_they_computed_in_the_teacher(deep_encoder: Path) -> None:
    teacher, student = _load(deep_encoder), _load(deep_encoder)
    keep_layers(student, (0, 1))
    assert (depth(student), depth(teacher)) == (2, 4)
    for one, other in zip(_hidden(student), _hidden(teacher)[:3], strict=True):
        torch.testing.assert_close(one, other)


def test_chosen_layers_are_the_teachers_own(deep_encoder: Path) -> None:
    teacher, student = _load(deep_encoder).module, _load(deep_encoder)
    keep_layers(student, (1, 3))
    kept, origin = student.module.state_dict(), teacher.state_dict()
    for place, layer in enumerate((1, 3)):
        ours = {n: t for n, t in kept.items() if f".layer.{place}." in n}
        assert len(ours) == 16
        for name, tensor in ours.items():
            assert torch.equal(tensor, origin[name.replace(f".layer.{place}.", f".layer.{layer}.")])


def test_a_causal_student_runs_and_predicts(tiny_causal: Path) -> None:
    teacher, student = _load(tiny_causal, "causal"), _load(tiny_causal, "causal")
    keep_layers(student, (1,))
    assert depth(student) == 1
    logits = student.module(IDS, MASK).logits
    assert logits.shape == teacher.module(IDS, MASK).logits.shape
    assert logits.isfinite().all()


@pytest.mark.parametrize("layers", [(), (2, 1), (0, 0), (4,), (-1,)])
def test_layers_that_do_not_exist_are_refused(deep_encoder: Path, layers: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="ascending numbers from 0 to 3"):
        keep_layers(_load(deep_encoder), layers)


def test_every_node_derives_the_same_student(start: Start) -> None:
    for options in ({}, {"layers": (0, 2)}, {"width": 16}):
        assert fingerprint(start(**options).initial) == fingerprint(start(**options).initial)


def test_frozen_embeddings_do_not_travel(start: Start, deep_encoder: Path) -> None:
    frozen, trained = start().initial, start(embeddings="trained").initial
    tables = {n for n in trained if "embeddings" in n and "LayerNorm" not in n}
    assert len(tables) == 3
    assert trained.keys() - frozen.keys() == tables


def test_a_frozen_table_freezes_the_output_layer_tied_to_it(tiny_causal: Path) -> None:
    model = _load(tiny_causal, "causal")
    freeze_embeddings(model)
    vocabulary = len(model.tokenizer)
    assert all(vocabulary not in p.shape for p in model.trainable().values())


def test_principal_directions_span_what_numpy_finds(deep_encoder: Path) -> None:
    model = _load(deep_encoder)
    basis = principal_directions(model, 6)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64))
    table = model.module.state_dict()["backbone.embeddings.word_embeddings.weight"].double()
    best = torch.linalg.svdvals(table)[6:].square().sum().sqrt()
    torch.testing.assert_close((table - table @ basis @ basis.T).norm(), best)


def test_heads_of_low_rank_attend_and_move_as_before(deep_encoder: Path) -> None:
    """Where a head's products fit the narrower rank, nothing is lost: scores and values are the teacher's."""
    model = _load(deep_encoder)
    attention = model.module.backbone.encoder.layer[0].attention
    with torch.no_grad():
        for part in (attention.self.query, attention.self.value):
            part.bias.normal_(generator=torch.Generator().manual_seed(0))
            for head in part.weight.chunk(2) + part.bias.chunk(2):
                head[8:] = 0  # 8 of 16 rows: rank 8, which is what a width of 16 in two heads leaves
    basis = principal_directions(model, 16).float()
    z = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))

    def products(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inner = attention.self
        q, k, v = ((part(x)).view(2, 2, -1).transpose(0, 1) for part in (inner.query, inner.key, inner.value))
        scores = q @ k.transpose(1, 2) * inner.scaling
        moved = attention.output.dense((scores.softmax(-1) @ v).transpose(0, 1).reshape(2, -1))
        return scores, moved

    scores, moved = products(z @ basis.T)
    narrow(model, 16)
    thin_scores, thin_moved = products(z)
    torch.testing.assert_close(thin_scores, scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(thin_moved, moved @ basis, rtol=1e-4, atol=1e-5)


def test_the_strongest_neurons_stay(deep_encoder: Path) -> None:
    model = _load(deep_encoder)
    layer = model.module.backbone.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.weight[::2] *= 100  # every second of 64
        layer.intermediate.dense.bias.copy_(torch.arange(64.0))
    narrow(model, 16)
    assert layer.intermediate.dense.bias.tolist() == list(range(0, 64, 2))


def test_a_narrow_student_is_a_plain_transformers_model(deep_encoder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    student = _load(deep_encoder)
    keep_layers(student, (1, 3))
    narrow(student, 16)
    assert width(student) == 16
    place = save(student, tmp_path)
    loaded = AutoModel.from_pretrained(place).eval()
    settings = json.loads((place / "config.json").read_text())
    assert (settings["num_hidden_layers"], settings["hidden_size"], settings["intermediate_size"]) == (
        2,
        16,
        32,
    )
    expected = _hidden(student)[-1]
    torch.testing.assert_close(loaded(IDS, attention_mask=MASK).last_hidden_state, expected)


def test_a_width_that_cannot_be_is_refused(deep_encoder: Path, tiny_causal: Path) -> None:
    for size in (15, 32, 64):
        with pytest.raises(ModelError, match="multiple of 2 heads below 32"):
            narrow(_load(deep_encoder), size)
    with pytest.raises(ModelError, match="BERT encoders"):
        narrow(_load(tiny_causal, "causal"), 16)


def test_models_that_cannot_teach_each_other_are_refused(deep_encoder: Path, tmp_path: Path) -> None:
    teacher, student = _load(deep_encoder), _load(deep_encoder)
    check_pair(teacher, student, attention=True)

    keep_layers(teacher, (0,))
    with pytest.raises(ModelError, match="4 layers, the teacher only 1"):
        check_pair(teacher, student, attention=True)

    student.module.backbone.config.num_attention_heads = 4
    teacher = _load(deep_encoder)
    check_pair(teacher, student, attention=False)
    with pytest.raises(ModelError, match=r"2 and 4 attention heads.*fedkd.attention = false"):
        check_pair(teacher, student, attention=True)

    other = tmp_path / "other"
    shutil.copytree(deep_encoder, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"apple"', '"orange"'))
    with pytest.raises(ModelError, match="different tokenizers"):
        check_pair(teacher, _load(other), attention=True)

    other_classes = models.load(teacher.config, ("x", "y"))
    with pytest.raises(ModelError, match="same task and classes"):
        check_pair(teacher, other_classes, attention=True)


def test_a_student_of_its_own_is_not_narrowed(start: Start, tiny_encoder: Path) -> None:
    with pytest.raises(ConfigError, match="width"):
        start(student=str(tiny_encoder), width=16)
    own = start(student=str(tiny_encoder))
    assert depth(own.student) == 2
