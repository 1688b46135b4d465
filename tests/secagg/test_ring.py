"""How many bits a value takes, and that sums of integers are the plain sum."""

from __future__ import annotations

import pytest
import torch

from fedllm.codecs import parse
from fedllm.config import RunConfig
from fedllm.errors import CodecError
from fedllm.secagg import words
from fedllm.secagg.ring import Ring
from fedllm.sums import WeightedSum
from fedllm.tensors import Tensors, spec_of


def updates(count: int, scale: float = 1.0) -> list[Tensors]:
    generator = torch.Generator().manual_seed(1)
    return [{"a": scale * torch.randn(7, 3, generator=generator), "b": torch.zeros(2)} for _ in range(count)]


@pytest.mark.parametrize(
    ("codec", "clip", "weight", "bits"),
    [
        ("none", None, 100, 64),
        ("none", 1.0, 100, 44),  # 2 * 100 * 2^36 and a little
        ("fixed(bits=4, fraction=8)", None, 100, 11),  # a hundred clients that count alike
        ("fixed(bits=8, fraction=8)", None, 100, 15),
        ("fixed(bits=16, fraction=20)", None, 1000, 26),
    ],
)
def test_no_more_bits_than_the_largest_sum_needs(
    codec: str, clip: float | None, weight: int, bits: int
) -> None:
    config = RunConfig.validated({"privacy": {"clip": clip} if clip else {}})
    ring = Ring.of(config, parse(codec), weight)
    assert ring.bits == bits
    if bits < 64:
        most = ring.most * weight
        assert 2 * most < 2**bits <= 4 * most


@pytest.mark.parametrize(
    ("codec", "scale"), [("none", 1.0), ("none", 1e5), ("fixed(bits=10, fraction=8)", 1.0)]
)
@pytest.mark.parametrize("weights", [(1, 1, 1), (3, 50, 7)])
def test_a_sum_of_integers_is_the_plain_sum(codec: str, scale: float, weights: tuple[int, ...]) -> None:
    from fedllm.codecs import CodecContext

    used, spec = parse(codec), spec_of(updates(1)[0])
    ring = Ring.of(RunConfig(), used, sum(weights))
    plain, secure = WeightedSum(spec), WeightedSum(spec)
    total = torch.zeros(23, dtype=torch.int64).numpy()
    for update, weight in zip(updates(3, scale), weights, strict=True):
        payload, _ = used.encode(update, {}, CodecContext())
        decoded, _ = used.decode(payload, spec, {}, CodecContext())
        plain.add(decoded, weight)
        given = ring.integers(decoded, weight)
        assert (words.signed(words.words_of(given, ring.bits), ring.bits) == given).all()
        total += given
    secure.add_total(ring.tensors(total, spec), ring.fraction, sum(weights), 3)
    assert all(torch.equal(value, secure.total()[name]) for name, value in plain.total().items())
    assert all(torch.equal(value, secure.mean()[name]) for name, value in plain.mean().items())
    assert (secure.weight, secure.count) == (plain.weight, plain.count)


def test_what_has_no_room_is_refused() -> None:
    config = RunConfig.validated({"privacy": {"clip": 1.0}})
    ring = Ring.of(config, parse("none"), 10)
    with pytest.raises(CodecError, match="2 has no room in a secure sum of 41 bits a value, which ends at 1"):
        ring.integers({"a": torch.tensor([2.0])}, 1)


@pytest.mark.parametrize("fraction", [36, 20, 0])
def test_large_totals_reach_the_high_words(fraction: int) -> None:
    spec = spec_of({"a": torch.zeros(3)})
    total = WeightedSum(spec)
    given = torch.tensor([2**61 + 5, -(2**61) - 5, 7])
    total.add_total({"a": given}, fraction, 1, 3)
    total.add_total({"a": given}, fraction, 1, 3)
    assert total.total()["a"].tolist() == [2.0 * float(value) / 2**fraction for value in given.tolist()]
