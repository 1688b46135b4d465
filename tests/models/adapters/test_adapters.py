"""Every peft method by name: it trains, loads with plain peft, and its mistakes are explained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from fedllm.config import DataConfig, ModelConfig, RunConfig, TuningConfig
from fedllm.data.corpus import load as load_texts
from fedllm.errors import ModelError
from fedllm.models.evaluation import evaluate
from fedllm.models.model import Model, load
from fedllm.models.saving import save
from tests.parts import quick, task_of

Configure = Callable[..., RunConfig]

pytestmark = [
    # What peft does inside its own from_pretrained is not ours to mend.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor:UserWarning"),
]

METHODS = ["lora", "dora", "rslora", "vera", "ia3", "adalora", "loha", "boft", "oft"]
PROMPTS = ["prompt", "prefix", "p-tuning"]


@pytest.fixture
def configure(tiny_encoder: Path, tiny_causal: Path, tiny_texts: Path) -> Configure:
    def configure(method: str, pooling: Any = "mean", dtype: Any = "float32", **tuning: Any) -> RunConfig:
        causal = pooling == "causal"
        base = ModelConfig(
            name=str(tiny_causal if causal else tiny_encoder),
            task="causal" if causal else "classification",
            pooling="mean" if causal else pooling,
            dtype=dtype,
        )
        data = DataConfig(path=str(tiny_texts), max_length=12)
        return RunConfig(model=base, data=data, tuning=TuningConfig(peft=method, rank=4, **tuning))

    return configure


def build(config: RunConfig) -> tuple[Model, Any]:
    corpus = load_texts(config.data, task_of(config.model.task))
    model = load(config, corpus.label_names)
    return model, model.task.encode(corpus, model.tokenizer, 12)


def train(model: Model, tokens: Any, steps: int, rate: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=rate)
    for step in range(steps):
        output = model.forward(tokens.batch(np.arange(step * 16, step * 16 + 16) % len(tokens)))
        assert output.loss is not None
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()


def pairs() -> list[tuple[str, str]]:
    """Every method with every kind of head; no encoder's own head knows a prefix."""
    every = [(m, p) for m in [*METHODS, *PROMPTS, "full"] for p in ("mean", "own", "causal")]
    return [pair for pair in every if pair != ("prefix", "own")]


def mark(*values: str) -> Any:
    """One method of each family runs in the quick part."""
    tried = values[0] in ("lora", "prompt", "full")
    return pytest.param(*values, marks=() if tried else pytest.mark.slow)


@pytest.mark.parametrize(
    ("method", "pooling", "dtype"),
    quick(
        [(*pair, ("float32", "bfloat16")[number % 2]) for number, pair in enumerate(pairs())],
        ("lora", "mean", "float32"),
        ("full", "causal", "bfloat16"),
    ),
)
def test_trains_on_any_base_precision(configure: Configure, method: str, pooling: str, dtype: str) -> None:
    model, tokens = build(configure(method, pooling, dtype))
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    frozen = {p.dtype for p in model.module.parameters() if not p.requires_grad and p.is_floating_point()}
    assert frozen <= {getattr(torch, dtype), torch.float32}
    if method != "full":
        assert getattr(torch, dtype) in frozen
    before = model.read()
    seen = tokens.subset(range(96))
    start = evaluate(model, seen, 32)["loss"]
    if method in PROMPTS:
        # Virtual tokens that were never seen need longer, above all under a head that starts at random.
        train(model, tokens, steps=60, rate=3e-2)
    else:
        train(model, tokens, steps=6)
    assert evaluate(model, seen, 32)["loss"] < start
    after = model.read()
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("method", "pooling"), [mark(*pair) for pair in pairs() if pair[0] != "full"])
def test_adapter_loads_with_plain_peft(
    configure: Configure, method: str, pooling: str, tmp_path: Path
) -> None:
    import transformers

    model, tokens = build(configure(method, pooling))
    train(model, tokens, steps=2)
    place = save(model, tmp_path)
    assert place == tmp_path / "adapter"
    kind: Any = {
        "own": transformers.AutoModelForSequenceClassification,
        "causal": transformers.AutoModelForCausalLM,
    }.get(pooling, transformers.AutoModel)
    extra = {"num_labels": 3} if pooling == "own" else {}
    base = kind.from_pretrained(model.config.model.name, **extra)
    stock = peft.PeftModel.from_pretrained(base, str(place)).eval()
    batch = tokens.batch(range(5))
    raw = stock(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    if pooling == "mean":
        head = load_file(place / "head.safetensors")
        hidden = raw.last_hidden_state[:, -batch.input_ids.shape[1] :]
        mean = (hidden * batch.attention_mask[..., None]).sum(1)
        logits = mean / mean.norm(dim=-1, keepdim=True) * 32**0.5 @ head["weight"].T + head["bias"]
    else:
        logits = raw.logits
    if pooling == "causal":
        logits = logits[:, -batch.input_ids.shape[1] :]
    model.module.eval()
    torch.testing.assert_close(model.forward(batch).logits, logits)


@pytest.mark.parametrize(
    "method", quick(["lora", "dora", "vera", "ia3", "prompt", "prefix", "p-tuning"], "lora", "prompt")
)
@pytest.mark.parametrize("pooling", ["mean", "causal"])
def test_every_trained_tensor_reaches_the_loss(configure: Configure, method: str, pooling: str) -> None:
    model, tokens = build(configure(method, pooling))
    generator = torch.Generator().manual_seed(0)
    start = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in model.read().items()}
    batch = tokens.batch(range(8))
    model.write(start)
    loss = model.forward(batch).loss
    for name, tensor in start.items():
        # Half a step along random signs, so that no symmetry (softmax, normalisation) hides the change.
        changed = tensor + 0.5 * torch.randn(tensor.shape, generator=generator)
        model.write(start | {name: changed})
        assert model.forward(batch).loss != loss, name


