"""Codecs over the range of float32: what a codec does to x it does to any multiple of x."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedllm.codecs import CodecContext, parse
from fedllm.errors import CodecError
from fedllm.tensors import Tensors
from tests.conformance.test_codecs import ROWS, SLOW, normal, round_trip
from tests.parts import quick

TEXTS = [row.text for row in ROWS if "fp16" not in row.text]
TABLE = quick(TEXTS, *(text for text in TEXTS if text not in SLOW))
POWERS = [-115, -100, -76, 66, 106]
MESSAGE: Tensors = {"a": normal(40, 30, seed=1), "b": normal(300, seed=2), "c": normal(5, 12, seed=3)}


def times(message: Tensors, power: int) -> Tensors:
    return {name: torch.ldexp(tensor, torch.tensor(power)) for name, tensor in message.items()}


# A grid that all clients share in advance is the same whatever the values are.
SCALING = [text for text in TEXTS if "fixed" not in text]


@pytest.mark.parametrize("text", quick(SCALING, *(text for text in SCALING if text not in SLOW)))
def test_a_power_of_two_passes_through_every_codec(text: str) -> None:
    """Scaling by a power of two rounds nothing from about 1e-35 to 1e32; only an SVD may round otherwise."""
    codec, exact = parse(text), "low_rank" not in text
    want = round_trip(codec, MESSAGE)
    for power in POWERS:
        got = times(round_trip(codec, times(MESSAGE, power)), -power)
        for name, tensor in want.items():
            if exact and power > -115:
                assert torch.equal(got[name], tensor), (power, name)
            else:
                torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", TABLE)
def test_at_the_ends_values_are_kept_become_zero_or_are_refused(text: str) -> None:
    """Nothing grows beyond twice what unbiased coding makes of it, nothing turns into NaN."""
    codec = parse(text)
    ones = {"a": torch.ones(20, 30), "b": -torch.ones(70)}
    usual = max(float(tensor.abs().max()) for tensor in round_trip(codec, ones).values())
    for size in (1e-45, 1e-41, 1e-38, 3e-36, 1e36, 3e38):
        try:
            decoded = round_trip(codec, {name: size * one for name, one in ones.items()})
        except CodecError as error:
            if size < 1e35:
                raise AssertionError(f"{size:g} is refused") from error
            continue
        for tensor in decoded.values():
            assert torch.isfinite(tensor).all(), size
            assert float(tensor.abs().double().max()) <= 1.01 * usual * size + 2e-45, size


@pytest.mark.parametrize("bits", quick([1, 2, 3, 4], 1, 3))
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_rotated_blocks_are_unbiased_however_small_or_large(bits: int, size: float) -> None:
    codec, x = parse(f"rotate | quantize(bits={bits})"), {"a": normal(512, seed=4) * size}
    seeds = 40
    decoded = [
        (round_trip(codec, x, CodecContext(seed=seed))["a"].double() / size).numpy() for seed in range(seeds)
    ]
    true = x["a"].double().numpy() / size
    error = np.mean([np.square(one - true).sum() for one in decoded])
    bias = np.square(np.mean(decoded, axis=0) - true).sum()
    assert bias <= 1.5 * error / seeds
