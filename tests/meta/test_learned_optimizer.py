"""The learned optimiser as an optax optimiser and as a rule, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references

from metagen_jax.errors import UserError
from metagen_jax.meta.learned_optimizer import (
    init_learned_optimizer,
    learned_optimizer,
    log_and_sign,
)
from metagen_jax.meta.update_rules import learned_rule_loss
from metagen_jax.types import Episode, MetaParams

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


@jax.jit
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


def test_two_steps_on_two_leaves_equal_numpy():
    rule_params = trained()
    rng = np.random.default_rng(3)
    params = {"a": rng.normal(size=(2, 2)), "b": rng.normal(size=3)}
    grads = [{"a": rng.normal(size=(2, 2)), "b": 1e-3 * rng.normal(size=3)} for _ in range(2)]
    decays = 1 / (1 + np.exp(-np.asarray(rule_params.decay_logits)))
    (kernel, bias), (last_kernel, last_bias) = jax.tree.map(np.asarray, rule_params.layers)
    expected = {}
    for name, x in params.items():
        x = x.ravel()
        length = 0.05 * np.sqrt((x**2).mean() + 0.1**2)
        momentum, second_moment = np.zeros((2, x.size, 2))
        for time, g in enumerate((grad[name].ravel() for grad in grads), start=1):
            momentum = decays * momentum + (1 - decays) * g[:, None]
            second_moment = decays * second_moment + (1 - decays) * g[:, None] ** 2
            m, v = (moment / (1 - decays**time) for moment in (momentum, second_moment))
            raw = np.concatenate([x[:, None], g[:, None], m], 1)
            squares = (raw**2).mean(0) + 1e-10
            log, sign = np.split(log_and_sign(jnp.asarray(g)), 2, axis=1)
            odd = [sign, raw / np.sqrt(squares), m / np.sqrt(v + 1e-10)]
            even = [
                log,
                np.tile(np.log(squares[:2]) / 20, (x.size, 1)),
                np.tile(np.tanh(time / np.array([1, 3, 10, 30])), (x.size, 1)),
            ]
            directions, magnitudes = [], []
            for turned in (1, -1):
                features = np.concatenate([*(turned * y for y in odd), *even], 1)
                hidden = np.maximum(features @ kernel + bias, 0)
                direction, magnitude = (hidden @ last_kernel + last_bias).T
                directions.append(turned * direction / 2)
                magnitudes.append(magnitude / 2)
            x = x - length * np.tanh(sum(directions)) * np.exp(3 * np.tanh(sum(magnitudes)))
        expected[name] = x.reshape(params[name].shape)
    after = take(rule_params, *jax.tree.map(jnp.asarray, (params, grads)))
    for name, x in expected.items():
        np.testing.assert_allclose(after[name], x, rtol=1e-10)


@pytest.mark.parametrize("size", [1e20, np.inf])
def test_steps_are_finite_in_float32_for_gradients_whose_squares_are_not(size):
    with jax.enable_x64(False):
        rule_params = jax.tree.map(jnp.float32, trained())
        params, grads = jnp.ones(3, jnp.float32), jnp.array([0.0, 1.0, -size], jnp.float32)
        assert np.isfinite(take(rule_params, params, [grads] * 3)).all()


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


def test_turned_signs_turn_the_steps_and_without_a_gradient_zeros_stay():
    rng = np.random.default_rng(2)
    params, grads = jnp.asarray(rng.normal(size=6)), jnp.asarray(rng.normal(size=(3, 6)))
    np.testing.assert_allclose(
        take(trained(), -params, -grads), -take(trained(), params, grads), rtol=1e-12
    )
    np.testing.assert_array_equal(take(trained(), jnp.zeros(3), [jnp.zeros(3)] * 3), 0)


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
    numerical = references.finite_differences(jax.jit(loss), rule_params, step=1e-4)
    jax.tree.map(
        lambda exact, other: np.testing.assert_allclose(exact, other, rtol=1e-6, atol=1e-9),
        jax.jit(jax.grad(loss))(rule_params),
        numerical,
    )


@pytest.mark.slow
def test_with_an_initialisation_it_is_trained_as_any_rule():
    def regression(params, batch, key):
        del key
        return jnp.mean((batch[0] @ params - batch[1]) ** 2), {}

    rng = np.random.default_rng(1)
    inputs, targets = jnp.asarray(rng.normal(size=(2, 4, 3))), jnp.asarray(rng.normal(size=(2, 4)))
    episode = Episode((inputs[0], targets[0]), (inputs[1], targets[1]))
    loss_fn = learned_rule_loss(regression, rule=learned_optimizer, num_steps=3)

    def loss(meta):
        return loss_fn(meta, episode, KEY)[0]

    meta = MetaParams(jnp.array([1.0, -0.5, 0.2]), trained())
    gradient = jax.grad(lambda params: regression(params, episode.support, KEY)[0])
    params, optimizer = meta.init, learned_optimizer(meta.rule)
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(loss(meta), regression(params, episode.query, KEY)[0], rtol=1e-12)
    numerical = references.finite_differences(jax.jit(loss), meta, step=1e-5)
    jax.tree.map(
        lambda exact, other: np.testing.assert_allclose(exact, other, rtol=1e-5, atol=1e-8),
        jax.jit(jax.grad(loss))(meta),
        numerical,
    )


def test_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match=r"decays are \(1.0,\)"):
        init_learned_optimizer(KEY, decays=(1.0,))
    optimizer = learned_optimizer(trained())
    with pytest.raises(UserError, match="needs the parameters"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))