def test_rank_alpha_targets_and_options_reach_peft(configure: Configure) -> None:
    config = configure("lora", alpha=12.0, targets=("query", "dense"), options={"lora_dropout": 0.25})
    model, _ = build(config)
    settings: Any = model.module.backbone.peft_config["default"]  # type: ignore[union-attr, index]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (4, 12.0, 0.25)
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in model.trainable() if ".lora_" in name}
    assert names == {"query", "dense"}


def test_adapter_on_dense_loads_on_a_model_with_a_pooler(configure: Configure, tmp_path: Path) -> None:
    from transformers import AutoModel

    model, _ = build(configure("lora", targets=("query", "dense")))
    place = save(model, tmp_path)
    base = AutoModel.from_pretrained(model.config.model.name)
    assert base.pooler is not None
    stock = peft.PeftModel.from_pretrained(base, str(place))
    adapted = [name for name, _ in stock.named_parameters() if "lora_A" in name]
    assert len(adapted) == 2 * 4  # per layer: query, and dense after attention, in between and at the end
    assert not any("pooler" in name for name in adapted)


def test_new_head_travels_with_the_adapter(configure: Configure) -> None:
    model, _ = build(configure("lora", "own"))
    assert any("classifier" in name for name in model.trainable())


def test_trained_tensors_depend_on_the_seed_only(configure: Configure) -> None:
    config = configure("lora")
    torch.manual_seed(1)
    first = build(config)[0].read()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = build(config)[0].read()
    assert torch.equal(torch.get_rng_state(), before)
    assert list(first) == sorted(first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build(config.model_copy(update={"seed": 1}))[0].read()
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert first.keys() == other.keys()


@pytest.mark.parametrize(
    ("method", "tuning", "words"),
    [
        ("lorra", {}, ["tuning.peft = 'lorra'", "did you mean lora?"]),
        ("promt", {}, ["did you mean prompt?"]),
        ("ful", {}, ["did you mean full?"]),
        ("poly", {}, ["tuning.peft = 'poly' is unknown"]),
        ("lora", {"targets": ("q_proj",)}, ["'q_proj'", "dense, key", "query, token_type_embeddings, value"]),
        ("lora", {"targets": ("query", "valeu")}, ["'valeu'"]),
        ("lora", {"options": {"lora_dropuot": 0.1}}, ["tuning.options.lora_dropuot", "lora_dropout?"]),
        ("prompt", {"targets": ("query",)}, ["tuning.targets", "'prompt'"]),
        ("ln-tuning", {}, ["target_modules", "its modules are", "LayerNorm"]),
        ("c3a", {}, ["'c3a' cannot be attached", "block size"]),
    ],
)
def test_mistakes_are_explained(
    configure: Configure, method: str, tuning: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        load(configure(method, **tuning), ("a", "b"))
    for word in words:
        assert word in str(caught.value)


def test_a_prompt_that_the_model_cannot_take_is_found_at_once(configure: Configure) -> None:
    with pytest.raises(ModelError, match=r"'prefix' does not work on .* model.pooling = 'own'"):
        load(configure("prefix", "own"), ("a", "b"))
