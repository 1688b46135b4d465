"""Codecs on whatever hypothesis thinks of, and on bytes that nobody's encoder wrote."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedllm.codecs import CodecContext, parse
from fedllm.codecs.base import HEADER_BYTES, Reader
from fedllm.codecs.stages.bits import pack_codes, packed_bytes, unpack_codes
from fedllm.codecs.stages.entropy import Entropy
from fedllm.codecs.stages.rotate import Rotate, hadamard
from fedllm.codecs.stages.sparse import index_bytes, pack_positions, unpack_positions
from fedllm.errors import CodecError
from fedllm.tensors import Tensors, dense_bytes, spec_of
from simulations.bench.reply_fuzz.payloads import CODECS, Sample, fuzz, mutate, samples

quick = settings(max_examples=30, deadline=None)

finite = st.floats(-(2.0**40), 2.0**40, width=32)
shapes = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40)
tensors = arrays.arrays(np.float32, shapes, elements=finite).map(torch.from_numpy)
messages = st.dictionaries(st.text("abc.", min_size=1, max_size=4), tensors, max_size=5)


@pytest.mark.parametrize("text", [text for text in CODECS if "low_rank" not in text and "sign)" not in text])
@given(message=messages, seed=st.integers(0, 3))
@settings(quick, max_examples=10)
def test_any_message_comes_back_in_its_spec_and_no_larger(text: str, message: Tensors, seed: int) -> None:
    codec, context = parse(text), CodecContext(seed=seed)
    payload, _ = codec.encode(message, {}, context)
    decoded, _ = codec.decode(payload, spec_of(message), {}, context)
    assert spec_of(decoded) == spec_of(message)
    assert len(payload) <= dense_bytes(spec_of(message)) + HEADER_BYTES


@given(
    x=arrays.arrays(np.float32, st.integers(1, 900), elements=st.floats(-100, 100, width=32)),
    bits=st.integers(1, 8),
    stochastic=st.booleans(),
)
@quick
def test_a_uniform_grid_errs_by_half_a_step_and_at_random_by_one(
    x: np.ndarray, bits: int, stochastic: bool
) -> None:
    if bits == 1 and not stochastic:
        bits = 2
    codec = parse(f"quantize(bits={bits}, block=64, stochastic={str(stochastic).lower()})")
    message = {"x": torch.from_numpy(x)}
    decoded, _ = codec.decode(
        codec.encode(message, {}, CodecContext())[0], spec_of(message), {}, CodecContext()
    )
    for block, back in zip(message["x"].split(64), decoded["x"].split(64), strict=True):
        largest = float(block.abs().max())
        steps = 2 ** (bits - 1) - 1 if bits > 1 else 0.5
        worst = largest / steps * (1 if stochastic else 0.5)
        assert float((block - back).abs().max()) <= worst * (1 + 1e-4) + 1e-30


@given(data=st.data(), bits=st.integers(1, 8), count=st.integers(0, 300))
@quick
def test_packing_is_lossless_and_exact_in_size(data: st.DataObject, bits: int, count: int) -> None:
    codes = data.draw(arrays.arrays(np.uint8, count, elements=st.integers(0, 2**bits - 1)))
    packed = pack_codes(codes, bits)
    assert memoryview(packed).nbytes == packed_bytes(count, bits) <= math.ceil(count * bits / 8) + 2
    assert np.array_equal(unpack_codes(packed, count, bits), codes)


@given(size=st.integers(1, 3000), data=st.data())
@quick
def test_positions_are_lossless_and_within_two_bits_of_their_range(size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, size))
    chosen = np.random.Generator(np.random.Philox(size)).choice(size, count, replace=False)
    positions = np.sort(chosen).astype(np.int64)
    packed = pack_positions(positions, size)
    assert len(packed) == index_bytes(count, size)
    assert np.array_equal(unpack_positions(memoryview(packed), count, size), positions)
    # Each of a few bit fields is rounded up to whole bytes.
    assert len(packed) * 8 <= min(size, count * (2 + math.log2(size / count))) + 5 * 7


@pytest.mark.parametrize("wrong", [[5, 5], [7, 3], [3, 120]])
def test_positions_out_of_order_or_range_are_refused(wrong: list[int]) -> None:
    low = pack_codes(np.array([position & 31 for position in wrong], np.uint8), 5)
    high = np.zeros(5, np.uint8)
    high[[(position >> 5) + index for index, position in enumerate(wrong)]] = 1
    data = bytes(low) + np.packbits(high, bitorder="little").tobytes()
    assert len(data) == index_bytes(2, 100)
    with pytest.raises(CodecError, match=r"^payload has indices out of order or out of range$"):
        unpack_positions(memoryview(data), 2, 100)


@given(counts=st.lists(st.integers(0, 150), min_size=2, max_size=40), seed=st.integers(0, 99))
@quick
def test_entropy_coding_is_lossless_and_near_the_entropy(counts: list[int], seed: int) -> None:
    codes = np.repeat(np.arange(len(counts)), counts).astype(np.uint8)
    np.random.Generator(np.random.Philox(seed)).shuffle(codes)
    body = b"".join(Entropy().encode(codes, len(counts)))
    reader = Reader(body)
    assert np.array_equal(Entropy().decode(reader, codes.size, len(counts)), codes)
    reader.finish()
    shares = [count / max(1, codes.size) for count in counts if count]
    bits = -codes.size * sum(share * math.log2(share) for share in shares)
    assert len(body) <= bits / 8 * 1.01 + len(counts) + 16


@given(power=st.integers(0, 9), rows=st.integers(1, 4), seed=st.integers(0, 99))
@quick
def test_hadamard_is_scipys(power: int, rows: int, seed: int) -> None:
    x = np.random.Generator(np.random.Philox(seed)).standard_normal((rows, 2**power), np.float32)
    assert np.allclose(hadamard(x), x @ scipy.linalg.hadamard(2**power), atol=1e-3)


@given(width=st.integers(1, 700), rows=st.integers(1, 3), seed=st.integers(0, 99))
@quick
def test_rotation_keeps_lengths_at_any_width_and_turns_back(width: int, rows: int, seed: int) -> None:
    x = np.random.Generator(np.random.Philox(seed)).standard_normal((rows, width), np.float32)
    stage, context = Rotate(block=128), CodecContext(seed=seed)
    (y,), side = stage.encode([x], context)
    assert not side
    assert np.allclose(np.linalg.norm(y, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)
    (back,) = stage.decode([y], None, [x.shape], context)
    assert np.allclose(back, x, atol=1e-5)


def test_rotation_spreads_one_value_over_a_row_of_any_width() -> None:
    for width in (128, 129, 200, 255, 300):
        for at in (0, width // 2, width - 1):
            x = np.zeros((1, width), np.float32)
            x[0, at] = 1
            (y,), _ = Rotate(block=128).encode([x], CodecContext(seed=at))
            assert np.abs(y).max() < 0.8


@pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample.text)
@given(cut=st.integers(0, 400))
@settings(quick, max_examples=20)
def test_any_beginning_of_a_payload_is_refused(sample: Sample, cut: int) -> None:
    codec = parse(sample.text)
    with pytest.raises(CodecError):
        codec.decode(sample.payload[: min(cut, len(sample.payload) - 1)], sample.spec, {}, CodecContext())


@pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample.text)
def test_bytes_too_many_are_refused_even_with_a_checksum_that_fits(sample: Sample) -> None:
    body = sample.payload[9:] + b"\0"
    checksum = zlib.crc32(body, zlib.crc32(sample.payload[:5])).to_bytes(4, "little")
    with pytest.raises(CodecError, match=r"1 bytes too many"):
        parse(sample.text).decode(sample.payload[:5] + checksum + body, sample.spec, {}, CodecContext())


@pytest.mark.slow
def test_mutated_payloads_decode_or_are_refused_in_bounded_memory() -> None:
    result = fuzz(440, seed=5)
    assert result["decoded"] + sum(result["refused"].values()) <= 440
    # A mutation that were always noticed by the checksum would test nothing behind it.
    assert result["decoded"] > 50


def test_mutations_are_mutations_and_repeatable() -> None:
    payload = samples()[1].payload
    one, two = ([mutate(payload, np.random.default_rng(seed)) for seed in range(50)] for _ in range(2))
    assert one == two
    assert sum(mutated != payload for mutated in one) > 45
