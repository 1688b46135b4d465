"""Tiny models of many architectures, built in code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Architecture = Callable[[str], Path]
"""Returns the folder of a tiny checkpoint by its transformers class; see the fixture of that name."""

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_POOLED = {"pad_token_id": 0, **_SIZES}
_GENERATIVE = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, **_SIZES}
_ENCODER_DECODER = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
_BART: dict[str, Any] = {
    **_ENCODER_DECODER,
    **{
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    },
    "d_model": 32,
    "max_position_embeddings": 64,
}
_GROUPED = {**_GENERATIVE, "num_key_value_heads": 2}

_T5 = {**_ENCODER_DECODER, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "AlbertModel": {**_POOLED, "embedding_size": 16},
    "BartModel": _BART,
    "BartForConditionalGeneration": _BART,
    "BertModel": _POOLED,
    "BertForMaskedLM": _POOLED,
    "BertForSequenceClassification": {**_POOLED, "num_labels": 3},
    "BloomForCausalLM": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "eos_token_id": 3},
    "CodeGenForCausalLM": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "DebertaV2Model": {
        **_POOLED,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "DistilBertModel": {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 48,
        "pad_token_id": 0,
        "max_position_embeddings": 64,
    },
    "ElectraModel": {**_POOLED, "embedding_size": 16},
    "GPT2LMHeadModel": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    "Gemma2ForCausalLM": {**_GROUPED, "head_dim": 8},
    "GemmaForCausalLM": {**_GROUPED, "head_dim": 8},
    "GPTNeoXForCausalLM": _GENERATIVE,
    "LlamaForCausalLM": {**_GROUPED, "tie_word_embeddings": False},
    "MPNetModel": _POOLED,
    "MambaForCausalLM": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 4,
        "pad_token_id": 0,
        "eos_token_id": 3,
        "bos_token_id": 2,
    },
    "MistralForCausalLM": _GROUPED,
    "MixtralForCausalLM": {**_GROUPED, "num_local_experts": 2},
    "ModernBertModel": {
        **_POOLED,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    "OPTForCausalLM": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    "Phi3ForCausalLM": _GROUPED,
    "PhiForCausalLM": _GENERATIVE,
    "Qwen2ForCausalLM": _GROUPED,
    "Qwen3ForCausalLM": {**_GROUPED, "head_dim": 8},
    "RobertaModel": {**_POOLED, "pad_token_id": 1},
    "T5ForConditionalGeneration": _T5,
    "T5Model": _T5,
    "XLNetModel": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "pad_token_id": 0},
    "XLNetLMHeadModel": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "pad_token_id": 0},
}


def build(folder: Path, name: str) -> None:
    """Save a tiny checkpoint of a transformers class, with a tokenizer of whole words."""
    import transformers

    from tests.conftest import save_tokenizer

    words = save_tokenizer(folder)
    kind: Any = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        kind(kind.config_class(vocab_size=words, **ARCHITECTURES[name])).save_pretrained(folder)
