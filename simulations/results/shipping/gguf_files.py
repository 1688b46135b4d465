"""A Llama in a file of llama.cpp's format, by the library ``gguf`` of its authors.

The file holds the weights under llama.cpp's names, the numbers of the configuration, the tokenizer and its
template. Matrices are float16 or, in blocks of 32 with a scale each, eight bits (``Q8_0``); vectors stay
float32. Fewer bits (``Q4_K_M``) are llama.cpp's own work. llama.cpp turns neighbouring pairs of a head where
transformers turns its halves, so the rows of queries and keys change places.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedllm.errors import ConfigError
from fedllm.models.anatomy import plain
from fedllm.models.model import Model
from fedllm.models.network import Network
from fedllm.models.saving import describe, unbounded

__all__ = ["FILE", "require_llama", "write", "write_eight_bits", "write_four_bits"]

FILE = "model.gguf"
_BLOCK = 32
_Q4_K_M = 15
"""llama.cpp's number for it."""
_DIGITS = r"\p{N}{1,3}"
"""In the pattern by which Llama 3 splits texts, and in no other's."""


def require_llama(model: Model, form: str) -> None:
    """Refuse what this does not write.

    Raises:
        ConfigError: the model is no Llama, or one whose layers or tokenizer llama.cpp names otherwise.
    """
    config = plain(model.module.backbone).config
    turning = getattr(config, "rope_parameters", None) or {}
    said = ""
    if model.module.pooling != "causal":
        said = f"llama.cpp's causal models, and this one answers by {model.module.pooling}"
    elif config.model_type != "llama":
        said = f'models of the type "llama", and this is a "{config.model_type}"'
    elif turning.get("rope_type", "default") != "default":
        said = f"positions as they are turned by default, and this model's are {turning['rope_type']}"
    elif config.attention_bias or config.mlp_bias:
        said = "layers without biases, and this model's have some"
    elif _splitting(model.tokenizer) is None:
        said = "tokenizers of bytes that split as SmolLM, GPT-2 or Llama 3 do, and this one does not"
    if said:
        raise ConfigError(f"--format {form} is for {said}: take --format merged or onnx")


def write(model: Model, network: Network, place: Path) -> None:
    """Write ``model.gguf`` with matrices in float16."""
    import gguf

    _write(model, network, place, gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16)


def write_eight_bits(model: Model, network: Network, place: Path) -> None:
    """Write ``model.gguf`` with matrices in ``Q8_0``; those whose rows no block divides stay float16."""
    import gguf

    _write(model, network, place, gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0)


def write_four_bits(model: Model, network: Network, place: Path) -> None:
    """Write ``model.gguf`` in llama.cpp's ``Q4_K_M``: most matrices in 4.5 bits a value, some in more.

    Of rows that no block of 256 divides llama.cpp takes blocks of 32, in five or eight bits.
    """
    from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, disable_logging, model_quantize

    write(model, network, place)
    whole = (place / FILE).rename(place / "whole.gguf")
    asked = LlamaModelQuantizeParams()
    asked.ftype, asked.nthread = _Q4_K_M, torch.get_num_threads()
    disable_logging()
    try:
        model_quantize(str(whole), str(place / FILE), asked)
    finally:
        whole.unlink()


def _write(model: Model, network: Network, place: Path, packing: Any, kind: Any) -> None:
    import gguf

    unbounded(model.tokenizer).save_pretrained(place)
    config = plain(network.backbone).config
    writer = gguf.GGUFWriter(place / FILE, "llama")
    writer.add_name(model.config.name)
    writer.add_file_type(kind)
    _add_sizes(writer, config)
    _add_tokenizer(writer, model.tokenizer, place, config.vocab_size)
    _add_weights(writer, network, config, packing)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    describe(model, place, None, runtime="llama.cpp")


def _add_sizes(writer: Any, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: Any, tokenizer: Any, place: Path, size: int) -> None:
    import gguf

    added = tokenizer.added_tokens_decoder
    known = tokenizer.get_vocab()
    tokens = {number: token for token, number in known.items()}
    kinds = {
        number: gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
        for number, token in added.items()
    }
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting(tokenizer))
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types(
        [
            kinds.get(number, gguf.TokenType.NORMAL if number in tokens else gguf.TokenType.UNUSED)
            for number in range(size)
        ]
    )
    gguf.SpecialVocab(place, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def _splitting(tokenizer: Any) -> str | None:
    """Return llama.cpp's name for how a tokenizer of bytes splits texts, where it has one."""
    if not tokenizer.is_fast:
        return None
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    before = told["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    if told["model"]["type"] != "BPE" or told.get("normalizer") or kinds[-1:] != ["ByteLevel"]:
        return None
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    return "llama-bpe" if kinds[0] == "Split" and _DIGITS in json.dumps(steps[0]["pattern"]) else None


def _add_weights(writer: Any, network: Network, config: Any, packing: Any) -> None:
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    for name, weights in plain(network.backbone).state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weights.float().numpy()
        if count := next((heads[end] for end in heads if name.endswith(end)), 0):
            values = _paired(values, count)
        kind = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else packing
        if kind == gguf.GGMLQuantizationType.Q8_0 and values.shape[-1] % _BLOCK:
            kind = gguf.GGMLQuantizationType.F16
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)),
            gguf.quants.quantize(values, kind),
            raw_dtype=kind,
        )


def _paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put the two halves of each head's rows, [heads * 2 * half, width], in turns."""
    halves = rows.reshape(heads, 2, -1, rows.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))
