"""One table, every codec: what each declares is what each does."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import dataclass

import pytest
import safetensors.torch
import torch

from fedllm.codecs import CodecContext, catalogue, measure, parse
from fedllm.codecs.base import HEADER_BYTES, FramedCodec
from fedllm.codecs.parse import vocabulary
from fedllm.codecs.routing import PerTensor
from fedllm.errors import CodecError
from fedllm.tensors import Tensors, TensorSpec, dense_bytes, spec_of


@dataclass(frozen=True)
class Row:
    """What a codec should do.

    Attributes:
        bits: nominal bits a value at n = 10^6, scales of 32 bits per block included.
        error: bound on |x - decoded|^2 / |x|^2 for N(0, 1).
    """

    text: str
    bits: float
    error: float


ROWS = [
    Row("none", 32, 0),
    Row("rotate", 32, 1e-12),
    Row("cast(bf16)", 16, 4e-6),
    Row("cast(fp16)", 16, 7e-8),
    Row("cast(bf16) | entropy", 12, 4e-6),
    Row("quantize(bits=8)", 8 + 32 / 4096, 1.7e-4),
    Row("quantize(bits=8, stochastic=true)", 8 + 32 / 4096, 3.4e-4),
    Row("quantize(bits=4)", 4 + 32 / 4096, 0.03),
    Row("quantize(bits=4, block=64)", 4.5, 0.0118),
    Row("quantize(bits=4) | entropy", 2.99, 0.03),
    Row("quantize(bits=2.5, stochastic=true)", 2.5 + 32 / 4096, 3),
    Row("quantize(bits=1)", 1 + 32 / 4096, 0.3653),
    Row("quantize(bits=1, block=256, stochastic=true)", 1 + 32 / 256, 9),
    Row("sign", 1 + 32 / 4096, 0.3653),
    Row("nf4", 4.5, 0.0086),
    Row("natural(bits=3)", 3 + 32 / 4096, 0.18),
    Row("natural(bits=4)", 4 + 32 / 4096, 0.085),
    Row("fixed(bits=8, fraction=5)", 8, 1e-4),
    Row("fixed(bits=12, fraction=9, stochastic=true)", 12, 1e-5),
    Row("rotate | sign", 1 + 32 / 4096, 0.573),
    Row("rotate | quantize(bits=1)", 1 + 32 / 4096, 0.573),
    Row("rotate | quantize(bits=1.5)", 1.5 + 32 / 4096, 0.36),
    Row("rotate | quantize(bits=2)", 2 + 32 / 4096, 0.135),
    Row("rotate | quantize(bits=3)", 3 + 32 / 4096, 0.0365),
    Row("rotate | quantize(bits=4)", 4 + 32 / 4096, 0.0098),
    Row("rotate | quantize(bits=4, stochastic=true)", 4 + 32 / 4096, 0.06),
    Row("rotate | quantize(bits=8)", 8 + 32 / 4096, 1.7e-4),
    Row("top_k(fraction=0.1)", 3.2 + 0.1 * 5.25, 0.62),
    Row("top_k(fraction=0.5) | rotate | quantize(bits=4)", 0.5 * (4 + 32 / 4096) + 1, 0.09),
    Row("random_k(fraction=0.25)", 8, 3.1),
    Row("random_k(fraction=0.25) | quantize(bits=4, stochastic=true)", 1 + 8 / 4096, 3.3),
    Row("low_rank(energy=0.95)", 32, 0),
    Row("low_rank(rank=4, method=power) | quantize(bits=8)", 8 * 4 * 2 / 1000, 1),
    Row("low_rank(rank=4) | rotate | quantize(bits=2)", 2 * 8 / 1000 + 8 * 32 / 1e6, 1),
    Row("per_tensor(matrices=quantize(bits=8), vectors=none)", 8 + 32 / 4096, 1.7e-4),
    Row("error_feedback(rotate | quantize(bits=1))", 1 + 32 / 4096, 0.365),
    Row('error_feedback(low_rank(energy="0.95->0.98") | quantize(bits=8) | entropy)', 7.1, 1.7e-4),
    Row("error_feedback(random_k(fraction=0.25))", 8, 0.76),
    Row("error_feedback(per_tensor(matrices=sign, vectors=none))", 1 + 32 / 4096, 0.3653),
    Row("ef21(top_k(fraction=0.1) | quantize(bits=8))", 0.8 + 0.1 * 5.25, 0.62),
]

CONTEXT = CodecContext(seed=3, path=("up", 1, 0), progress=0.25)


SLOW = {
    "cast(fp16)",
    "cast(bf16) | entropy",
    "quantize(bits=4)",
    "quantize(bits=4, block=64)",
    "quantize(bits=1)",
    "quantize(bits=2.5, stochastic=true)",
    "rotate | sign",
    "rotate | quantize(bits=1)",
    "rotate | quantize(bits=1.5)",
    "rotate | quantize(bits=3)",
    "rotate | quantize(bits=4)",
    "rotate | quantize(bits=8)",
    "top_k(fraction=0.5) | rotate | quantize(bits=4)",
    "random_k(fraction=0.25) | quantize(bits=4, stochastic=true)",
    "low_rank(rank=4) | rotate | quantize(bits=2)",
    'error_feedback(low_rank(energy="0.95->0.98") | quantize(bits=8) | entropy)',
    "error_feedback(random_k(fraction=0.25))",
}
"""Rows whose stages other rows have as well, or that code a symbol at a time."""


def rows(*properties: str) -> pytest.MarkDecorator:
    """Return the rows whose codec declares all these properties."""
    chosen = [
        pytest.param(row, marks=pytest.mark.slow if row.text in SLOW else ())
        for row in ROWS
        if all(getattr(parse(row.text), name) for name in properties)
    ]
    return pytest.mark.parametrize("row", chosen, ids=lambda row: row.text)


table = rows()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MESSAGES: dict[str, Tensors] = {
    "no tensors": {},
    "no values": {"a": torch.zeros(0, 3), "b": torch.zeros(0)},
    "scalar": {"a": torch.tensor(1.5)},
    "one value": {"a": torch.tensor([-2.0])},
    "zeros": {"a": torch.zeros(300, 20), "b": torch.zeros(5)},
    "bf16": {"a": normal(40, 30).to(torch.bfloat16), "b": normal(7).to(torch.bfloat16)},
    "fp16 and fp64": {"a": normal(40, 30).half(), "b": normal(700).double()},
    "1 x n": {"a": normal(1, 5000)},
    "n x 1": {"a": normal(5000, 1)},
    "beside powers of two": {f"a{n}": normal(n) for n in (63, 64, 65, 255, 257, 4095, 4097, 8191)},
    "three axes": {"a": normal(30, 4, 50)},
    "not contiguous": {"a": normal(60, 40).T, "b": normal(500)[::2]},
    "low rank": {"a": normal(300, 3) @ normal(3, 200), "b": normal(200)},
    "one large value": {"a": torch.cat([torch.full((1,), 6e4), torch.full((2999,), 1e-3)])},
    "tiny": {"a": 1e-36 * normal(50, 50)},
    "LoRA": {f"l{i}.lora_{ab}": normal(8, 384, seed=i) for i in range(3) for ab in "AB"}
    | {"head": normal(5)},
}


def round_trip(codec: FramedCodec, tensors: Tensors, context: CodecContext = CONTEXT) -> Tensors:
    payload, _ = codec.encode(tensors, {}, context)
    return codec.decode(payload, spec_of(tensors), {}, context)[0]


def seeds_for(codec: FramedCodec, most: int) -> range:
    """One seed for a codec that draws nothing, since every other gives the same bytes."""
    few = {"a": normal(20, 30)}
    one, other = (codec.encode(few, {}, CodecContext(seed=seed))[0] for seed in (0, 1))
    return range(1 if one == other else most)


def squared(tensors: Tensors) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values())


def difference(a: Tensors, b: Tensors) -> Tensors:
    return {name: a[name].double() - b[name].double() for name in a}


def test_every_stage_is_in_the_table_and_in_the_catalogue() -> None:
    spelled = " ".join(row.text for row in ROWS)
    assert all(name in spelled for name in vocabulary())
    entries = catalogue()
    assert [entry.name for entry in entries] == sorted(vocabulary())
    assert all(entry.summary and entry.bits and entry.cost for entry in entries)


def test_text_reads_back() -> None:
    for row in ROWS:
        assert parse(str(parse(row.text))) == parse(row.text)


@table
def test_round_trip_keeps_names_shapes_dtypes_and_never_grows(row: Row) -> None:
    codec = parse(row.text)
    inner = getattr(codec, "inner", codec)
    routes = len(inner.routes) if isinstance(inner, PerTensor) else 1
    for name, message in MESSAGES.items():
        payload, _ = codec.encode(message, {}, CONTEXT)
        decoded, _ = codec.decode(payload, spec_of(message), {}, CONTEXT)
        assert spec_of(decoded) == spec_of(message), name
        assert len(payload) <= dense_bytes(spec_of(message)) + HEADER_BYTES + routes - 1, name


def test_zeros_decode_to_zeros() -> None:
    for row in ROWS:
        assert squared(round_trip(parse(row.text), MESSAGES["zeros"])) == 0, row.text


@table
def test_size_and_error_at_a_million_values(row: Row) -> None:
    result = measure(parse(row.text), {"a": normal(1000, 1000)}, CONTEXT)
    assert result.bits <= 1.01 * row.bits
    assert result.error**2 <= row.error
    assert sum(result.parts.values()) == result.bytes


@table
def test_same_seed_same_bytes_on_any_number_of_threads(row: Row) -> None:
    codec = parse(row.text)
    message = {"a": normal(300, 400), "b": normal(70_000)}
    before = torch.get_num_threads()
    payloads = set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            payloads.add(codec.encode(dict(reversed(message.items())), {}, CONTEXT)[0])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(payloads) == 1


@rows("unbiased")
@pytest.mark.parametrize(("width", "seeds", "most"), [(1, 60, 9), (5, 60, 9), (100, 25, 2.5), (700, 16, 2)])
def test_unbiased_codecs_are(row: Row, width: int, seeds: int, most: float) -> None:
    """The mean error is one of ``seeds`` draws' size, by so much less in doubt as values are many."""
    codec = parse(row.text)
    x = {"a": normal(width, seed=1)}
    total, error = torch.zeros(width, dtype=torch.float64), 0.0
    for seed in range(seeds):
        decoded = round_trip(codec, x, CodecContext(seed=seed))
        total += decoded["a"].double()
        error += squared(difference(decoded, x)) / squared(x) / seeds
    bias = squared({"a": total / seeds - x["a"]}) / squared(x)
    assert bias <= most * error / seeds + 1e-12


