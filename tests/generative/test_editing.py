"""Editing with latents: exact conditionals of a linear model, arcs and means by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_vae import NOISE, decode, encode, linear_model, log_likelihood

from metagen_jax.errors import UserError
from metagen_jax.generative.editing import (
    attribute_direction,
    spherical_interpolation,
    vae_complete,
)

KEY = jax.random.key(0)


def draw(key, mean):
    return mean + NOISE * jax.random.normal(key, mean.shape, mean.dtype)


@pytest.mark.parametrize("error", [0.0, 0.05])
def test_completions_have_the_conditional_distribution_of_a_linear_model(error):
    """`x ~ N(b, W W^T + noise^2 1)`: mean and covariance of the last two given the first two."""
    rng = np.random.default_rng(0)
    params = linear_model(rng, error)
    # Likely under the model, or the chain takes longer to forget a start far away.
    x = draw(KEY, decode(params, jnp.array([1.0, -1.0])))
    weights, offset = (np.asarray(params["decoder"][n]) for n in ("weights", "offset"))
    covariance = weights @ weights.T + NOISE**2 * np.eye(4)
    gain = covariance[2:, :2] @ np.linalg.inv(covariance[:2, :2])
    mean = offset[2:] + gain @ (np.asarray(x)[:2] - offset[:2])
    spread = covariance[2:, 2:] - gain @ covariance[:2, 2:]

    complete = vae_complete(encode, decode, log_likelihood, draw, num_steps=150, num_warmup=10)
    known = np.array([True, True, False, False])
    keys = jax.random.split(KEY, 4000)
    drawn = jax.jit(jax.vmap(complete, in_axes=(None, None, None, 0)))(params, x, known, keys)
    np.testing.assert_array_equal(drawn[:, :2], np.broadcast_to(x[:2], (4000, 2)))
    scale = np.sqrt(np.diag(spread))
    np.testing.assert_allclose((drawn[:, 2:].mean(0) - mean) / scale, 0, atol=0.08)
    np.testing.assert_allclose(np.cov(drawn[:, 2:].T), spread, atol=0.08 * spread.max())


def test_an_arc_keeps_the_length_and_passes_at_even_angles():
    first, last = jnp.array([2.0, 0.0]), jnp.array([0.0, 2.0])
    for weight in (0.0, 0.25, 1 / 3, 1.0):
        angle = weight * np.pi / 2
        expected = 2 * np.array([np.cos(angle), np.sin(angle)])
        actual = spherical_interpolation(first, last, weight)
        np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("last", [[3.0, 6.0], [1.0, 2.0], [0.0, 0.0]])
def test_where_there_is_no_arc_the_line_is_straight_and_its_gradient_finite(last):
    first, last = jnp.array([1.0, 2.0]), jnp.array(last)
    actual = spherical_interpolation(first, last, 0.25)
    np.testing.assert_allclose(actual, 0.75 * first + 0.25 * last, atol=1e-6)
    gradient = jax.grad(lambda x: spherical_interpolation(x, last, 0.25).sum())(first)
    assert jnp.isfinite(gradient).all()


def test_an_attribute_is_a_difference_of_means():
    latents = jnp.array([[1.0, 0.0], [3.0, 2.0], [0.0, 5.0]])
    direction = attribute_direction(latents, np.array([True, True, False]))
    np.testing.assert_allclose(direction, [2.0, -4.0])


def test_mistakes_are_named():
    with pytest.raises(UserError, match="num_steps is 0"):
        vae_complete(encode, decode, log_likelihood, draw, num_steps=0)
    with pytest.raises(UserError, match="num_warmup is -1"):
        vae_complete(encode, decode, log_likelihood, draw, num_steps=150, num_warmup=-1)
