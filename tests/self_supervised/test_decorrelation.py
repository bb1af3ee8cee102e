"""Barlow Twins and VICReg against loops over features, and values worked by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from metagen_jax.errors import UserError
from metagen_jax.self_supervised.decorrelation import barlow_twins, vicreg

LOSSES = {"barlow_twins": barlow_twins, "vicreg": vicreg}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def pairs(seed=0, shape=(6, 4)):
    return np.random.default_rng(seed).normal(size=(2, *shape)) + 0.5


def test_barlow_twins_equals_a_loop_over_features(float64):
    z_a, z_b = pairs()
    expected = 0.0
    for i in range(4):
        for j in range(4):
            a, b = z_a[:, i] - z_a[:, i].mean(), z_b[:, j] - z_b[:, j].mean()
            c = (a * b).mean() / np.sqrt(((a * a).mean() + 1e-5) * ((b * b).mean() + 1e-5))
            expected += (1 - c) ** 2 if i == j else 0.02 * c**2
    actual = barlow_twins(z_a, z_b, redundancy=0.02)
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_vicreg_equals_a_loop_over_features(float64):
    z_a, z_b = pairs()
    z_a *= 0.7
    expected = 2.0 * np.mean([(a - b) ** 2 for a, b in zip(z_a.ravel(), z_b.ravel(), strict=True)])
    for z in (z_a, z_b):
        for i in range(4):
            expected += 3.0 * max(0, 1 - np.sqrt(np.var(z[:, i], ddof=1) + 1e-4)) / 4
            for j in range(4):
                if i != j:
                    covariance = ((z[:, i] - z[:, i].mean()) * (z[:, j] - z[:, j].mean())).sum() / 5
                    expected += 0.5 * covariance**2 / 4
    actual = vicreg(z_a, z_b, invariance=2.0, variance=3.0, covariance=0.5)
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_by_hand(float64):
    """Uncorrelated features of unit variance lose nothing; equal ones all that they repeat."""
    perfect = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    np.testing.assert_allclose(barlow_twins(perfect, perfect, epsilon=0.0), 0, atol=1e-15)
    np.testing.assert_allclose(vicreg(perfect, perfect), 0, atol=1e-15)
    repeated = perfect[:, [0, 0]]
    np.testing.assert_allclose(
        barlow_twins(repeated, repeated, redundancy=0.1, epsilon=0.0), 0.2, rtol=1e-12
    )
    # Variance and covariance of 4/3 each: c is the mean over two features of (4/3)^2.
    np.testing.assert_allclose(vicreg(repeated, repeated), 2 * (4 / 3) ** 2, rtol=1e-12)
    # Collapsed: no variance, and nothing else to lose.
    np.testing.assert_allclose(
        vicreg(np.ones((3, 2)), np.ones((3, 2))), 25 * 2 * (1 - 0.01), rtol=1e-12
    )
    np.testing.assert_allclose(barlow_twins(np.ones((3, 2)), np.ones((3, 2))), 2.0, rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_jit_vmap_and_swapped_views(float64, name):
    loss = LOSSES[name]
    views = tuple(pairs())
    differentiate = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, grads = differentiate(*views)
    expected = references.finite_differences(lambda v: differentiate(*v)[0], views)
    chex.assert_trees_all_close(grads, expected, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(loss(*views), value, rtol=1e-12)
    np.testing.assert_allclose(loss(*views[::-1]), value, rtol=1e-12)
    others = pairs(1)
    both = jax.vmap(differentiate)(*np.stack([views, others], 1))
    for i, z in enumerate((views, others)):
        one = differentiate(*z)
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], both), one, rtol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_finite_without_variance_and_far_away(name, dtype):
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(2, 6, 3))
    differentiate = jax.jit(jax.value_and_grad(LOSSES[name], argnums=(0, 1)))
    for views in (np.zeros((2, 6, 3)), np.ones((2, 6, 3)), 1e4 * normal, 1e-20 * normal):
        value, grads = differentiate(*jnp.asarray(views, dtype))
        assert value.dtype == jnp.float32
        assert grads[0].dtype == dtype
        chex.assert_tree_all_finite((value, grads))


@pytest.mark.parametrize("name", LOSSES)
def test_what_can_not_be_compared_is_refused(ill_typed, name):
    z_a, z_b = pairs()
    with pytest.raises(UserError, match=r"z_a has shape \(6, 4\) and z_b \(5, 4\)"):
        LOSSES[name](z_a, z_b[:5])
    with pytest.raises(UserError, match="there is 1 example"):
        LOSSES[name](z_a[:1], z_b[:1])