@rows("linear")
def test_linear_codecs_are(row: Row) -> None:
    codec = parse(row.text)
    a, b = ({"x": normal(40, 30, seed=seed), "y": normal(7, seed=seed)} for seed in (1, 2))
    together = {name: a[name] + b[name] for name in a}
    one, two = round_trip(codec, a), round_trip(codec, b)
    apart = {name: one[name] + two[name] for name in a}
    assert squared(difference(apart, round_trip(codec, together))) <= 1e-10 * squared(together)


@rows("contractive")
def test_contractions_are(row: Row) -> None:
    codec = parse(row.text)
    inputs = {
        "normal": normal(50, 60),
        "heavy tails": normal(50, 60) ** 5,
        "one value": torch.eye(60)[:1].repeat(50, 1) * torch.eye(50, 60),
        "constant": torch.full((50, 60), 0.3),
    }
    errors = {}
    for name, x in inputs.items():
        trials = [
            difference(round_trip(codec, {"a": x}, CodecContext(seed=seed)), {"a": x})
            for seed in seeds_for(codec, 10)
        ]
        errors[name] = sum(squared(trial) for trial in trials) / len(trials) / squared({"a": x})
    assert max(errors.values()) <= 1 + 1e-6, errors


@rows("contractive")
def test_feedback_telescopes(row: Row) -> None:
    codec = parse(row.text)
    codec = codec if codec.stateful else parse(f"error_feedback({codec})")
    state, seen, wanted = {}, {}, {}
    shapes = {"a": (25, 20), "b": (33,), "c": ()}
    there: Tensors = {}
    for round in range(12):
        context = CodecContext(seed=5, path=("up", round, 0), progress=round / 12)
        x = {name: normal(*shape, seed=7 * round) for name, shape in shapes.items()}
        payload, state = codec.encode(x, state, context)
        decoded, there = codec.decode(payload, spec_of(x), there, context)
        for name in x:
            seen[name] = seen.get(name, 0) + decoded[name].double()
            wanted[name] = wanted.get(name, 0) + x[name].double()
    if str(codec).startswith("ef21"):
        assert all(torch.equal(state[name], there[name]) for name in state)
        return
    gap = {name: seen[name] + state[name].double() - wanted[name] for name in wanted}
    assert math.sqrt(squared(gap) / squared(wanted)) <= 1e-5
    assert not there
    assert safetensors.torch.load(safetensors.torch.save(state)).keys() == state.keys()


