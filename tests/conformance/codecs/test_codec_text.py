"""Codecs as text: what can be spelled, and the one sentence for what cannot."""

from __future__ import annotations

import pytest

from fedllm.codecs import chain, parse
from fedllm.codecs.stages.entropy import Entropy
from fedllm.codecs.stages.low_rank import LowRank
from fedllm.codecs.stages.quantize import Quantize
from fedllm.errors import ConfigError


def test_text_and_python_give_the_same_codec() -> None:
    built = chain(LowRank(energy=0.95), Quantize(bits=4), Entropy())
    assert parse("low_rank(energy=0.95) | quantize(bits=4) | entropy") == built
    assert parse("low_rank( 0.95 )|quantize( 4 )|entropy") == built


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("quantise(bits=4)", "unknown codec stage quantise; did you mean quantize?"),
        ("quantize(bit=4)", "quantize has no argument bit; did you mean bits?"),
        ("quantize(4, 64, true, 1)", "quantize takes at most 3 arguments (bits, block, stochastic)"),
        ("quantize(4, bits=4)", "quantize is given bits twice"),
        ("entropy(3)", "entropy takes at most 0 arguments ()"),
        ("quantize", "quantize needs bits"),
        ("quantize(bits=9)", "quantize takes bits from 1 to 8, got 9"),
        ("quantize(bits=true)", "quantize: bits takes a number"),
        ("quantize(bits=4, block=2.5)", "quantize: block takes a whole number"),
        ("sign(block=3)", "sign takes block from 8 to 1048576, got 3"),
        ("rotate(block=1000)", "rotate takes a power of two from 64 to 65536 as block, got 1000"),
        ("top_k(fraction=0)", "top_k takes fraction above 0 and up to 1, got 0"),
        ("cast(int8)", "cast takes bf16 or fp16, got int8"),
        ("low_rank", "low_rank takes either energy, as in energy=0.95, or rank, as in rank=4"),
        ("low_rank(energy=1.5)", "low_rank takes energy above 0 and up to 1, got 1.5"),
        ('low_rank(energy="0.9")', "low_rank takes energy above 0 and up to 1, got 0.9"),
        ("low_rank(rank=0)", "low_rank takes rank from 1, got 0"),
        ("low_rank(rank=1, method=lanczos)", "low_rank takes method svd or power, got lanczos"),
        ("quantize(4) | rotate", "rotate takes floats, but quantize leaves codes"),
        ("quantize(4) | sign", "sign takes floats, but quantize leaves codes"),
        ("rotate | low_rank(rank=2)", "low_rank takes tensors, but rotate leaves floats"),
        (
            "entropy",
            "entropy takes codes, but the input leaves tensors: put quantize, nf4, sign or cast between them",
        ),
        ("sign | entropy | entropy", "entropy takes codes, but entropy leaves bytes"),
        ("none | sign", "none is a codec by itself and cannot be a stage of a chain"),
        ("error_feedback", "error_feedback needs inner"),
        ("error_feedback(4)", "error_feedback: inner takes a codec"),
        ("per_tensor(rank=4)", 'per_tensor takes routes such as matrices=..., vectors=... or "*bias*"=...'),
        ("per_tensor(vectors=sign, vectors=sign)", "per_tensor takes at least one route, and each key once"),
        ("quantize(4", "codec 'quantize(4' lacks a comma or a closing parenthesis"),
        ("quantize(4) sign", "cannot read codec 'quantize(4) sign' from 'sign' on: stages are joined by |"),
        ("sign |", "codec 'sign |' lacks a stage's name at its end"),
        ("sign & entropy", "cannot read codec 'sign & entropy' from '& entropy' on"),
    ],
)
def test_mistakes_are_told_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("error_feedback(error_feedback(sign))", "carries its own residual"),
        ("error_feedback(per_tensor(vectors=ef21(sign)))", "carries its own residual"),
        ("error_feedback(quantize(bits=1, stochastic=true))", "never grows an error"),
    ],
)
def test_feedback_wraps_only_what_it_can(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse(text)
