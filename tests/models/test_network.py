"""Loss, logits and inner values agree with transformers' own and with closed forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call, jvp

from fedllm.config import DataConfig, ModelConfig, RunConfig, TrainingConfig, TuningConfig
from fedllm.data.corpus import load as load_texts
from fedllm.data.tokens import Batch, Tokens
from fedllm.models.model import Model, load
from tests.parts import quick

Build = Callable[..., Model]


@pytest.fixture
def build(tiny_encoder: Path, tiny_causal: Path, tiny_texts: Path) -> Build:
    def build(peft: str = "lora", pooling: Any = "mean", training: Any = None, **settings: Any) -> Model:
        task = "causal" if pooling == "causal" else "classification"
        base = tiny_causal if task == "causal" else tiny_encoder
        model: dict[str, Any] = {"name": str(base), "task": task, **settings}
        if task == "classification":
            model["pooling"] = pooling
        config = RunConfig(
            model=ModelConfig(**model),
            data=DataConfig(path=str(tiny_texts), max_length=12),
            tuning=TuningConfig(peft=peft, rank=4),
            training=TrainingConfig(**(training or {})),
        )
        return load(config, ("animal", "fruit", "metal"))

    return build


def tokens_of(model: Model) -> Tokens:
    return model.task.encode(load_texts(model.config.data, model.task), model.tokenizer, 12)


def batch_of(model: Model, count: int = 6) -> Batch:
    return tokens_of(model).batch(range(count))


def test_mean_pooling_is_the_scaled_unit_mean_over_text(build: Build) -> None:
    from transformers import AutoModel

    model = build()
    batch = batch_of(model)
    base = AutoModel.from_pretrained(model.config.model.name)
    hidden = base(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    rows = []
    for row, mask in zip(hidden, batch.attention_mask, strict=True):
        mean = row[: int(mask.sum())].mean(0)
        rows.append(mean / mean.norm() * 32**0.5)
    head = model.module.head
    assert head is not None
    expected = torch.stack(rows) @ head.weight.T + head.bias
    output = model.forward(batch)
    torch.testing.assert_close(output.logits, expected)
    assert output.loss is not None
    log_probabilities = expected.log_softmax(-1)[range(6), batch.labels]
    torch.testing.assert_close(output.loss, -log_probabilities.mean())
    torch.testing.assert_close(
        model.module.features(batch.input_ids, batch.attention_mask), torch.stack(rows)
    )


def test_cls_pooling_looks_at_the_first_token(build: Build) -> None:
    model = build(pooling="cls")
    batch = batch_of(model)
    hidden = model.forward(batch, hidden_states=True).hidden_states
    assert hidden is not None
    features = model.module.features(batch.input_ids, batch.attention_mask)
    cosine = torch.nn.functional.cosine_similarity(features, hidden[-1][:, 0])
    torch.testing.assert_close(cosine, torch.ones(6))
    torch.testing.assert_close(features.norm(dim=-1), torch.full((6,), 32**0.5))


@pytest.mark.parametrize("pooling", ["own", "causal"])
def test_own_heads_give_transformers_own_loss(build: Build, pooling: str) -> None:
    model = build(pooling=pooling)
    batch = batch_of(model)
    backbone: Any = model.module.backbone
    stock = backbone.get_base_model()(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    )
    output = model.forward(batch)
    torch.testing.assert_close(output.loss, stock.loss)
    torch.testing.assert_close(output.logits, stock.logits)


@pytest.mark.parametrize("pooling", ["mean", "own", "causal"])
def test_padding_changes_nothing(build: Build, pooling: str) -> None:
    model = build(pooling=pooling)
    tokens = tokens_of(model)
    short, long = int(tokens.lengths.argmin()), int(tokens.lengths.argmax())
    length = int(tokens.lengths[short])
    assert length < tokens.lengths[long]
    alone = model.forward(tokens.batch([short])).logits
    beside = model.forward(tokens.batch([short, long])).logits[:1]
    if pooling == "causal":
        beside = beside[:, :length]
    torch.testing.assert_close(beside, alone)


@pytest.mark.parametrize("pooling", ["mean", "own", "causal"])
@pytest.mark.parametrize("peft", ["lora", "full"])
def test_inner_values_on_request(build: Build, pooling: str, peft: str) -> None:
    model = build(peft=peft, pooling=pooling)
    batch = batch_of(model)
    width = batch.input_ids.shape[1]
    output = model.forward(batch, hidden_states=True, attentions=True)
    assert output.hidden_states is not None
    assert output.attentions is not None
    assert [tuple(h.shape) for h in output.hidden_states] == [(6, width, 32)] * 3
    heads = 4 if pooling == "causal" else 2
    assert [tuple(a.shape) for a in output.attentions] == [(6, heads, width, width)] * 2
    sums = output.attentions[0].sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    plain = model.forward(batch)
    assert plain.hidden_states is plain.attentions is None
    torch.testing.assert_close(plain.logits, output.logits)
    backbone: Any = model.module.backbone
    assert backbone.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("pooling", ["mean", "causal"])
@pytest.mark.parametrize("peft", ["prompt", "p-tuning", "prefix"])
def test_virtual_tokens_do_not_show(build: Build, peft: str, pooling: str) -> None:
    model = build(peft=peft, pooling=pooling)
    batch = batch_of(model)
    width = batch.input_ids.shape[1]
    output = model.forward(batch, hidden_states=True)
    assert output.hidden_states is not None
    assert {tuple(h.shape) for h in output.hidden_states} == {(6, width, 32)}
    assert output.logits.shape[:2] == ((6, width) if pooling == "causal" else (6, 3))


def test_dropout_acts_in_training_only(build: Build) -> None:
    for pooling in ("mean", "causal"):
        model = build(pooling=pooling, dropout=0.5)
        batch = batch_of(model)
        assert not torch.equal(model.forward(batch).logits, model.forward(batch).logits)
        model.module.eval()
        assert torch.equal(model.forward(batch).logits, model.forward(batch).logits)


def test_no_dropout_by_default(build: Build) -> None:
    model = build()
    assert model.module.training
    batch = batch_of(model)
    assert torch.equal(model.forward(batch).logits, model.forward(batch).logits)


@pytest.mark.parametrize("memory", ["checkpoint", "lean"])
@pytest.mark.parametrize("peft", quick(["lora", "full", "prompt"], "lora"))
@pytest.mark.parametrize("pooling", ["mean", "causal"])
def test_checkpointing_recomputes_and_gives_the_same_gradients(
    build: Build, peft: str, pooling: str, memory: str
) -> None:
    """With the same dropout, drawn again."""
    gradients, calls = [], []
    for way in ("plain", memory):
        model = build(peft=peft, pooling=pooling, training={"memory": way}, dropout=0.2)
        layers = [m for n, m in model.module.named_modules() if n.endswith(("layer.1", "layers.1"))]
        count: list[int] = []
        inner = next(m for m in layers[0].modules() if isinstance(m, torch.nn.Linear))
        inner.register_forward_hook(lambda *_, count=count: count.append(1))
        torch.manual_seed(0)
        model.loss(batch_of(model)).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        gradients.append([p.grad for p in model.trainable().values()])
        calls.append(len(count))
    assert calls == [1, 2]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("pooling", ["mean", "own", "causal"])
def test_functional_call_has_a_forward_derivative(build: Build, pooling: str) -> None:
    """The slope along a direction equals the gradient's inner product with it."""
    model = build(pooling=pooling)
    batch = batch_of(model)
    values = {n: p.detach() + 0.02 for n, p in model.trainable().items()}
    direction = {n: torch.ones_like(v) for n, v in values.items()}

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        output = functional_call(model.module, parameters, kwargs=batch._asdict())
        result: torch.Tensor = output.loss
        return result

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, slope = jvp(loss, (values,), (direction,))
    model.write(values)
    output = model.forward(batch)
    assert output.loss is not None
    output.loss.backward()
    expected = sum(p.grad.sum() for p in model.trainable().values() if p.grad is not None)
    torch.testing.assert_close(slope, expected)
