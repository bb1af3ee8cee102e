"""The net of next frames: copies at first, sees the frames it should, draws pixels in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pixel_models import random_params

from metagen_jax.errors import UserError
from metagen_jax.nets.next_frame import NextFrame

NET = NextFrame(features=3, num_seen=2)


def example():
    return np.random.default_rng(0).normal(size=(1, 4, 8, 12, 1)).astype(np.float32)


@pytest.mark.slow
def test_an_untrained_net_copies_the_last_frame():
    frames = example()
    params = NET.init(jax.random.key(0), frames)
    np.testing.assert_array_equal(NET.apply(params, frames), frames)


def test_a_prediction_sees_its_frames_and_no_later_ones():
    with jax.enable_x64(True):
        frames = jnp.asarray(example(), jnp.float64)
        params = random_params(NET, frames)
        change = jax.jit(lambda x: (NET.apply(params, x) - x).sum((0, 2, 3, 4)))
        seen = np.abs(jax.jacobian(change)(frames)).max((1, 3, 4, 5)) > 0
        expected = np.tri(4, dtype=bool) & ~np.tri(4, k=-2, dtype=bool)
        np.testing.assert_array_equal(seen, expected)


def test_what_is_changed_is_changed_where_it_is():
    """A head of biases alone: a number for each of the four pixels of a block."""
    frames = example()
    params = jax.tree.map(jnp.zeros_like, NET.init(jax.random.key(0), frames))
    params["params"]["head"]["bias"] = jnp.array([1.0, 2.0, 3.0, 4.0])
    change = np.asarray(NET.apply(params, np.zeros_like(frames)))[0, 0, ..., 0]
    np.testing.assert_array_equal(change, np.tile([[1, 2], [3, 4]], (4, 6)))


@pytest.mark.slow
def test_one_film_at_a_time_is_the_same():
    frames = np.concatenate([example(), 2 * example()])
    params = random_params(NET, frames)
    together = NET.apply(params, frames)
    alone = [NET.apply(params, film[None])[0] for film in frames]
    np.testing.assert_allclose(np.stack(alone), together, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("ill_typed")
def test_says_what_is_needed():
    with pytest.raises(UserError, match="frames have 8x10 pixels and num_seen is 2"):
        NET.init(jax.random.key(0), np.zeros((1, 2, 8, 10, 1)))
