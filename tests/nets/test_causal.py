"""Levels as numbers, and windows over what comes before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.errors import UserError
from metagen_jax.nets.causal import before, scale_levels


def test_levels_reach_from_minus_one_to_one_whatever_they_are_stored_in():
    for dtype in (np.uint8, np.int32, np.float32):
        levels = np.array([0, 51, 255], dtype)
        scaled = jax.jit(lambda x: scale_levels(x, 256))(levels)
        assert scaled.dtype == jnp.float32
        np.testing.assert_allclose(scaled, [-1, -0.6, 1], rtol=1e-6)
    np.testing.assert_array_equal(scale_levels(np.array([False, True]), 2), [-1, 1])


def test_refuses_fewer_than_two_levels():
    with pytest.raises(UserError, match="num_levels is 1; give 2 or more"):
        scale_levels(np.zeros(3), 1)


@pytest.mark.parametrize("axis", [-3, -2])
def test_windows_end_at_the_entry_or_right_before_it(axis):
    x = jnp.moveaxis(jnp.arange(1.0, 5).reshape(4, 1, 1), 0, axis)
    expected = {True: [0, 0, 1, 2, 3, 4], False: [0, 0, 1, 2, 3]}
    for current, entries in expected.items():
        padded = before(x, axis=axis, reach=2, current=current)
        np.testing.assert_array_equal(padded.ravel(), entries)
        assert padded.shape[axis] == len(entries)