def test_ef21_converges_to_a_constant_input() -> None:
    codec = parse("ef21(top_k(fraction=0.1) | quantize(bits=8))")
    x, state, there = {"a": normal(50, 60)}, {}, {}
    for round in range(60):
        context = CodecContext(path=(round,))
        payload, state = codec.encode(x, state, context)
        decoded, there = codec.decode(payload, spec_of(x), there, context)
    assert squared(difference(decoded, x)) < 1e-6 * squared(x)


def test_values_that_are_not_finite_are_named() -> None:
    for row, value in itertools.product(ROWS, (math.nan, math.inf, -math.inf)):
        codec, bad = parse(row.text), normal(20, 20)
        bad[3, 4] = value
        with pytest.raises(CodecError, match=r"cannot encode layer\.1 with NaN or infinite values"):
            codec.encode({"layer.0": normal(3), "layer.1": bad}, {}, CONTEXT)


def test_integers_are_refused() -> None:
    for row in ROWS:
        with pytest.raises(CodecError, match=r"a: it holds torch\.int64, updates are floats"):
            parse(row.text).encode({"a": torch.arange(5)}, {}, CONTEXT)


@table
def test_huge_values_are_kept_or_refused(row: Row) -> None:
    message = {"a": normal(100, 90) * 1e38, "b": normal(3)}
    message["a"].clamp_(-3e38, 3e38)
    with contextlib.suppress(CodecError):
        payload, _ = parse(row.text).encode(message, {}, CONTEXT)
        decoded, _ = parse(row.text).decode(payload, spec_of(message), {}, CONTEXT)
        assert all(tensor.isfinite().all() for tensor in decoded.values())


