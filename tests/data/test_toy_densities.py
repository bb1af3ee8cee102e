"""Toy densities against SciPy, quadrature and counts of draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from metagen_jax.data.toy_densities import CHECKERBOARD, EIGHT_GAUSSIANS, TWO_MOONS

DENSITIES = {
    "eight_gaussians": EIGHT_GAUSSIANS,
    "two_moons": TWO_MOONS,
    "checkerboard": CHECKERBOARD,
}


def middles(cells):
    edges = np.linspace(-5, 5, cells + 1)
    return (edges[1:] + edges[:-1]) / 2


def densities_on_grid(density, cells):
    """Of the middles of cells, as rows of y and columns of x."""
    grid = np.stack(np.meshgrid(middles(cells), middles(cells)), axis=-1).reshape(-1, 2)
    log_probs = jax.jit(jax.vmap(density.log_prob))(jnp.float32(grid))
    return np.exp(np.float64(log_probs)).reshape(cells, cells)


@pytest.mark.parametrize("name", DENSITIES)
def test_mass_is_one_and_draws_fall_where_it_is(name):
    density = DENSITIES[name]
    on_grid = densities_on_grid(density, 200)
    np.testing.assert_allclose(on_grid.sum() * 0.05**2, 1, atol=2e-6)

    num = 40_000
    draws = jax.jit(jax.vmap(density.sample))(jax.random.split(jax.random.key(0), num))
    counts, _, _ = np.histogram2d(draws[:, 1], draws[:, 0], bins=20, range=[[-5, 5]] * 2)
    assert counts.sum() == num
    expected = num * 0.05**2 * on_grid.reshape(20, 10, 20, 10).sum((1, 3))
    assert (counts[expected < 1e-3] == 0).all()
    often = expected > 20
    chi_squared = (np.square(counts - expected) / np.maximum(expected, 1e-9))[often].sum()
    assert 1e-4 < stats.chi2.sf(chi_squared, often.sum() - 1) < 1 - 1e-4


def test_eight_gaussians_by_scipy():
    x = np.array([1.0, 2.5])
    angles = np.arange(8) * np.pi / 4
    each = [
        stats.multivariate_normal.pdf(x, 3 * np.array([np.cos(a), np.sin(a)]), 1 / 16)
        for a in angles
    ]
    actual = EIGHT_GAUSSIANS.log_prob(jnp.asarray(x))
    np.testing.assert_allclose(actual, np.log(np.mean(each)), rtol=1e-5)


@pytest.mark.parametrize("x", [[1.0, -0.5], [0.9, 1.2], [-3.0, -0.6], [4.0, 3.0]])
def test_two_moons_by_quadrature(x):
    def density(angle, sign):
        point = sign * 2 * np.array([np.cos(angle) - 0.5, np.sin(angle) - 0.25])
        return stats.norm.pdf(np.asarray(x), point, 0.2).prod() / (2 * np.pi)

    expected = sum(
        integrate.quad(density, 0, np.pi, args=(sign,), epsrel=1e-10, epsabs=0, limit=200)[0]
        for sign in (1, -1)
    )
    actual = TWO_MOONS.log_prob(jnp.asarray(x))
    np.testing.assert_allclose(actual, np.log(expected), rtol=1e-5, atol=2e-5)


def test_checkerboard_by_hand():
    inside = jnp.array([[1.0, 1.0], [-1.0, -1.0], [3.9, -0.1], [-3.0, 1.5]])
    outside = jnp.array([[1.0, -1.0], [3.0, 1.5], [5.0, 5.0], [-1.0, 5.0]])
    log_prob = jax.vmap(CHECKERBOARD.log_prob)
    np.testing.assert_allclose(log_prob(inside), -np.log(32), rtol=1e-6)
    assert log_prob(outside).max() == -np.inf
