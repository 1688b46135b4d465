"""The entropy coder against one that does the same symbol by symbol, and against bytes it would not write."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.codecs.base import Reader
from fedllm.codecs.stages import ans
from fedllm.codecs.stages.bits import Codes
from fedllm.codecs.stages.entropy import Entropy
from fedllm.errors import CodecError
from tests.properties.test_codecs import quick

TOTAL = 1 << ans.PRECISION


def drawn(shares: list[float], count: int, seed: int = 1) -> Codes:
    random = np.random.Generator(np.random.Philox(seed))
    return random.choice(len(shares), size=count, p=shares).astype(np.uint8)


def one_by_one(words: list[int], frequencies: list[int], count: int) -> list[int]:
    """Decode as the papers do, with Python's integers and a loop over symbols."""
    lanes = min(max(1, count // 2048), 512)
    starts = [sum(frequencies[:symbol]) for symbol in range(len(frequencies))]
    states = [words[2 * lane] | words[2 * lane + 1] << 16 for lane in range(lanes)]
    rest = iter(words[2 * lanes :])
    decoded = []
    for first in range(0, count, lanes):
        busy = range(min(lanes, count - first))
        for lane in busy:
            slot = states[lane] % TOTAL
            symbol = max(s for s, start in enumerate(starts) if start <= slot and frequencies[s])
            decoded.append(symbol)
            states[lane] = frequencies[symbol] * (states[lane] // TOTAL) + slot - starts[symbol]
        for lane in busy:
            if states[lane] < 1 << 16:
                states[lane] = states[lane] << 16 | next(rest)
    assert states == [1 << 16] * lanes
    assert next(rest, None) is None
    return decoded


@pytest.mark.parametrize("count", [1, 2, 700, 4095, 4096, 10_001])
def test_a_decoder_that_goes_symbol_by_symbol_reads_it(count: int) -> None:
    frequencies = np.array([9000, 0, 5000, 2383, 1], np.uint32)
    codes = drawn(list(frequencies / TOTAL), count)
    words = ans.encode(codes, frequencies)
    assert one_by_one(words.tolist(), frequencies.tolist(), count) == codes.tolist()
    assert np.array_equal(ans.decode(words, frequencies, count), codes)


def test_one_symbol_takes_no_words() -> None:
    frequencies = np.array([0, TOTAL], np.uint32)
    assert ans.encode(np.ones(5000, np.uint8), frequencies).size == 2 * 2
    assert (ans.decode(np.array([0, 1, 0, 1], "<u2"), frequencies, 5000) == 1).all()


@given(count=st.integers(0, 9000), levels=st.integers(2, 256), seed=st.integers(0, 99))
@quick
def test_what_is_written_is_read(count: int, levels: int, seed: int) -> None:
    random = np.random.Generator(np.random.Philox(seed))
    codes = drawn(list(random.dirichlet(np.full(levels, 0.3))), count, seed)
    body = b"".join(Entropy().encode(codes, levels))
    assert np.array_equal(Entropy().decode(Reader(body), count, levels), codes)


def test_bytes_are_the_same_on_every_machine() -> None:
    codes = (np.arange(6000) ** 2 * 7919 % 97 % 11 % 5).astype(np.uint8)
    body = b"".join(Entropy().encode(codes, 5))
    assert body[0] == 1
    assert hashlib.sha256(body).hexdigest()[:16] == "1d55ede2faa3ae86"


def test_a_million_codes_come_close_to_their_entropy() -> None:
    shares = [0.5, 0.25, 0.2, 0.05]
    size = len(b"".join(Entropy().encode(drawn(shares, 1_000_000), 4)))
    entropy = -sum(share * math.log2(share) for share in shares)
    assert entropy < 8 * size / 1_000_000 < 1.01 * entropy


@pytest.fixture(scope="module")
def body() -> bytes:
    return b"".join(Entropy().encode(drawn([0.7, 0.2, 0.1, 0.0], 8000), 4))


COSTS, WORDS = slice(1, 5), slice(9, None)


@pytest.mark.parametrize("damage", ["a word less", "a word more", "another word", "no symbol", "no states"])
def test_what_no_encoder_writes_is_refused(body: bytes, damage: str) -> None:
    costs, words = body[COSTS], np.frombuffer(body[WORDS], "<u2")
    if damage == "a word less":
        words = words[:-1]
    elif damage == "a word more":
        words = np.append(words, np.uint16(7))
    elif damage == "another word":
        words = np.append(words[:-1], words[-1] ^ 1)
    elif damage == "no symbol":
        costs = b"\xff" * 4
    else:
        words = words[:5]
    made = b"".join([b"\1", costs, len(words).to_bytes(4, "little"), words.astype("<u2").tobytes()])
    with pytest.raises(CodecError, match="no encoder writes"):
        Entropy().decode(Reader(made), 8000, 4)
