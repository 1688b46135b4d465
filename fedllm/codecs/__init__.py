"""Composable compression of updates.

>>> import torch
>>> codec = parse("error_feedback(rotate | quantize(bits=1))")
>>> update = {"lora_A": torch.ones(8, 384), "lora_B": torch.ones(384, 8)}
>>> payload, residual = codec.encode(update, {}, CodecContext(seed=7, path=("up", 1, 0)))
>>> len(payload), sorted(residual)
(786, ['lora_A', 'lora_B'])
"""

from __future__ import annotations

from fedllm.codecs.base import Codec, CodecContext, FramedCodec
from fedllm.codecs.catalogue import catalogue
from fedllm.codecs.compose import chain
from fedllm.codecs.measure import Measurement, growth, measure
from fedllm.codecs.parse import Codecs, parse

__all__ = [
    "Codec",
    "CodecContext",
    "Codecs",
    "FramedCodec",
    "Measurement",
    "catalogue",
    "chain",
    "growth",
    "measure",
    "parse",
]
