"""Statistics over time: against each sequence alone, padding, none at all."""

import jax
import numpy as np
import pytest

from metagen_jax.nets.time_statistics import time_statistics

FRAMES = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)
LENGTHS = np.array([5, 2, 0])
VALID = np.arange(5) < LENGTHS[:, None]


def test_they_are_those_of_each_sequence_without_its_padding():
    actual = jax.jit(time_statistics)(FRAMES, VALID)
    for row, frames, length in zip(actual, FRAMES, LENGTHS, strict=True):
        if length:
            seen = frames[:length]
            expected = np.concatenate([seen.mean(0), seen.std(0), seen.max(0)])
            np.testing.assert_allclose(row, expected, rtol=1e-5)
    np.testing.assert_array_equal(actual[2], 0)


@pytest.mark.slow
def test_padding_has_no_part_in_them_and_derivatives_are_finite():
    other = np.where(VALID[..., None], FRAMES, 1e30)
    np.testing.assert_array_equal(
        time_statistics(other, VALID), time_statistics(np.float32(FRAMES), VALID)
    )
    one = np.arange(5) < np.array([5, 1, 0])[:, None]
    gradient = jax.grad(lambda x: time_statistics(x, one).sum())(FRAMES)
    assert np.isfinite(gradient).all()
    assert (gradient[~one] == 0).all()
