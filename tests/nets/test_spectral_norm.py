"""Spectral norms against singular values, their derivatives, and any net's kernels."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from metagen_jax.errors import UserError
from metagen_jax.nets.conv4 import Conv4
from metagen_jax.nets.mlp import MLP
from metagen_jax.nets.spectral_norm import (
    add_spectral_vectors,
    normalise_kernels,
    power_iteration,
    spectral_norm,
    update_spectral_vectors,
)

KEY = jax.random.key(0)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def example(*shape):
    rng = np.random.default_rng(0)
    kernel, vector = rng.normal(size=shape), rng.normal(size=shape[-1])
    return jnp.asarray(kernel), jnp.asarray(vector / np.linalg.norm(vector))


@pytest.mark.parametrize("shape", [(4, 6), (7, 3), (3, 3, 2, 5), (4, 1)])
@pytest.mark.slow
def test_power_iteration_finds_the_largest_singular_value_from_below(float64, shape):
    kernel, vector = example(*shape)
    matrix = np.asarray(kernel).reshape(-1, shape[-1]).T
    first = matrix.T @ vector
    expected = np.linalg.norm(matrix @ first) / np.linalg.norm(first)
    norm = jax.jit(spectral_norm)
    np.testing.assert_allclose(norm(kernel, vector), expected, rtol=1e-12)
    for _ in range(300):
        lower, vector = norm(kernel, vector), jax.jit(power_iteration)(kernel, vector)
        assert lower <= norm(kernel, vector) * (1 + 1e-12)
        np.testing.assert_allclose(jnp.linalg.norm(vector), 1, rtol=1e-12)
    left, values, right = np.linalg.svd(matrix)
    np.testing.assert_allclose(norm(kernel, vector), values[0], rtol=1e-12)
    # At the singular vectors the derivative is their product: equation 10 of Miyato et al. 2018.
    slope = np.asarray(jax.grad(spectral_norm)(kernel, vector)).reshape(-1, shape[-1]).T
    np.testing.assert_allclose(slope, np.outer(left[:, 0], right[0]), atol=1e-8)


def test_derivatives_up_to_the_second_equal_finite_differences(float64):
    """Away from the singular vector, where constant vectors would leave terms out."""
    kernel, vector = example(3, 4)
    slope = jax.jit(jax.grad(spectral_norm))
    value = jax.jit(lambda kernel: spectral_norm(kernel, vector))
    numerical = references.finite_differences(value, kernel, 1e-3)
    np.testing.assert_allclose(slope(kernel, vector), numerical, rtol=1e-7, atol=1e-9)
    along = jnp.cos(jnp.arange(12.0)).reshape(3, 4)
    paired = jax.jit(lambda kernel: (slope(kernel, vector) * along).sum())
    numerical = references.finite_differences(paired, kernel, 1e-3)
    np.testing.assert_allclose(jax.grad(paired)(kernel), numerical, rtol=1e-7, atol=1e-9)
    np.testing.assert_array_equal(jax.grad(spectral_norm, argnums=1)(kernel, vector), 0)


@pytest.mark.slow
def test_every_kernel_of_a_net_gets_the_norm_one_and_nothing_else_changes():
    net = Conv4(5, num_filters=4, norm="none")
    images = jax.random.normal(KEY, (2, 16, 16, 1))
    plain = jax.jit(net.init)(KEY, images)
    add = jax.jit(functools.partial(add_spectral_vectors, num_iterations=300))
    variables = add(KEY, plain)
    chex.assert_trees_all_equal(variables["params"], plain["params"])
    normalised = jax.jit(normalise_kernels)(variables)
    assert list(normalised) == ["params"]
    for name, layer in normalised["params"].items():
        matrix = layer["kernel"].reshape(-1, layer["kernel"].shape[-1])
        np.testing.assert_allclose(jnp.linalg.norm(matrix, ord=2), 1, rtol=1e-4)
        np.testing.assert_array_equal(layer["bias"], plain["params"][name]["bias"])
    assert np.isfinite(net.apply(normalised, images)).all()


@pytest.mark.slow
def test_vectors_follow_their_kernels_and_no_gradient_moves_them():
    net, x = MLP((4,), 3), jnp.ones((2, 5))
    variables = add_spectral_vectors(KEY, net.init(KEY, x))

    def loss(variables):
        return jnp.square(net.apply(normalise_kernels(variables), x) - 1).sum()

    grads = jax.jit(jax.grad(loss))(variables)
    assert all((g == 0).all() for g in jax.tree.leaves(grads["spectral"]))
    assert jnp.abs(grads["params"]["hidden0"]["kernel"]).max() > 0
    after = update_spectral_vectors(variables)
    chex.assert_trees_all_equal(after["params"], variables["params"])
    for name, layer in variables["params"].items():
        expected = power_iteration(layer["kernel"], variables["spectral"][name]["vector"])
        np.testing.assert_array_equal(after["spectral"][name]["vector"], expected)


@pytest.mark.parametrize("size", [0.0, 1e-15, 1e15])
@pytest.mark.slow
def test_finite_for_kernels_of_zeros_tiny_or_huge_in_float32(size):
    kernel, vector = (jnp.float32(x) for x in example(3, 4))
    value, slope = jax.value_and_grad(spectral_norm)(size * kernel, vector)
    assert np.isfinite(value)
    assert np.isfinite(slope).all()
    np.testing.assert_allclose(
        jnp.linalg.norm(power_iteration(size * kernel, vector)), 1, rtol=1e-6
    )
    variables = {"params": {"kernel": size * kernel}, "spectral": {"vector": vector}}
    curvature = jax.grad(lambda v: jnp.sum(normalise_kernels(v)["params"]["kernel"] ** 2))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(curvature(variables)))


def test_vmap_over_tasks_equals_a_loop(float64):
    kernels, vectors = jnp.stack([example(3, 4)[0], 2 + example(3, 4)[0]]), jnp.eye(4)[:2]
    slope = jax.jit(jax.vmap(jax.value_and_grad(spectral_norm)))(kernels, vectors)
    one = jax.jit(jax.value_and_grad(spectral_norm))
    loop = [one(k, v) for k, v in zip(kernels, vectors, strict=True)]
    chex.assert_trees_all_close(slope, jax.tree.map(lambda *x: jnp.stack(x), *loop), rtol=1e-12)


def test_says_what_is_needed():
    with pytest.raises(UserError, match="no leaf named 'kernel'; there is nothing to normalise"):
        add_spectral_vectors(KEY, {"params": {"bias": jnp.zeros(3)}})
    with pytest.raises(UserError, match=r"hold \['params'\] and no 'spectral'; give those of"):
        normalise_kernels({"params": {"kernel": jnp.zeros((2, 3))}})