@table
def test_damage_is_noticed(row: Row) -> None:
    codec, message = parse(row.text), MESSAGES["LoRA"]
    payload, _ = codec.encode(message, {}, CONTEXT)
    spec = spec_of(message)
    flipped = bytes([*payload[:50], payload[50] ^ 1, *payload[51:]])
    other = parse("quantize(bits=7)").encode(message, {}, CONTEXT)[0]
    cases = {
        "ends inside": b"",
        "checksum": flipped,
        "version": b"\x63" + payload[1:],
        "configured differently": other,
    }
    for reason, damaged in cases.items():
        with pytest.raises(CodecError, match=reason):
            codec.decode(damaged, spec, {}, CONTEXT)
    for damaged in (payload[:-1], payload + b"\0", payload[:40]):
        with pytest.raises(CodecError):
            codec.decode(damaged, spec, {}, CONTEXT)
    with pytest.raises(CodecError):
        codec.decode(payload, {"other": TensorSpec((9000, 7))}, {}, CONTEXT)


def test_one_bit_on_a_lora_update_is_one_payload_of_at_most_9600_bytes() -> None:
    message = {f"layer.{i}.{ab}": normal(8, 384) for i in range(12) for ab in "AB"}
    message |= {"head.weight": normal(5, 384), "head.bias": normal(5)}
    assert sum(tensor.numel() for tensor in message.values()) == 75_653
    assert len(parse("error_feedback(rotate | quantize(bits=1))").encode(message, {}, CONTEXT)[0]) <= 9_600


def test_feedback_uses_the_smallest_error_and_so_beats_unbiased_scales() -> None:
    message = {"a": normal(100, 100)}
    plain = measure(parse("rotate | quantize(bits=1)"), message, CONTEXT).error ** 2
    inside = measure(parse("error_feedback(rotate | quantize(bits=1))"), message, CONTEXT).error ** 2
    assert plain == pytest.approx(math.pi / 2 - 1, rel=0.03)
    assert inside == pytest.approx(1 - 2 / math.pi, rel=0.03)


def test_a_residual_of_another_shape_is_an_error() -> None:
    with pytest.raises(CodecError, match=r"residual of a has shape \[3\], the update \[4\]"):
        parse("error_feedback(sign)").encode({"a": torch.ones(4)}, {"a": torch.ones(3)}, CONTEXT)


def test_routes_go_where_they_say() -> None:
    codec = parse('per_tensor("*head*"=none, matrices=low_rank(rank=1), vectors=sign)')
    message = {"m": normal(40, 30), "head.w": normal(20, 5), "v": normal(600)}
    decoded = round_trip(codec, message)
    assert torch.equal(decoded["head.w"], message["head.w"])
    assert torch.linalg.matrix_rank(decoded["m"]) == 1
    assert decoded["v"].abs().unique().numel() == 1
    assert not codec.misfit(spec_of(message))
    assert "no tensor is left that fits '*head*'; updates hold m" in codec.misfit(
        spec_of({"m": normal(4, 4)})
    )
    round_trip(codec, {"v": normal(1)})  # one message may hold fewer than a run's do
