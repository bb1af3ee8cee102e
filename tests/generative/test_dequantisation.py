"""Bounds on discrete log-probabilities: exact cases by hand, and from below as theory says."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.scipy.special import expit, logit

from metagen_jax.errors import UserError
from metagen_jax.generative.dequantisation import (
    dequantized_log_prob,
    inverse_logit_transform,
    logit_density,
    logit_transform,
    quantize,
    sigmoid_noise,
)
from metagen_jax.generative.likelihoods import bits_per_dim, gaussian_log_prob, sample_gaussian

KEY = jax.random.key(0)
LEVELS = 4
IMAGE = np.array([[0, 1], [3, 2]])
MEANS = np.array([[0.1, 0.4], [0.8, 0.3]])
SCALE = 0.05


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def uniform(y):
    """A density of 1 in each of the dimensions."""
    return 0 * y.sum()


def logistics(y):
    """A product of logistic densities, and so with masses in closed form."""
    z = (y - MEANS) / SCALE
    return (-z - 2 * jnp.logaddexp(0, -z) - np.log(SCALE)).sum()


def logistics_by_dimension(value):
    """The log-density of each dimension on a grid of the noise, in NumPy."""
    noise = (np.arange(10_000) + 0.5) / 10_000
    z = ((value[..., None] + noise) / LEVELS - MEANS[..., None]) / SCALE
    return -z - 2 * np.logaddexp(0, -z) - np.log(SCALE)


def exact(value):
    """The log-probability of the levels by the distribution function, in NumPy."""
    below, above = (1 / (1 + np.exp(-(x / LEVELS - MEANS) / SCALE)) for x in (value, value + 1))
    return np.log(above - below).sum()


def posterior_noise(key, levels):
    """Noise in proportion to the density in each bin, by its inverse distribution function."""
    below, above = (expit((x / LEVELS - MEANS) / SCALE) for x in (levels, levels + 1))
    y = MEANS + SCALE * logit(below + (above - below) * jax.random.uniform(key, levels.shape))
    log_mass = jnp.log(above - below).sum()
    return LEVELS * y - levels, logistics(y) - log_mass - levels.size * jnp.log(LEVELS)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_uniform_density_gives_8_bits_a_dimension(num_samples):
    image = np.arange(256).reshape(16, 16)
    bound = dequantized_log_prob(KEY, image, uniform, num_samples=num_samples)
    assert bits_per_dim(bound, num_dims=256) == pytest.approx(8, rel=1e-6)


@pytest.mark.parametrize("alpha", [1e-6, 0.05, 0.25])
def test_a_uniform_density_behind_the_logit_gives_8_bits_and_what_is_lost_outside(alpha):
    """`t = sigma(z)` uniform in [0, 1], of which `y` takes up 1 - 2 alpha."""
    density = logit_density(lambda z: (-z - 2 * jnp.logaddexp(0, -z)).sum(), alpha=alpha)
    image = np.arange(256).reshape(16, 16)
    bound = dequantized_log_prob(KEY, image, density)
    expected = 8 - np.log2(1 - 2 * alpha)
    assert bits_per_dim(bound, num_dims=256) == pytest.approx(expected, rel=1e-6)


def test_all_of_the_mass_in_the_right_bins_is_0_bits_and_spread_over_two_levels_1_bit():
    """A density of 4, or of 2, where there is any, of 4 levels."""
    for low, high, bits in ((IMAGE, IMAGE + 1, 0), (IMAGE - 1, IMAGE + 1, 1)):

        def log_density(y, low=low, high=high):
            inside = (LEVELS * y >= low) & (LEVELS * y <= high)
            return jnp.where(inside, jnp.log(LEVELS / (high - low)), -jnp.inf).sum()

        bound = dequantized_log_prob(KEY, IMAGE, log_density, num_levels=LEVELS)
        assert bits_per_dim(bound, num_dims=4) == pytest.approx(bits, abs=1e-6)


def test_bounds_rise_with_the_number_of_samples_to_the_exact_log_probability(float64):
    keys = jax.random.split(KEY, 4000)
    bounds, errors = [], []
    for num_samples in (1, 8, 64):

        def bound(key, num_samples=num_samples):
            return dequantized_log_prob(
                key, IMAGE, logistics, num_samples=num_samples, num_levels=LEVELS
            )

        each = np.asarray(jax.jit(jax.vmap(bound))(keys))
        bounds.append(each.mean())
        errors.append(each.std() / np.sqrt(len(keys)))
    for lower, error, higher in zip(bounds, errors, [*bounds[1:], exact(IMAGE)], strict=True):
        assert lower + 3 * error < higher
    gaps = exact(IMAGE) - np.array(bounds)
    assert gaps[0] > 1
    # By the delta method half the relative variance of the mean of S weights.
    masses = np.exp(logistics_by_dimension(IMAGE)) / LEVELS
    variance = np.prod((masses**2).mean(-1) / masses.mean(-1) ** 2) - 1
    for num_samples, gap, error in zip((8, 64), gaps[1:], errors[1:], strict=True):
        assert abs(gap - variance / (2 * num_samples)) < 5 * error


def test_the_bound_of_one_sample_equals_an_integral_over_the_noise(float64):
    """Dimension by dimension, on a grid of the noise."""
    keys = jax.random.split(KEY, 4000)

    def bound(key):
        return dequantized_log_prob(key, IMAGE, logistics, num_levels=LEVELS)

    each = np.asarray(jax.jit(jax.vmap(bound))(keys))
    expected = (logistics_by_dimension(IMAGE).mean(-1) - np.log(LEVELS)).sum()
    assert abs(each.mean() - expected) < 5 * each.std() / np.sqrt(len(keys))


@pytest.mark.parametrize("num_samples", [1, 2])
def test_noise_in_proportion_to_the_density_is_exact_for_every_draw(float64, num_samples):
    options = {"noise": posterior_noise, "num_samples": num_samples, "num_levels": LEVELS}
    bound = jax.jit(jax.vmap(lambda key: dequantized_log_prob(key, IMAGE, logistics, **options)))
    np.testing.assert_allclose(bound(jax.random.split(KEY, 5)), exact(IMAGE), rtol=1e-12)


def test_density_of_sigmoid_noise_integrates_to_one(float64):
    u = (np.arange(4000) + 0.5) / 4000
    z = np.log(u) - np.log1p(-u)

    def log_density(z):
        noise = sigmoid_noise(lambda key, levels: (z, gaussian_log_prob(z, 0.4, 0.3).sum()))
        actual, log_prob = noise(KEY, jnp.zeros(1))
        return actual, log_prob

    actual, log_probs = jax.vmap(log_density)(jnp.asarray(z)[:, None])
    np.testing.assert_allclose(actual[:, 0], u, rtol=1e-12)
    np.testing.assert_allclose(np.exp(log_probs).mean(), 1, rtol=1e-6)


def gaussian_noise(parameters):
    """Noise that is Gaussian before the sigmoid, with a mean that depends on the level."""

    def sample(key, levels):
        mean = parameters["slope"] * levels + parameters["bias"]
        z = sample_gaussian(key, mean, parameters["log_std"])
        return z, gaussian_log_prob(z, mean, parameters["log_std"]).sum()

    return sigmoid_noise(sample)


def variational_bound(parameters, key, value):
    def density(z):
        return gaussian_log_prob(z, parameters["means"], -0.5).sum()

    return dequantized_log_prob(
        key,
        value,
        logit_density(density, alpha=0.05),
        noise=gaussian_noise(parameters),
        num_samples=2,
        num_levels=LEVELS,
    )


PARAMETERS = {"slope": 0.2, "bias": -0.1, "log_std": 0.3, "means": MEANS}


@pytest.mark.slow
def test_gradient_equals_finite_differences_under_jit_and_vmap(float64):
    """With respect to the density's parameters and those of the noise, through the samples."""
    grad_fn = jax.jit(jax.value_and_grad(variational_bound))
    first, second = jax.random.split(KEY)
    parameters = jax.tree.map(jnp.asarray, PARAMETERS)
    opposite = jax.tree.map(lambda x: -0.6 * x, parameters)
    tasks = [(parameters, first, IMAGE), (opposite, second, IMAGE[::-1])]
    loop = [grad_fn(*task) for task in tasks]
    bound = jax.jit(variational_bound)
    numerical = references.finite_differences(
        lambda x: bound(x, *tasks[0][1:]), tasks[0][0], step=1e-3
    )
    chex.assert_trees_all_close(loop[0][1], numerical, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(variational_bound(*tasks[0]), loop[0][0], rtol=1e-12)
    together = jax.jit(jax.vmap(grad_fn))(*jax.tree.map(lambda *x: jnp.stack(x), *tasks))
    alone = jax.tree.map(lambda *x: jnp.stack(x), *loop)
    chex.assert_trees_all_close(together, alone, rtol=1e-12, atol=1e-14)


def test_finite_at_both_ends_of_the_data_and_far_out_in_the_noise():
    """In float32, in which a sigmoid of 20 is 1 and takes the last level to the end of [0, 1]."""
    image = np.tile([0, LEVELS - 1], (2, 1))
    grad_fn = jax.jit(jax.value_and_grad(variational_bound))
    for bias in (-1e3, -20.0, 20.0, 1e3):
        parameters = jax.tree.map(jnp.float32, {**PARAMETERS, "slope": 0.0, "bias": bias})
        leaves = jax.tree.leaves(grad_fn(parameters, KEY, image))
        assert all(np.isfinite(x).all() for x in leaves), bias


@pytest.mark.parametrize("alpha", [1e-6, 0.05])
def test_log_determinant_is_that_of_the_jacobian_and_the_inverse_inverts(float64, alpha):
    y = jnp.asarray(np.random.default_rng(0).uniform(size=5)).at[:2].set(jnp.array([0.0, 1.0]))
    z, log_det = logit_transform(y, alpha=alpha)
    jacobian = jax.jacobian(lambda y: logit_transform(y, alpha=alpha)[0])(y)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], rtol=1e-12)
    np.testing.assert_allclose(z[:2], np.log(alpha / (1 - alpha)) * np.array([1, -1]), rtol=1e-12)
    np.testing.assert_allclose(inverse_logit_transform(z, alpha=alpha), y, rtol=1e-9, atol=1e-9)


