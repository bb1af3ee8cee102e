"""Editing with latents: exact conditionals of a linear model, arcs and means by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_vae import NOISE, decode, encode, linear_model, log_likelihood

from metagen_jax.errors import UserError
from metagen_jax.generative.bijectors import Bijector
from metagen_jax.generative.editing import (
    attribute_direction,
    flow_complete,
    spherical_interpolation,
    vae_complete,
)
from metagen_jax.generative.flows import flow_log_prob, realnvp

KEY = jax.random.key(0)


def draw(key, mean):
    return mean + NOISE * jax.random.normal(key, mean.shape, mean.dtype)


@pytest.mark.parametrize("error", [0.0, 0.05])
@pytest.mark.slow
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


def linear_flow(rng, size):
    """`z = L x + b`: x is Gaussian."""
    root, at = rng.normal(size=(size, size)) + 2 * np.eye(size), rng.normal(size=size)
    log_det = np.linalg.slogdet(root)[1]
    params = {"root": root, "back": np.linalg.inv(root), "at": at, "log_det": log_det}

    def forward(params, x, condition=None):
        return params["root"] @ x + params["at"], params["log_det"]

    def inverse(params, z, condition=None):
        return params["back"] @ (z - params["at"]), -params["log_det"]

    return Bijector(lambda *_: params, forward, inverse), jax.tree.map(jnp.float32, params)


@pytest.mark.parametrize("noise", [0.2, 1.0])
def test_completions_by_a_flow_have_the_conditional_distribution_of_a_gaussian(noise):
    """Whatever the noise, which guides the chain and is no part of what it draws from."""
    flow, params = linear_flow(np.random.default_rng(0), 3)
    root = np.float64(params["root"])
    precision = root.T @ root
    centre = -np.linalg.solve(root, np.float64(params["at"]))
    known, x = np.array([True, False, False]), centre + np.array([0.5, 0.0, 0.0])
    spread = np.linalg.inv(precision[1:, 1:])
    mean = centre[1:] - spread @ precision[1:, 0] * 0.5

    complete = flow_complete(flow, noise=noise, num_steps=100, num_warmup=50)
    keys = jax.random.split(KEY, 2000)
    run = jax.jit(jax.vmap(complete, in_axes=(None, None, None, 0)))
    drawn = np.asarray(run(params, jnp.float32(x), known, keys))
    np.testing.assert_array_equal(drawn[:, 0], np.float32(x[0]))
    scale = np.sqrt(np.diag(spread))
    np.testing.assert_allclose((drawn[:, 1:].mean(0) - mean) / scale, 0, atol=0.08)
    np.testing.assert_allclose(np.cov(drawn[:, 1:].T), spread, atol=0.1 * spread.max())


@pytest.mark.slow
def test_completions_by_a_bent_flow_have_the_density_on_the_line_of_what_is_known():
    """Against the density of a coupling along that line, by quadrature."""
    flow = realnvp(num_layers=2, hidden_sizes=(6,))
    rng = np.random.default_rng(0)
    params = flow.init(KEY, jnp.asarray(rng.normal(size=(50, 2)), jnp.float32))
    params = jax.tree.map(lambda p: p + jnp.float32(0.4 * rng.normal(size=p.shape)), params)
    line = np.linspace(-12, 12, 2001, dtype=np.float32)
    at = jnp.stack([jnp.full(2001, 0.7), jnp.asarray(line)], axis=1)
    log_prob = flow_log_prob(flow)
    density = np.exp(np.float64(jax.vmap(lambda x: log_prob(params, x, KEY))(at)))
    density /= density.sum()
    mean = (density * line).sum()
    std = np.sqrt((density * (line - mean) ** 2).sum())

    complete = flow_complete(flow, noise=0.3, num_steps=150, num_warmup=50)
    run = jax.jit(jax.vmap(complete, in_axes=(None, None, None, 0)))
    start = jnp.array([0.7, 0.0])
    drawn = run(params, start, np.array([True, False]), jax.random.split(KEY, 2000))[:, 1]
    assert abs(drawn.mean() - mean) < 0.08 * std
    assert abs(drawn.std() / std - 1) < 0.06
    shares = np.searchsorted(np.cumsum(density), [0.1, 0.5, 0.9])
    np.testing.assert_allclose(
        (np.asarray(drawn)[:, None] < line[shares]).mean(0), [0.1, 0.5, 0.9], atol=0.04
    )


def test_a_flow_that_knows_all_changes_nothing():
    flow, params = linear_flow(np.random.default_rng(0), 3)
    x = jnp.array([0.3, -1.0, 2.0])
    complete = flow_complete(flow, noise=0.2, num_steps=2)
    np.testing.assert_array_equal(complete(params, x, np.ones(3, bool), KEY), x)


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
    with pytest.raises(UserError, match="num_steps is 0"):
        flow_complete(realnvp(), noise=0.1, num_steps=0)
    with pytest.raises(UserError, match="noise is 0; give a positive"):
        flow_complete(realnvp(), noise=0, num_steps=1)
    with pytest.raises(UserError, match="step_size is 0; give a positive"):
        flow_complete(realnvp(), noise=0.1, num_steps=1, step_size=0)
