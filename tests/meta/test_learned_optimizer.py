"""The learned optimiser as an optax optimiser and as a rule, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagen_jax.errors import UserError
from metagen_jax.meta.learned_optimizer import (
    init_learned_optimizer,
    learned_optimizer,
    log_and_sign,
)

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def trained():
    """Parameters of a rule whose network says something."""
    params = init_learned_optimizer(KEY, hidden=(5,), decays=(0.5, 0.9))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.3 * jnp.asarray(rng.normal(size=x.shape)), params)


def take(rule_params, params, grads):
    optimizer = learned_optimizer(rule_params)
    state = optimizer.init(params)
    for grad in grads:
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_untrained_it_leaves_all_as_it_is():
    params = {"a": jnp.ones((2, 3)), "b": jnp.arange(2.0)}
    after = take(init_learned_optimizer(KEY), params, [params] * 3)
    jax.tree.map(np.testing.assert_array_equal, after, params)


def test_log_and_sign_by_hand():
    x = jnp.array([jnp.e**2, -(jnp.e**-5), 0.0, 1e-6])
    expected = [[0.2, 1], [-0.5, -1], [-1, 0], [-1, 1e-6 * np.exp(10)]]
    np.testing.assert_allclose(log_and_sign(x), expected, rtol=1e-12, atol=1e-12)


def test_coordinates_are_treated_alike_whatever_their_order_and_shape():
    rng = np.random.default_rng(1)
    params, grads = jnp.asarray(rng.normal(size=6)), jnp.asarray(rng.normal(size=(2, 6)))
    order = rng.permutation(6)
    after = take(trained(), params, grads)
    np.testing.assert_allclose(take(trained(), params[order], grads[:, order]), after[order])
    shaped = take(trained(), params.reshape(2, 3), grads.reshape(2, 2, 3))
    np.testing.assert_allclose(shaped.ravel(), after, rtol=1e-12)
    assert np.abs(after - params).min() > 0


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0, 1e8])
def test_steps_and_meta_gradients_are_finite_whatever_the_size_of_gradients(scale):
    params = jnp.array([0.0, 1.0, -2.0])

    def after(rule_params):
        return jnp.sum(take(rule_params, params, [scale * jnp.array([0.0, 1.0, -1.0])] * 3) ** 2)

    grads = jax.jit(jax.grad(after))(trained())
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_a_step_is_bounded_relative_to_the_size_of_the_leaf():
    rule_params = trained()
    large = rule_params._replace(layers=jax.tree.map(lambda x: 1e6 * x, rule_params.layers))
    params = {"small": jnp.full(3, 0.01), "large": jnp.full((2, 2), 7.0)}
    grads = jax.tree.map(lambda x: 1e3 * jnp.arange(1.0, 1 + x.size).reshape(x.shape), params)
    after = take(large, params, [grads])
    for name, x in params.items():
        bound = 0.05 * np.exp(3) * np.sqrt(np.mean(x**2) + 0.01)
        step = np.abs(after[name] - x).max()
        assert 0 < step <= bound * (1 + 1e-9)


def test_meta_gradient_equals_finite_differences():
    def loss(rule_params):
        optimizer = learned_optimizer(rule_params)
        params = jnp.array([1.0, -0.5])
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(2 * params, state, params)
            params = params + updates
        return jnp.sum(params**2)

    rule_params = trained()
    grads = jax.jit(jax.grad(loss))(rule_params)
    value, size = jax.jit(loss), 1e-6
    kernel, bias = rule_params.layers[-1]
    for index in np.ndindex(kernel.shape):
        ends = [
            value(
                rule_params._replace(
                    layers=(*rule_params.layers[:-1], (kernel.at[index].add(d), bias))
                )
            )
            for d in (size, -size)
        ]
        numerical = (ends[0] - ends[1]) / (2 * size)
        np.testing.assert_allclose(grads.layers[-1][0][index], numerical, rtol=1e-5, atol=1e-9)


def test_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match=r"decays are \(1.0,\)"):
        init_learned_optimizer(KEY, decays=(1.0,))
    optimizer = learned_optimizer(trained())
    with pytest.raises(UserError, match="needs the parameters"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))
