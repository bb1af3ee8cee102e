"""Rational-quadratic splines against a loop over numbers, their inverse, and extremes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from metagen_jax.errors import UserError
from metagen_jax.generative.splines import (
    MIN_BIN_SIZE,
    inverse_rational_quadratic_spline,
    rational_quadratic_spline,
)

BOUND = 3.0
spline = jax.jit(functools.partial(rational_quadratic_spline, bound=BOUND))
inverse = jax.jit(functools.partial(inverse_rational_quadratic_spline, bound=BOUND))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def parameters(num_numbers, num_bins=5, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    sizes = (num_bins, num_bins, num_bins - 1)
    return tuple(jnp.asarray(scale * rng.normal(size=(n, num_numbers))) for n in sizes)


def numbers(count):
    """Some of them outside of the bound, and its ends."""
    x = np.random.default_rng(1).uniform(-1.2 * BOUND, 1.2 * BOUND, count)
    x[:2] = -BOUND, BOUND
    return jnp.asarray(x)


@pytest.mark.parametrize("num_bins", [1, 2, 5])
def test_equals_a_loop_over_numbers(float64, num_bins):
    x, theta = numbers(50), parameters(50, num_bins)
    y, log_slope = spline(x, *theta)
    columns = zip(x, *(np.asarray(p).T for p in theta), strict=True)
    expected = [references.rational_quadratic_spline(*column, BOUND) for column in columns]
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    slopes = jax.vmap(jax.grad(lambda *args: spline(*args)[0]), (0, 1, 1, 1))(x, *theta)
    np.testing.assert_allclose(log_slope, np.log(slopes), rtol=1e-9, atol=1e-12)


def test_worked_by_hand(float64):
    """Two bins of width 3 with knots at (-3, -3), (0, y1), (3, 3), slopes of 1 everywhere."""
    y1 = 3 - 6 * (MIN_BIN_SIZE + (1 - 2 * MIN_BIN_SIZE) / 4)
    theta = jnp.zeros(2), jnp.log(jnp.array([3.0, 1.0])), jnp.zeros(1)
    s0, s1 = (3 + y1) / 3, (3 - y1) / 3
    for x, expected in (
        (-3.0, -3.0),
        (-1.5, -3 + (3 + y1) * (s0 / 4 + 1 / 4) / (s0 + (2 - 2 * s0) / 4)),
        (0.0, y1),
        (1.5, y1 + (3 - y1) * (s1 / 4 + 1 / 4) / (s1 + (2 - 2 * s1) / 4)),
        (3.0, 3.0),
        (17.0, 17.0),
    ):
        y, log_slope = spline(jnp.asarray(x), *theta)
        np.testing.assert_allclose(y, expected, rtol=1e-14)
        if x in (-3, 0, 3, 17):
            assert log_slope == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("function", [spline, inverse])
def test_zeros_are_the_identity_with_a_slope_of_one(float64, function):
    x = numbers(20).at[2].set(0.0)
    theta = jax.tree.map(jnp.zeros_like, parameters(20, 6))
    y, log_slope = function(x, *theta)
    np.testing.assert_allclose(y, x, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(log_slope, 0, atol=1e-12)
    # Also on a knot: both 0 and what rounding puts beside it belong to a bin with all of the slope.
    slope = jax.grad(lambda x: function(x, *(p[:, 0] for p in theta))[0])(0.0)
    np.testing.assert_allclose(slope, 1, rtol=1e-12)


@pytest.mark.parametrize(("scale", "tolerance"), [(0.1, 1e-12), (1, 1e-11), (3, 1e-9)])
def test_inverse_inverts_in_float64(float64, scale, tolerance):
    x, theta = numbers(2000), parameters(2000, 8, scale)
    y, log_slope = spline(x, *theta)
    back, log_slope_back = inverse(y, *theta)
    np.testing.assert_allclose(back, x, atol=tolerance)
    np.testing.assert_allclose(log_slope_back, -log_slope, atol=1e3 * tolerance)


def test_inverse_inverts_in_float32():
    x, theta = jax.tree.map(jnp.float32, (numbers(2000), parameters(2000, 8)))
    y, log_slope = spline(x, *theta)
    back, log_slope_back = inverse(y, *theta)
    error = np.abs(back - x)
    # Where the spline is flat, the last digit of y stands for many of x.
    assert (error * np.exp(log_slope) < 2e-6).all()
    assert (error[log_slope > -3] < 1e-4).all()
    np.testing.assert_allclose(log_slope_back, -log_slope, atol=1e-2)


@pytest.mark.parametrize("function", [spline, inverse])
def test_gradients_of_first_and_second_order_equal_finite_differences(float64, function):
    arguments = (jnp.array([-0.7, 1.9]), *parameters(2, 3))

    def value(x, *theta):
        y, log_slope = function(x, *theta)
        return jnp.sum(jnp.sin(y) + log_slope**2)

    @jax.jit
    def both_orders(arguments):
        result, grads = jax.value_and_grad(value, argnums=(0, 1, 2, 3))(*arguments)
        return result + sum(jnp.sum(jnp.sin(g)) for g in grads)

    grads = jax.jit(jax.grad(both_orders))(arguments)
    numerical = references.finite_differences(both_orders, arguments, 1e-4)
    chex.assert_trees_all_close(grads, numerical, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("function", [spline, inverse])
def test_jit_and_vmap_over_tasks_change_nothing(float64, function):
    def value_and_grads(x, *theta):
        def value(*args):
            y, log_slope = function(*args)
            return jnp.sum(y**2 + log_slope)

        return jax.value_and_grad(value, argnums=(0, 1, 2, 3))(x, *theta)

    tasks = [(numbers(7)[::sign], *parameters(7, seed=seed)) for seed, sign in ((0, 1), (1, -1))]
    loop = [jax.jit(value_and_grads)(*task) for task in tasks]
    with jax.disable_jit():
        chex.assert_trees_all_close(value_and_grads(*tasks[0]), loop[0], rtol=1e-10, atol=1e-11)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *tasks)
    together = jax.jit(jax.vmap(value_and_grads))(*stacked)
    expected = jax.tree.map(lambda *a: jnp.stack(a), *loop)
    chex.assert_trees_all_close(together, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("function", [spline, inverse])
@pytest.mark.parametrize("scale", [0.0, 1e2, 1e4])
def test_finite_in_value_and_gradient_at_extremes_in_float32(function, scale):
    """On all knots and beside them, where a bin may be as narrow or as flat as is allowed."""
    theta = jax.tree.map(jnp.float32, parameters(1, 8, scale))
    knots = []
    for logits in theta[:2]:
        sizes = MIN_BIN_SIZE + (1 - 8 * MIN_BIN_SIZE) * jax.nn.softmax(logits[:, 0])
        knots += list(BOUND * (2 * np.cumsum(sizes) - 1))
    points = np.float32([*knots, 0, -0.0, BOUND, -BOUND, 1e4, -1e4, 1e38])
    points = np.concatenate([points, np.nextafter(points, 0), np.nextafter(points, np.inf)])
    theta = jax.tree.map(lambda p: jnp.repeat(p, len(points), axis=1), theta)

    @jax.jit
    def evaluate(x, *theta):
        def total(*args):
            y, log_slope = function(*args)
            return jnp.where(jnp.abs(y) < 10, y, 0).sum() + log_slope.sum()

        return function(x, *theta), jax.grad(total, argnums=(0, 1, 2, 3))(x, *theta)

    for leaf in jax.tree.leaves(evaluate(points, *theta)):
        assert np.isfinite(leaf).all()


def test_is_monotone_in_float32():
    x = jnp.linspace(-3.1, 3.1, 20_001, dtype=jnp.float32)
    for seed in range(3):
        theta = (p.astype(jnp.float32) for p in parameters(1, 8, 2.0, seed))
        y, _ = spline(x, *(jnp.broadcast_to(p, (len(p), len(x))) for p in theta))
        assert (jnp.diff(y) > -1e-6).all()


@pytest.mark.usefixtures("ill_typed")
def test_says_what_is_needed():
    widths, heights, slopes = parameters(2)
    for function in (rational_quadratic_spline, inverse_rational_quadratic_spline):
        with pytest.raises(UserError, match="5 widths, 5 heights and 5 slopes; give as many"):
            function(jnp.zeros(2), widths, heights, widths, bound=3.0)
        with pytest.raises(UserError, match="5 widths, 4 heights"):
            function(jnp.zeros(2), widths, slopes, slopes, bound=3.0)
        with pytest.raises(UserError, match="bound is 0; give a positive"):
            function(jnp.zeros(2), widths, heights, slopes, bound=0)
        many = jnp.zeros((1000, 2))
        with pytest.raises(UserError, match="there are 1000 bins; give 1 to 999"):
            function(jnp.zeros(2), many, many, many[1:], bound=3.0)
