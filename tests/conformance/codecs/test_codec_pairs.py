"""Every two stages that may follow one another, and many threes: the whole keeps what it declares."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import pytest
import torch

from fedllm.codecs import CodecContext, parse
from fedllm.codecs.base import HEADER_BYTES, FramedCodec
from fedllm.codecs.parse import vocabulary
from fedllm.errors import ConfigError
from fedllm.tensors import Tensors, dense_bytes, spec_of
from tests.conformance.test_codecs import difference, normal, round_trip, seeds_for, squared
from tests.parts import quick

LAYOUTS = ["low_rank(energy=0.9)", "low_rank(rank=3, method=power)"]
TRANSFORMS = ["rotate(block=64)", "rotate", "top_k(fraction=0.3)", "random_k(fraction=0.4)"]
QUANTIZERS = [
    "quantize(bits=8)",
    "quantize(bits=2)",
    "quantize(bits=2.5)",
    "quantize(bits=1)",
    "quantize(bits=3, stochastic=true)",
    "quantize(bits=1, block=64, stochastic=true)",
    "sign",
    "nf4",
    "cast(bf16)",
    "cast(fp16)",
]
CODERS = ["entropy"]
KINDS = {"layout": LAYOUTS, "transform": TRANSFORMS, "quantizer": QUANTIZERS, "coder": CODERS}
for _name, _stage in vocabulary().items():
    _kind = getattr(_stage, "kind", None)
    if _kind is not None and not any(text.partition("(")[0] == _name for text in KINDS[_kind]):
        # What is not listed is tried as it stands in its own example.
        KINDS[_kind] += [text for text in _stage.example.split(" | ") if text.partition("(")[0] == _name]
STAGES = {stage: kind for kind, stages in KINDS.items() for stage in stages}
AFTER = {
    "layout": ("transform", "quantizer"),
    "transform": ("transform", "quantizer"),
    "quantizer": ("coder",),
    "coder": (),
}
"""What may follow a stage, from the page on codecs; a coder may not stand first."""


def legal(stages: Iterable[str]) -> bool:
    kinds = [STAGES[stage] for stage in stages]
    return kinds[0] != "coder" and all(b in AFTER[a] for a, b in itertools.pairwise(kinds))


def chains(length: int) -> Iterator[str]:
    for stages in itertools.product(STAGES, repeat=length):
        if legal(stages):
            yield " | ".join(stages)


PAIRS = [parse(text) for text in chains(2)]
TRIPLES = [parse(text) for text in chains(3)]


def those(codecs: list[FramedCodec], *properties: str) -> pytest.MarkDecorator:
    """Return the codecs that declare all these properties: every fifth as a quick test."""
    chosen = [codec for codec in codecs if all(getattr(codec, name) for name in properties)]
    assert chosen
    return pytest.mark.parametrize("codec", quick(chosen, *chosen[::5]), ids=str)


def test_what_may_not_follow_is_a_configuration_error() -> None:
    """Also in threes of each kind's first: a stage out of order is found wherever it stands."""
    for length, known in ((1, STAGES), (2, STAGES), (3, [stages[0] for stages in KINDS.values()])):
        for stages in itertools.product(known, repeat=length):
            text = " | ".join(stages)
            if legal(stages):
                assert parse(str(parse(text))) == parse(text)
            else:
                with pytest.raises(ConfigError, match=r"takes (tensors|floats|codes), but .* leaves"):
                    parse(text)


def matrix_of_bad_luck() -> torch.Tensor:
    """Singular vectors whose entries are just above half a step of two bits, but one: factors double."""
    u = torch.full((60, 1), 0.51)
    u[0] = 1.0
    v = torch.full((1, 50), 0.51)
    v[0, 0] = 1.0
    return u @ v


MESSAGES: dict[str, Tensors] = {
    "normal": {"a": normal(40, 30, seed=1), "b": normal(300, seed=2), "c": normal(7)},
    "heavy tails": {"a": normal(40, 30, seed=3) ** 5},
    "one value": {"a": torch.eye(40)[:30], "b": torch.eye(70)[3]},
    "constant": {"a": torch.full((30, 40), 0.3), "b": torch.full((90,), -2.0)},
    "bad luck": {"a": matrix_of_bad_luck()},
    "parts of unlike size": {"a": torch.cat([10 * normal(64), 0.1 * normal(64), normal(64)])},
}


def loses(codec: FramedCodec, message: Tensors, seeds: int) -> float:
    """Return E |x - decoded|^2 / |x|^2."""
    errors = [
        squared(difference(round_trip(codec, message, CodecContext(seed=seed)), message))
        for seed in seeds_for(codec, seeds)
    ]
    return sum(errors) / len(errors) / squared(message)


