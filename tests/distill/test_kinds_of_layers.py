"""Students of models whose layers differ in kind: what is saved is what was trained, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.errors import ModelError
from fedllm.models.readback import require_true
from fedllm.models.saving import save
from server.rounds.rehearsal import few_texts, rehearse
from strategies.session import Session
from tests.conftest import save_tokenizer
from tests.rounds.federation import configuration

ENDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def modernbert(size: int) -> Any:
    from transformers import ModernBertConfig, ModernBertModel

    return ModernBertModel(
        ModernBertConfig(
            vocab_size=size,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            local_attention=4,
            global_attn_every_n_layers=3,
            cls_token_id=2,
            sep_token_id=3,
            **ENDS,
        )
    )


def deepseek(size: int) -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=2,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            **ENDS,
        )
    )


def session_of(made: Any, task: str, texts: Path, folder: Path, layers: tuple[int, ...]) -> Session:
    size = save_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = made(size)
        with torch.no_grad():
            for parameter in model.parameters():  # norms too: at ones they would not be missed
                parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(folder)
    options = {"layers": layers, "teacher": False}
    base = {"name": str(folder), "task": task}
    return Session(configuration(folder, texts, method="fedkd", model=base, options=options))


@pytest.mark.parametrize(
    ("made", "task", "layers"),
    [
        pytest.param(modernbert, "classification", (0, 3), marks=pytest.mark.slow),
        (modernbert, "classification", (0, 2, 3)),
        (deepseek, "causal", (1, 3)),
        pytest.param(deepseek, "causal", (2, 3), marks=pytest.mark.slow),
    ],
)
def test_a_student_keeps_the_kinds_of_its_layers(
    tiny_texts: Path, tmp_path: Path, made: Any, task: str, layers: tuple[int, ...]
) -> None:
    session = session_of(made, task, tiny_texts, tmp_path / "base", layers)
    rehearse(session)
    place = save(session.model, tmp_path)
    require_true(session.model, place, few_texts(session).whole())
    kept = json.loads((place / "config.json").read_text())
    assert kept["num_hidden_layers"] == len(layers)


def test_a_student_that_could_not_be_saved_is_refused(tiny_texts: Path, tmp_path: Path) -> None:
    # ModernBERT's first layer has no norm before its attention; another one in its place would lose its own.
    session = session_of(modernbert, "classification", tiny_texts, tmp_path / "base", (1, 3))
    with pytest.raises(ModelError, match=r"fedkd.layers = \(1, 3\): layers of .* by their places"):
        rehearse(session)


def test_an_output_matrix_of_its_own_does_not_travel(tiny_texts: Path, tmp_path: Path) -> None:
    session = session_of(deepseek, "causal", tiny_texts, tmp_path / "base", (1, 3))
    assert session.model.module.backbone.lm_head.weight.shape == (35, 32)  # type: ignore[union-attr]
    assert not any("lm_head" in name or "embed_tokens" in name for name in session.initial)