def test_a_small_alpha_is_as_exact_in_float32_at_one_end_as_at_the_other():
    y = jnp.float32([0, 1e-6, 0.25])
    low, low_det = logit_transform(y, alpha=1e-6)
    high, high_det = logit_transform(jnp.float32([1, 1 - 2**-20, 0.75]), alpha=1e-6)
    t = 1e-6 + (1 - 2e-6) * np.array([0, 1e-6, 0.25])
    np.testing.assert_allclose(low, np.log(t / (1 - t)), rtol=1e-6)
    t = 1e-6 + (1 - 2e-6) * np.array([0, 2**-20, 0.25])
    np.testing.assert_allclose(high, -np.log(t / (1 - t)), rtol=1e-6)
    np.testing.assert_allclose(high_det, (np.log1p(-2e-6) - np.log(t * (1 - t))).sum(), rtol=1e-6)
    assert low_det != high_det


def test_quantize_undoes_the_noise():
    image = np.arange(256)
    for u in (0.0, 0.5, 0.99):
        np.testing.assert_array_equal(quantize(jnp.float32((image + u) / 256)), image)
    outside = quantize(jnp.array([-0.1, 0.0, 1.0, 1.1]), num_levels=LEVELS)
    np.testing.assert_array_equal(outside, [0, 0, 3, 3])