def check_contraction(codec: FramedCodec, seeds: int) -> None:
    codec = codec.contracted()
    errors = {name: loses(codec, message, seeds) for name, message in MESSAGES.items()}
    assert max(errors.values()) <= 1 + 1e-6, errors


def check_unbiased(codec: FramedCodec, message: Tensors, seeds: int) -> None:
    """Hold each tensor's mean error against its own standard error: none may hide behind a larger one."""
    total = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in message.items()}
    spread = dict.fromkeys(message, 0.0)
    for seed in range(seeds):
        gap = difference(round_trip(codec, message, CodecContext(seed=seed)), message)
        for name, tensor in gap.items():
            total[name] += tensor
            spread[name] += squared({name: tensor})
    for name, tensor in message.items():
        bias = squared({name: total[name] / seeds})
        assert bias <= 2.5 * spread[name] / seeds**2 + 1e-10 * squared({name: tensor}), name


def check_linear(codec: FramedCodec) -> None:
    a, b = ({"x": normal(40, 30, seed=seed), "y": normal(7, seed=seed)} for seed in (1, 2))
    together = {name: 2 * a[name] - b[name] for name in a}
    one, two = round_trip(codec, a), round_trip(codec, b)
    apart = {name: 2 * one[name] - two[name] for name in a}
    assert squared(difference(apart, round_trip(codec, together))) <= 1e-10 * squared(together)


def check_size(codec: FramedCodec) -> None:
    for message in MESSAGES.values():
        payload, _ = codec.encode(message, {}, CodecContext())
        assert len(payload) <= dense_bytes(spec_of(message)) + HEADER_BYTES


EVEN = {"a": normal(256, seed=5), "b": normal(9, 64, seed=6)}
UNEVEN = {"x": torch.cat([10 * normal(64, seed=7), normal(64, seed=8), 0.1 * normal(128, seed=9)])}


@those(PAIRS, "contractive")
def test_two_contractions_are_one(codec: FramedCodec) -> None:
    check_contraction(codec, 2)


@those(PAIRS, "unbiased")
def test_two_unbiased_stages_are_unbiased(codec: FramedCodec) -> None:
    check_unbiased(codec, EVEN, 16)
    check_unbiased(codec, UNEVEN, 16)


@those(PAIRS, "linear")
def test_two_linear_stages_are_linear(codec: FramedCodec) -> None:
    check_linear(codec)


@those(PAIRS)
def test_no_pair_grows_a_message(codec: FramedCodec) -> None:
    check_size(codec)


@pytest.mark.slow
@those(TRIPLES, "contractive")
def test_three_contractions_are_one(codec: FramedCodec) -> None:
    check_contraction(codec, 3)


@pytest.mark.slow
@those(TRIPLES, "unbiased")
def test_three_unbiased_stages_are_unbiased(codec: FramedCodec) -> None:
    check_unbiased(codec, EVEN, 200)


@pytest.mark.slow
@those(TRIPLES, "linear")
def test_three_linear_stages_are_linear(codec: FramedCodec) -> None:
    check_linear(codec)


def test_parts_of_a_row_do_not_lean_on_each_other() -> None:
    """A scale never spans two rotations: it would shrink what is large in one to swell what is small."""
    codec = parse("rotate(block=64) | quantize(bits=1)")
    seeds, total = 300, torch.zeros(256, dtype=torch.float64)
    for seed in range(seeds):
        total += round_trip(codec, UNEVEN, CodecContext(seed=seed))["x"].double()
    for part, mean in zip(UNEVEN["x"].double().split(64), (total / seeds).split(64), strict=True):
        assert float(mean @ part / (part @ part)) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("fractions", [(0.5, 0.5), pytest.param((0.3, 0.5), marks=pytest.mark.slow)])
def test_every_value_gets_its_turn_where_two_stages_choose(fractions: tuple[float, float]) -> None:
    """Where both drew the same numbers, one of the first values was never sent."""
    codec = parse(" | ".join(f"random_k(fraction={fraction})" for fraction in fractions))
    seeds, total = 600, torch.zeros(30, dtype=torch.float64)
    for seed in range(seeds):
        total += round_trip(codec, {"x": torch.ones(30)}, CodecContext(seed=seed))["x"].double()
    share = fractions[0] * fractions[1]
    assert float((total / seeds - 1).abs().max()) < 5 * ((1 / share - 1) / seeds) ** 0.5
