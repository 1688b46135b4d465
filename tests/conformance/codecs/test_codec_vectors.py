"""Payloads of format version 2 must decode for ever: ``codec_vectors.json`` has them, and their values.

A change of the wire format needs a new version number and new vectors; ``python -m
tests.conformance.codecs.test_codec_vectors`` writes those.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedllm.codecs import CodecContext, parse
from fedllm.tensors import Tensors, spec_of

VECTORS = Path(__file__).with_name("codec_vectors.json")

TEXTS = [
    "none",
    "cast(bf16)",
    "cast(fp16) | entropy",
    "quantize(bits=8)",
    "quantize(bits=4, block=32)",
    "quantize(bits=2.5, block=16)",
    "quantize(bits=3, stochastic=true)",
    "quantize(bits=4) | entropy",
    "nf4",
    "sign",
    "rotate | quantize(bits=1)",
    "rotate | quantize(bits=4)",
    "top_k(fraction=0.1) | quantize(bits=8)",
    "random_k(fraction=0.25) | quantize(bits=8)",
    "low_rank(rank=2) | quantize(bits=8)",
    "error_feedback(rotate | quantize(bits=2))",
    'per_tensor("a"=none, matrices=nf4, vectors=sign)',
]

CONTEXT = CodecContext(seed=12, path=("up", 3, "node"), progress=0.5)

EXACT = ["none", "cast(bf16)", "quantize(bits=8)", "quantize(bits=4, block=32)", "nf4"]
"""Codecs without sums of floats, whose order a processor may choose: the same bytes anywhere."""


def message() -> Tensors:
    """Return values that are exact in float32 and come from no generator."""
    a = (torch.arange(12 * 16) * 7919 % 509 - 254).reshape(12, 16) / 256
    return {"a": a, "b": (torch.arange(40) * 31 % 64 - 32) / 64, "c": torch.tensor(0.75)}


def vectors() -> dict[str, dict[str, object]]:
    return json.loads(VECTORS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", TEXTS)
def test_old_payloads_decode_to_what_they_were(text: str) -> None:
    vector = vectors()[text]
    decoded, _ = parse(text).decode(bytes.fromhex(vector["payload"]), spec_of(message()), {}, CONTEXT)
    for name, values in vector["decoded"].items():
        torch.testing.assert_close(decoded[name].flatten(), torch.tensor(values), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("text", EXACT)
def test_encoding_gives_the_same_bytes_on_every_machine(text: str) -> None:
    assert parse(text).encode(message(), {}, CONTEXT)[0].hex() == vectors()[text]["payload"]


@pytest.mark.parametrize("text", TEXTS)
def test_sizes_stay(text: str) -> None:
    assert len(parse(text).encode(message(), {}, CONTEXT)[0]) == len(vectors()[text]["payload"]) // 2


def _write() -> None:
    made = {}
    for text in TEXTS:
        payload, _ = parse(text).encode(message(), {}, CONTEXT)
        decoded, _ = parse(text).decode(payload, spec_of(message()), {}, CONTEXT)
        made[text] = {
            "payload": payload.hex(),
            "decoded": {
                name: [float(f"{v:.7g}") for v in tensor.flatten().tolist()]
                for name, tensor in decoded.items()
            },
        }
    VECTORS.write_text(json.dumps(made, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _write()
