"""BitFit and bottleneck adapters: where they sit, what they add, how they travel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fedllm.config import DataConfig, ModelConfig, RunConfig, TrainingConfig, TuningConfig
from fedllm.data.corpus import load as load_texts
from fedllm.errors import ModelError
from fedllm.models import extra_adapters
from fedllm.models.model import Model, load
from fedllm.models.saving import save
from fedllm.tensors import fingerprint
from tests.parts import quick, task_of

Build = Callable[..., tuple[Model, Any]]

NAMES = ["bitfit", "bottleneck"]
POOLINGS = ["mean", "own", "causal"]


@pytest.fixture
def build(tiny_encoder: Path, tiny_causal: Path, tiny_texts: Path) -> Build:
    def build(name: str, pooling: Any = "mean", dtype: Any = "float32", **tuning: Any) -> tuple[Model, Any]:
        causal = pooling == "causal"
        config = RunConfig(
            model=ModelConfig(
                name=str(tiny_causal if causal else tiny_encoder),
                task="causal" if causal else "classification",
                pooling="mean" if causal else pooling,
                dtype=dtype,
            ),
            data=DataConfig(path=str(tiny_texts), max_length=12),
            tuning=TuningConfig(peft=name, rank=4, **tuning),
            training=TrainingConfig(gradient_checkpointing=dtype == "bfloat16"),
        )
        corpus = load_texts(config.data, task_of(config.model.task))
        model = load(config, corpus.label_names)
        return model, model.task.encode(corpus, model.tokenizer, 12)

    return build


def train(model: Model, tokens: Any, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model.forward(tokens.batch(range(16))).loss
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def plain(model: Model, pooling: str) -> Any:
    """The base model as transformers loads it."""
    import transformers

    kind: Any = {
        "own": transformers.AutoModelForSequenceClassification,
        "causal": transformers.AutoModelForCausalLM,
    }.get(pooling, transformers.AutoModel)
    extra = {"num_labels": 3} if pooling == "own" else {}
    return kind.from_pretrained(
        model.config.model.name, dtype=getattr(torch, model.config.model.dtype), **extra
    )


def trained_places(model: Model) -> set[str]:
    names = (name.removeprefix("backbone.") for name in model.trainable())
    return {name.split(".small_adapter.")[0] for name in names if ".small_adapter." in name}


@pytest.mark.parametrize("dtype", quick(["float32", "bfloat16"], "bfloat16"))
@pytest.mark.parametrize("pooling", quick(POOLINGS, "causal"))
@pytest.mark.parametrize("name", NAMES)
def test_it_starts_as_the_base_model_and_trains(build: Build, name: str, pooling: str, dtype: str) -> None:
    model, tokens = build(name, pooling, dtype)
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    batch = tokens.batch(range(5))
    if pooling != "own":  # the new head starts at random
        backbone: Any = model.module.eval().backbone
        base = plain(model, pooling).eval()
        with torch.no_grad():
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            assert torch.equal(backbone(**inputs)[0], base(**inputs)[0])
    losses = train(model, tokens, steps=8)
    assert losses[-1] < losses[0]


def test_bitfit_is_every_bias_of_an_encoder(build: Build) -> None:
    model, _ = build("bitfit")
    biases = {
        n.removesuffix(".bias") for n, _ in plain(model, "mean").named_parameters() if n.endswith("bias")
    }
    assert trained_places(model) == {n for n in biases if "pooler" not in n}
    assert sum(p.numel() for n, p in model.trainable().items() if "backbone" in n) == sum(
        p.numel()
        for n, p in plain(model, "mean").named_parameters()
        if n.endswith("bias") and "pooler" not in n
    )


def test_bitfit_moves_the_output_as_a_bias_of_the_base_would(build: Build) -> None:
    model, tokens = build("bitfit")
    train(model, tokens, steps=3)
    base = plain(model, "mean").eval()
    changes = {n: p for n, p in model.trainable().items() if "small_adapter" in n}
    with torch.no_grad():
        for name, change in changes.items():
            place = name.removeprefix("backbone.").split(".small_adapter.")[0]
            base.get_submodule(place).bias += change
        batch = tokens.batch(range(5))
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        backbone: Any = model.module.eval().backbone
        torch.testing.assert_close(backbone(**inputs)[0], base(**inputs)[0], rtol=1e-4, atol=1e-5)


def test_a_model_without_biases_gets_them_behind_its_linear_layers(build: Build) -> None:
    model, _ = build("bitfit", "causal")
    linear = {n for n, m in plain(model, "causal").named_modules() if isinstance(m, nn.Linear)}
    assert trained_places(model) == linear - {"lm_head"}


def test_a_bottleneck_follows_each_layers_feed_forward_block(build: Build) -> None:
    encoder, _ = build("bottleneck")
    assert trained_places(encoder) == {f"encoder.layer.{n}.output.dense" for n in range(2)}
    decoder, _ = build("bottleneck", "causal")
    assert trained_places(decoder) == {f"model.layers.{n}.mlp.down_proj" for n in range(2)}
    assert sum(p.numel() for p in decoder.trainable().values()) == 2 * (32 * 4 + 4 + 4 * 32 + 32)


def test_a_bottleneck_adds_what_its_two_layers_make(build: Build) -> None:
    adapter = extra_adapters.Bottleneck(6, 2)
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(3, 5, 6, generator=generator)
    assert torch.equal(adapter(y), y)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    down, _, up = adapter.default
    x = (y @ down.weight.T + down.bias).double()
    gelu = (x * 0.5 * (1 + torch.erf(x / 2**0.5))).float()
    torch.testing.assert_close(adapter(y), y + gelu @ up.weight.T + up.bias)
    assert adapter(y.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("targets", "places"),
    [
        (
            ("output.dense",),
            {f"encoder.layer.{n}.{m}output.dense" for n in (0, 1) for m in ("", "attention.")},
        ),
        (("layer.1.output.dense",), {"encoder.layer.1.output.dense"}),
        (
            ("all-linear",),
            {
                f"encoder.layer.{n}.{m}"
                for n in (0, 1)
                for m in (
                    *(f"attention.self.{part}" for part in ("query", "key", "value")),
                    *(f"{part}.dense" for part in ("attention.output", "intermediate", "output")),
                )
            },
        ),
    ],
)
def test_targets_say_where(build: Build, targets: tuple[str, ...], places: set[str]) -> None:
    for name in NAMES:
        assert trained_places(build(name, targets=targets)[0]) == places


@pytest.mark.parametrize("pooling", quick(POOLINGS, "mean"))
@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_folder_loads_on_the_plain_base_model(
    build: Build, name: str, pooling: str, tmp_path: Path
) -> None:
    model, tokens = build(name, pooling)
    train(model, tokens, steps=2)
    place = save(model, tmp_path)
    assert place == tmp_path / "adapter"
    assert (place / "head.safetensors").exists() == (pooling == "mean")
    again = extra_adapters.load(plain(model, pooling), place).eval()
    backbone: Any = model.module.eval().backbone
    batch = tokens.batch(range(5))
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        assert torch.equal(again(**inputs)[0], backbone(**inputs)[0])
    stored = load_file(place / "adapter_model.safetensors")
    trained = {n.removeprefix("backbone."): t for n, t in model.read().items() if n.startswith("backbone.")}
    assert fingerprint(stored) == fingerprint(trained)


def test_a_folder_of_another_kind_or_model_is_refused(build: Build, tmp_path: Path) -> None:
    model, _ = build("bitfit")
    with pytest.raises(ModelError, match="holds no adapter of bitfit or bottleneck"):
        extra_adapters.load(plain(model, "mean"), tmp_path)
    place = save(model, tmp_path)
    decoder, _ = build("lora", "causal")
    with pytest.raises(ModelError, match=r"made for another model|finds nothing"):
        extra_adapters.load(plain(decoder, "causal"), place)


@pytest.mark.parametrize(
    ("name", "tuning", "words"),
    [
        ("bitfti", {}, "did you mean bitfit"),
        ("bitfit", {"targets": ("queri",)}, "has no module 'queri'"),
        ("bitfit", {"targets": ("attention",)}, "finds nothing in BertModel"),
        ("bottleneck", {"options": {"size": 3}}, "tuning.options.size is unknown to bottleneck"),
        ("head", {"targets": ("query",)}, "leave tuning.targets empty"),
        ("head", {"pooling": "causal"}, 'task = "causal" has none'),
    ],
)
def test_mistakes_are_explained(build: Build, name: str, tuning: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        build(name, **tuning)


@pytest.mark.parametrize(
    ("pooling", "names"),
    [
        ("mean", {"head.weight", "head.bias"}),
        ("own", {"backbone.classifier.weight", "backbone.classifier.bias"}),
    ],
)
def test_the_head_alone_can_be_trained(build: Build, pooling: str, names: set[str]) -> None:
    model, tokens = build("head", pooling)
    assert model.trainable().keys() == names
    losses = train(model, tokens, steps=4)
    assert losses[-1] < losses[0]


def test_trained_tensors_depend_on_the_seed_only(build: Build) -> None:
    torch.manual_seed(1)
    first = build("bottleneck")[0].read()
    torch.manual_seed(2)
    second = build("bottleneck")[0].read()
    assert fingerprint(first) == fingerprint(second)
    assert any(np.ptp(t.numpy()) > 0 for n, t in first.items() if "down.weight" in n)