def test_what_is_no_level_has_probability_zero():
    """Such as images that were scaled already, whose bits per dimension would be anything."""
    for wrong in (IMAGE / 255, IMAGE - 1, IMAGE + 1):
        assert dequantized_log_prob(KEY, wrong, uniform, num_levels=LEVELS) == -jnp.inf


def test_says_what_is_needed():
    def bound(log_density=uniform, **options):
        return dequantized_log_prob(KEY, IMAGE, log_density, **options)

    with pytest.raises(UserError, match="num_samples is 0; give a positive number"):
        bound(num_samples=0)
    with pytest.raises(UserError, match=r"of the data has shape \(2, 2\); give one number, summed"):
        bound(lambda y: 0 * y)
    for noise, message in (
        (lambda key, levels: (levels[0], 0.0), r"the noise has shape \(2,\) for values of shape"),
        (lambda key, levels: (levels, 0 * levels), r"of the noise has shape \(2, 2\); give one"),
    ):
        with pytest.raises(UserError, match=message):
            bound(noise=noise)
    for alpha in (0.0, 0.5, -0.1):
        for use in (
            lambda alpha: logit_transform(jnp.zeros(2), alpha=alpha),
            lambda alpha: inverse_logit_transform(jnp.zeros(2), alpha=alpha),
            lambda alpha: logit_density(uniform, alpha=alpha),
        ):
            with pytest.raises(UserError, match=f"alpha is {alpha}; give a number between 0 and"):
                use(alpha)
