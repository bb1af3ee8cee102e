"""Small models of images with random parameters, and what several tests ask of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np


def random_params(net, *inputs, seed=0, scale=0.5):
    """Parameters in float64 far enough from zero that leaving one out shows."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape)), shapes)


def dependence(net, params, shape):
    """`(h, w, h, w)`: whether the output at one pixel changes with the input at another.

    Any derivative of any output by any channel, at three images of real numbers.
    """

    @jax.jit
    def jacobian(image):
        return jax.jacobian(lambda x: net.apply(params, x))(image)

    images = np.random.default_rng(1).normal(size=(3, *shape))
    return np.any([np.abs(jacobian(x)).max((2, 5)) > 0 for x in images], axis=0)


def pixels_before(height, width):
    """`(h, w, h, w)`: whether the second pixel is before the first, row by row."""
    before = np.tril(np.ones((height * width,) * 2, bool), -1)
    return before.reshape(height, width, height, width)


def all_images(height, width, *, num_levels=2):
    """Every image of one channel."""
    levels = itertools.product(range(num_levels), repeat=height * width)
    return np.array(list(levels)).reshape(-1, height, width, 1)
