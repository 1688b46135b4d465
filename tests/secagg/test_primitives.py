"""The parts of secure aggregation against closed forms and other libraries."""

from itertools import combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from sympy import isprime  # type: ignore[import-untyped]

from fedllm.errors import WireError
from fedllm.secagg import graph, keys, shamir, words

SECRET = bytes(range(32))


def test_the_modulus_of_shares_is_the_least_prime_above_all_secrets() -> None:
    assert isprime(shamir.PRIME)
    assert not any(isprime(number) for number in range(2**256, shamir.PRIME))


@pytest.mark.parametrize("threshold", [1, 3, 5])
def test_any_threshold_of_shares_gives_the_secret_and_one_less_does_not(threshold: int) -> None:
    shares = shamir.split(SECRET, threshold, [1, 2, 5, 7, 300])
    for chosen in combinations(shares, threshold):
        assert shamir.join({holder: shares[holder] for holder in chosen}) == SECRET
    for chosen in combinations(shares, threshold - 1):
        assert _joined({holder: shares[holder] for holder in chosen}) != SECRET


def _joined(shares: dict[int, bytes]) -> bytes:
    try:
        return shamir.join(shares) if shares else b""
    except WireError:
        return b""


def test_fewer_shares_than_the_threshold_fit_every_secret() -> None:
    # t - 1 values and any value at 0 lie on one polynomial of degree t - 1: nothing of the secret is told.
    shares = shamir.split(SECRET, 3, [1, 2, 3])
    known = {x: int.from_bytes(shares[x]) for x in (1, 2)}
    for other in (0, 1, 2**255 + 7):
        # Lagrange through (0, other), (1, y1), (2, y2), at 3: other - 3 y1 + 3 y2.
        third = (other - 3 * known[1] + 3 * known[2]) % shamir.PRIME
        assert shamir.join({1: shares[1], 2: shares[2], 3: third.to_bytes(33)}) == other.to_bytes(32)


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_the_least_and_the_largest_secret_are_shared(secret: bytes) -> None:
    shares = shamir.split(secret, 2, [4, 9])
    assert shamir.join(shares) == secret


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(WireError, match="range"):
        shamir.join({1: b"\xff" * 33})


@pytest.mark.parametrize("bits", [1, 3, 7, 8, 9, 11, 16, 17, 31, 32, 33, 47, 63, 64])
def test_integers_of_any_width_come_back(bits: int) -> None:
    values = np.random.default_rng(bits).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), 1001, dtype=np.int64)
    packed = words.pack(words.words_of(values, bits), bits)
    assert len(packed) == words.packed_size(1001, bits) <= 1001 * bits / 8 + 3
    assert np.array_equal(words.signed(words.unpack(packed, 1001, bits), bits), values)


@pytest.mark.parametrize("bits", [11, 16, 47, 64])
def test_masks_cancel_and_what_is_left_is_the_sum(bits: int) -> None:
    random = np.random.default_rng(1)
    values = [random.integers(-(2 ** (bits - 3)), 2 ** (bits - 3), 500, dtype=np.int64) for _ in range(2)]
    drawn = words.mask(SECRET, 500, bits)
    first, second = words.words_of(values[0], bits), words.words_of(values[1], bits)
    first += drawn
    second -= drawn
    assert not np.array_equal(words.reduced(first.copy(), bits), words.words_of(values[0], bits))
    first += second
    assert np.array_equal(words.signed(words.reduced(first, bits), bits), values[0] + values[1])


def test_a_mask_is_the_cipher_s_key_stream() -> None:
    # The first 32 bytes that ChaCha20-Poly1305 makes are a one-time key; its stream goes on with block 1.
    aead = ChaCha20Poly1305(SECRET).encrypt(bytes(12), bytes(64), None)[:64]
    assert words.mask(SECRET, 16, 64).tobytes()[64:128] == aead


def test_masks_are_uniform_in_the_ring() -> None:
    counts = np.bincount(words.mask(SECRET, 80_000, 3), minlength=8)
    assert abs(counts - 10_000).max() < 5 * (10_000 * 7 / 8) ** 0.5


def test_what_was_sealed_with_another_key_is_not_opened() -> None:
    one, other = keys.private_key(), keys.private_key()
    key = keys.agree(one, keys.public_of(other), b"a")
    assert keys.opened(key, keys.sealed(key, b"share")) == b"share"
    assert keys.opened(keys.agree(one, keys.public_of(other), b"b"), keys.sealed(key, b"share")) is None


def test_a_key_that_gives_everybody_the_same_is_refused() -> None:
    with pytest.raises(WireError, match="agreed"):
        keys.agree(keys.private_key(), bytes(32), b"a")


@pytest.mark.parametrize(("clients", "degree"), [(10, 4), (11, 4), (50, 20), (5, None), (5, 4), (5, 8)])
def test_a_graph_is_symmetric_and_regular(clients: int, degree: int | None) -> None:
    everyone = range(3, 3 + clients)
    near = {one: graph.neighbours(everyone, one, degree, b"seed") for one in everyone}
    assert {len(found) for found in near.values()} == {min(degree or clients, clients - 1)}
    assert all(one in near[other] and one != other for one in everyone for other in near[one])


def test_another_seed_gives_another_graph() -> None:
    assert graph.neighbours(range(50), 0, 4, b"a") != graph.neighbours(range(50), 0, 4, b"b")
