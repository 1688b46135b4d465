"""Tokenizers that talk, built in code: byte-level, so that any text has tokens, even half a character."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["CHATML", "save_model", "tokenizer"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SEEN = ["User Assistant System what is zinc? a metal. hello there, you are brief. 1 2 3\n\n user assistant"]


def tokenizer(template: str | None = CHATML, end: str | None = "<|end|>") -> Any:
    """Return a byte-level BPE with a few merges, special tokens of its own and maybe a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        _SEEN * 3,
        trainers.BpeTrainer(
            vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False
        ),
    )
    kind: Any = PreTrainedTokenizerFast
    found = kind(tokenizer_object=made, pad_token="<|pad|>", bos_token="<|begin|>", eos_token=end)
    found.chat_template = template
    return found


def save_model(folder: Path, template: str | None = CHATML) -> None:
    """Save a Llama of two layers x 32 with 128 positions and such a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer(template)
    words.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=64,
                max_position_embeddings=128,
                initializer_range=0.3,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                tie_word_embeddings=False,
            )
        ).save_pretrained(folder)
