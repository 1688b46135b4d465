"""Every estimator against backpropagation, for every kind of trained tensor of every kind of model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from fedllm.config import RunConfig
from fedllm.data.tokens import Batch, Tokens
from fedllm.models.model import Model
from fedllm.models.network import Network
from strategies.forward.activations import ActivationCache
from strategies.forward.directions import Direction, flat
from strategies.forward.slopes import Estimator, batch_loss, settled, slopes
from strategies.session import Session
from tests.parts import quick, task_of

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
LLAMA = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 64, "bos_token_id": 2, "eos_token_id": 3}
DIRECTIONS = [Direction(0, 1, 2, i) for i in range(5)]


def llama(vocabulary: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **LLAMA, tie_word_embeddings=False))


def gpt2(vocabulary: int) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=2, eos_token_id=3
    )
    assert config.tie_word_embeddings
    return GPT2LMHeadModel(config)


LORA = {"peft": "lora", "rank": 2}
TUNINGS: dict[str, dict[str, dict[str, Any]]] = {
    "encoder": {
        "full": {"peft": "full"},
        "lora": {**LORA, "targets": ("query", "value")},
        "lora on embeddings": {**LORA, "targets": ("word_embeddings", "query")},
        "top layer": {**LORA, "targets": ("layer.1.attention.self.query",)},
        "bitfit": {"peft": "bitfit"},
        "bottleneck": {"peft": "bottleneck", "rank": 2},
        "head": {"peft": "head"},
        "norms": {"peft": "ln-tuning", "targets": ("LayerNorm",)},
    },
    "tied llama": {
        "full": {"peft": "full"},
        "lora": {**LORA, "targets": ("q_proj", "v_proj")},
        "lora on the output matrix": {**LORA, "targets": ("lm_head", "q_proj")},
        "lora on embeddings": {**LORA, "targets": ("embed_tokens", "q_proj")},
        "top layer": {**LORA, "targets": ("layers.1.self_attn.q_proj",)},
        "bitfit": {"peft": "bitfit"},
        "biases behind the output matrix": {"peft": "bitfit", "targets": ("lm_head",)},
        "bottleneck": {"peft": "bottleneck", "rank": 2},
        "norms": {"peft": "ln-tuning"},
    },
    "gpt2": {
        "full": {"peft": "full"},
        "lora": {**LORA, "targets": ("c_attn",), "options": {"fan_in_fan_out": True}},
        "lora on the output matrix": {**LORA, "targets": ("lm_head",)},
        "top layer": {**LORA, "targets": ("h.1.attn.c_attn",), "options": {"fan_in_fan_out": True}},
        "bitfit": {"peft": "bitfit"},
        "norms": {"peft": "ln-tuning", "targets": ("ln_1", "ln_2", "ln_f")},
    },
}
TUNINGS["untied llama"] = TUNINGS["tied llama"]
CASES = [(base, kind) for base, kinds in TUNINGS.items() for kind in kinds]


@pytest.fixture(scope="session")
def folders(
    tiny_encoder: Path, tiny_causal: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A folder to load each base from."""
    found = {"encoder": tiny_encoder, "tied llama": tiny_causal}
    makers: dict[str, Callable[[int], PreTrainedModel]] = {"untied llama": llama, "gpt2": gpt2}
    for name, make in makers.items():
        found[name] = tmp_path_factory.mktemp(name.replace(" ", "-"))
        for file in tiny_causal.glob("token*"):
            shutil.copy(file, found[name])
        vocabulary = AutoConfig.from_pretrained(tiny_causal).vocab_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            make(vocabulary).save_pretrained(found[name])
    return found


Opened = tuple[Model, Tokens]


