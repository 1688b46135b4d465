"""Exact sums against fractions: rounded to the nearest, refused where they could not be exact."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from fedllm.errors import RejectedReply
from fedllm.sums import WeightedSum
from fedllm.tensors import TensorSpec

SPEC = {"w": TensorSpec((4,))}


def values(seed: int) -> list[float]:
    """Positive, and so small that none is a multiple of 2^-36."""
    return (2.0**-20 * torch.rand(4, generator=torch.Generator().manual_seed(seed))).tolist()


def test_rounding_goes_to_the_nearest_and_does_not_drift() -> None:
    """Of 400 replies each adds at most half of 2^-36; cut off instead, all would err to the same side."""
    total, exact = WeightedSum(SPEC), [Fraction(0)] * 4
    for seed in range(400):
        weight, reply = seed % 7 + 1, values(seed)
        total.add({"w": torch.tensor(reply)}, weight)
        exact = [e + weight * Fraction(float(torch.tensor(v))) for e, v in zip(exact, reply, strict=True)]
    assert total.count == 400
    assert total.weight == sum(seed % 7 + 1 for seed in range(400))
    errors = [abs(Fraction(t) - e) for t, e in zip(total.total()["w"].tolist(), exact, strict=True)]
    assert max(errors) < 20 * Fraction(1, 2**36)  # a random walk of 400 halves, not 400 halves one way
    for mean, e in zip(total.mean()["w"].tolist(), exact, strict=True):
        assert mean == pytest.approx(float(e / total.weight), rel=2e-7)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("parts", "rounded"), [(0.75, 1), (0.25, 0), (1.75, 2)])
def test_a_value_between_two_steps_becomes_the_nearer(parts: float, rounded: int, sign: int) -> None:
    total = WeightedSum({"w": TensorSpec((1,))})
    total.add({"w": torch.tensor([sign * parts * 2.0**-36])}, 1)
    assert total.total()["w"].tolist() == [sign * rounded * 2.0**-36]


@pytest.mark.parametrize("weight", [0, -1])
def test_a_weight_that_is_not_positive_is_refused(weight: int) -> None:
    total = WeightedSum(SPEC)
    with pytest.raises(RejectedReply, match="not positive"):
        total.add({"w": torch.ones(4)}, weight)
    assert (total.count, total.weight) == (0, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**61, -(2.0**61)])
def test_what_leaves_the_range_is_refused_and_nothing_of_it_is_folded(value: float) -> None:
    total = WeightedSum(SPEC)
    total.add({"w": torch.ones(4)}, 2)
    with pytest.raises(RejectedReply, match="too large to average"):
        total.add({"w": torch.tensor([1.0, value, 1.0, 1.0])}, 1)
    assert (total.count, total.weight) == (1, 2)
    assert total.mean()["w"].tolist() == [1.0] * 4


def test_where_memory_runs_out_nothing_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second tensor needs a copy, for it is not laid out in one piece, and there is no room for one."""
    spec = {"a": TensorSpec((2,)), "b": TensorSpec((2, 2))}
    total = WeightedSum(spec)
    total.add({"a": torch.ones(2), "b": torch.ones(2, 2)}, 1)
    plain = torch.Tensor.reshape

    def reshape(self: torch.Tensor, *shape: int) -> torch.Tensor:
        if not self.is_contiguous():
            raise MemoryError
        return plain(self, *shape)

    reply = {"a": torch.full((2,), 9.0), "b": torch.full((2, 3), 9.0)[:, :2]}
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "reshape", reshape)
        # Whoever converts, copies.
        patch.setattr(torch.Tensor, "to", lambda self, *_: reshape(self, *self.shape))
        with pytest.raises(MemoryError):
            total.add(reply, 1)
    assert (total.count, total.weight) == (1, 1)
    assert {name: tensor.tolist() for name, tensor in total.mean().items()} == {
        "a": [1.0, 1.0],
        "b": [[1.0, 1.0], [1.0, 1.0]],
    }


def test_pieces_add_up_to_the_whole() -> None:
    """A tensor of more values than are added at a time, against numpy's integers."""
    values = torch.randn(150_000, generator=torch.Generator().manual_seed(0)) * 1e3
    total = WeightedSum({"w": TensorSpec((3, 50_000))})
    for weight in (3, 10**6):
        total.add({"w": values.reshape(3, 50_000)}, weight)
    wanted = sum(np.rint(values.double().numpy() * weight * 2.0**36) for weight in (3.0, 1e6))
    found = total.total()["w"].reshape(-1).numpy()
    np.testing.assert_allclose(found, wanted / 2.0**36, rtol=1e-15)
