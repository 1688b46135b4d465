"""Random rotations are uniform: every direction of space is as likely to become the first axis."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fedllm.codecs.stages.rotate import _uniform
from fedllm.randomness import stream


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 5])
def test_the_columns_of_a_random_rotation_are_uniform_on_the_sphere(size: int) -> None:
    """Of a uniform unit vector of n values, (1 + x) / 2 has the beta distribution ((n-1)/2, (n-1)/2)."""
    matrices = np.stack([_uniform(stream(0, "rotation", index), size) for index in range(2000)])
    identity = np.einsum("kij,kil->kjl", matrices, matrices)
    np.testing.assert_allclose(identity, np.broadcast_to(np.eye(size), identity.shape), atol=1e-5)
    half = (size - 1) / 2
    for row in range(size):
        for column in range(size):
            found = stats.kstest((1 + matrices[:, row, column]) / 2, stats.beta(half, half).cdf)
            assert found.pvalue > 1e-4