@pytest.fixture(scope="session")
def opened(folders: dict[str, Path], tiny_texts: Path) -> Callable[[str, str], Opened]:
    """Load a base with what is trained on it, away from the special values that adapters start from."""

    @cache
    def once(base: str, kind: str) -> Opened:
        config = RunConfig.model_validate(
            {
                "clients": 1,
                "model": {
                    "name": str(folders[base]),
                    "task": "classification" if base == "encoder" else "causal",
                },
                "data": {"path": str(tiny_texts), "max_length": 12},
                "method": "fedavg" if kind == "full" else "fwdllm",
                "tuning": TUNINGS[base][kind],
            }
        )
        session = Session(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in session.model.trainable().values():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        return session.model, session.client_tokens(0)[0].subset(np.arange(20))

    return once


SOME = np.array([3, 0, 7, 12])


def projections(model: Model, batch: Batch) -> np.ndarray:
    """The oracle: reverse mode on the loss that training uses, projected on every direction."""
    parameters = model.trainable()
    model.module.eval()
    with torch.enable_grad():
        gradients = torch.autograd.grad(model.loss(batch), list(parameters.values()))
    truth = torch.cat([gradient.double().reshape(-1) for gradient in gradients]).numpy()
    assert np.linalg.norm(truth) > 0
    return np.array([flat(v, len(truth)) @ truth for v in DIRECTIONS])


def measured(model: Model, batch: Batch, estimator: Estimator, at_once: int, parallel: int) -> np.ndarray:
    loss = batch_loss(model, batch, at_once)
    tensors = {name: p.detach() for name, p in model.trainable().items()}
    with settled(model.module):
        return slopes(estimator, loss, tensors, DIRECTIONS, parallel=parallel)


def close(model: Model, batch: Batch, want: np.ndarray) -> float:
    """Five percent, and what differences of float32 losses over 2 h cannot tell from zero."""
    values = torch.cat([p.detach().double().reshape(-1) for p in model.trainable().values()])
    step = 1e-2 * float(values.norm()) / len(values) ** 0.5
    with settled(model.module):
        rounding = 2**-22 * float(model.loss(batch)) / step
    return float(0.05 * np.linalg.norm(want)) + rounding * len(want) ** 0.5


WAYS = [(64, 1), (3, 1), (5, 3)]
ONE_WAY_EACH = [(*case, *WAYS[number % 3]) for number, case in enumerate(CASES)]
"""How a loss is taken apart and what is tuned know nothing of each other: no need of every pair."""


@pytest.mark.parametrize(("base", "kind", "at_once", "parallel"), quick(ONE_WAY_EACH, *ONE_WAY_EACH[::7]))
def test_jvp_is_the_gradients_projection(
    opened: Callable[[str, str], Opened], base: str, kind: str, at_once: int, parallel: int
) -> None:
    """One direction at a time or several, all logits at once or few."""
    model, texts = opened(base, kind)
    want = projections(model, texts.batch(SOME))
    got = measured(model, texts.batch(SOME), "jvp", at_once, parallel)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(("base", "kind"), quick(CASES, *CASES[::10]))
def test_antithetic_is_close_to_it(opened: Callable[[str, str], Opened], base: str, kind: str) -> None:
    model, texts = opened(base, kind)
    want = projections(model, texts.batch(SOME))
    got = measured(model, texts.batch(SOME), "antithetic", 3, 1)
    assert np.linalg.norm(got - want) < close(model, texts.batch(SOME), want)


@pytest.mark.parametrize("estimator", ["jvp", "antithetic"])
@pytest.mark.parametrize(("base", "kind"), [case for case in CASES if case[1] in ("top layer", "head")])
def test_cached_activations_leave_slopes_as_they_are(
    opened: Callable[[str, str], Opened], base: str, kind: str, estimator: Estimator
) -> None:
    model, texts = opened(base, kind)
    shortcut = ActivationCache(2**20).open(model, texts)
    assert shortcut.stack.frozen
    want = projections(model, texts.batch(SOME))
    loss = batch_loss(model, texts.batch(SOME))
    tensors = {name: p.detach() for name, p in model.trainable().items()}
    with settled(model.module), shortcut.resumed(SOME):
        got = slopes(estimator, loss, tensors, DIRECTIONS, parallel=3)
    exact = estimator == "jvp"
    within = 1e-4 * np.linalg.norm(want) if exact else close(model, texts.batch(SOME), want)
    assert np.linalg.norm(got - want) < within


def test_logits_that_a_model_changes_afterwards_are_made_whole() -> None:
    """Gemma-2 caps its logits by a hyperbolic tangent: parts of them must be capped too."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=50, **SIZES, num_key_value_heads=2, intermediate_size=64, head_dim=8,
        final_logit_softcapping=0.5, attn_implementation="eager", initializer_range=0.3,
    )  # fmt: skip
    backbone, task = Gemma2ForCausalLM(config), task_of("causal")
    model = Model(Network(backbone, "causal", task=task), None, task, (), RunConfig())
    ids = torch.randint(5, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids, torch.ones_like(ids), ids)
    want = projections(model, batch)
    got = measured(model, batch, "jvp", 4, 2)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    with torch.no_grad(), settled(model.module):
        values = {name: p.detach() for name, p in model.trainable().items()}
        torch.testing.assert_close(batch_loss(model, batch, 4)(values), model.loss(batch))
