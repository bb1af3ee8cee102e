"""Unrolls against plain loops, and both gradients against the derivative of the whole run."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagen_jax.errors import UserError
from metagen_jax.meta.learned_optimizer import init_learned_optimizer, learned_optimizer
from metagen_jax.meta.unrolls import (
    pes_gradients,
    restart,
    start_inner,
    start_pes,
    truncated_gradients,
    truncated_unroll,
)
from metagen_jax.supervised import squared_error_loss
from metagen_jax.types import Episode

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


regression = squared_error_loss(lambda params, x: jnp.tanh(x @ params["kernel"] + params["bias"]))


def example():
    """A rule, inner parameters and a task whose support and query differ."""
    rng = np.random.default_rng(0)
    rule = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape), init_learned_optimizer(KEY, hidden=(4,))
    )
    params = {"kernel": jnp.array(rng.normal(size=(2, 1))), "bias": jnp.array(rng.normal(size=1))}
    draw = lambda n: (jnp.array(rng.normal(size=(n, 2))), jnp.array(rng.normal(size=(n, 1))))  # noqa: E731
    return rule, params, Episode(draw(3), draw(5))


@pytest.mark.parametrize(
    ("gradient", "log_loss"),
    [("reverse", False), ("first_order", True), ("remat", False), ("mixed", True)],
)
def test_truncated_gradient_equals_that_of_a_plain_loop_and_takes_the_past_for_given(
    gradient, log_loss
):
    rule_params, params, task = example()
    unroll = truncated_unroll(
        regression, rule=learned_optimizer, num_steps=3, gradient=gradient, log_loss=log_loss
    )
    grad_fn = jax.jit(truncated_gradients(unroll))
    state = start_inner(learned_optimizer, rule_params, params, task)
    _, state, _ = grad_fn(rule_params, state, KEY)
    direction, after, metrics = grad_fn(rule_params, state, KEY)

    @jax.jit
    @jax.value_and_grad
    def loop(rule_params):
        optimizer = learned_optimizer(rule_params)
        params, opt_state, total = state.params, state.opt_state, 0.0
        for _ in range(3):
            grads = jax.grad(lambda p: regression(p, task.support, KEY)[0])(params)
            if gradient == "first_order":
                grads = jax.lax.stop_gradient(grads)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            loss = regression(params, task.query, KEY)[0]
            total += jnp.log(loss + 1e-3) if log_loss else loss
        return total / 3

    loss, expected = loop(rule_params)
    chex.assert_trees_all_close((metrics["loss"], direction), (loss, expected), rtol=1e-9)
    assert all(jnp.any(x != 0) for x in jax.tree.leaves(direction))
    assert int(after.step) == 6


def drift(rule_params):
    """The rule that adds its parameter at every step, whatever the gradient."""
    return optax.stateless(lambda updates, params: jax.tree.map(lambda _: rule_params, updates))


def distance(params, target, key):
    return jnp.square(params - target), {}


def run_of_drift():
    """With `x_t = t phi` and the loss `(x_t - 1)^2`, unrolls of one step from 0 have the mean
    `1/T sum_t (t phi - 1)^2` with derivative `2/T sum_t t (t phi - 1)`."""
    num_unrolls, phi = 4, jnp.array(0.1)
    unroll = truncated_unroll(distance, rule=drift, num_steps=1)
    state = start_inner(drift, phi, jnp.array(0.0), Episode(jnp.array(1.0), jnp.array(1.0)))
    steps = np.arange(1, num_unrolls + 1)
    return num_unrolls, phi, unroll, state, np.mean(2 * steps * (steps * 0.1 - 1))


def mean_direction(grad_fn, phi, state, num_unrolls, key, *, forget=False):
    def one(state, key):
        if forget:
            state = state._replace(perturbation=jnp.zeros(()), negative=state.positive)
        direction, state, _ = grad_fn(phi, state, key)
        return state, direction

    return jax.lax.scan(one, state, jax.random.split(key, num_unrolls))[1].mean()


def test_pes_is_not_biased_by_truncation_where_truncated_gradients_and_strategies_are():
    """Quadratic in all perturbations, the objective has an antithetic estimate without bias: the
    mean over 40,000 runs is to be within four of its standard errors, the biased ones are beyond
    twenty."""
    num_unrolls, phi, unroll, state, exact = run_of_drift()
    grad_fn = pes_gradients(unroll, std=0.1)
    keys = jax.random.split(KEY, 40_000)

    def estimates(forget):
        return jax.jit(
            jax.vmap(
                lambda key: mean_direction(
                    grad_fn, phi, start_pes(state, phi), num_unrolls, key, forget=forget
                )
            )
        )(keys)

    unbiased, forgetful = np.asarray(estimates(False)), np.asarray(estimates(True))
    error = unbiased.std() / np.sqrt(len(keys))
    assert error < 0.05 * abs(exact)
    assert abs(unbiased.mean() - exact) < 4 * error
    assert abs(forgetful.mean() - exact) > 20 * error

    grad_fn = truncated_gradients(unroll)
    truncated = jax.jit(lambda key: mean_direction(grad_fn, phi, state, num_unrolls, key))(KEY)
    assert abs(truncated - exact) > 20 * error


def test_one_unroll_of_pes_by_hand():
    """From 0 with `x = phi +- eps`: `L(+) - L(-) = 4 eps (phi - 1)`, so that g is
    `2 eps^2 (phi - 1) / std^2`."""
    _, phi, unroll, state, _ = run_of_drift()
    g, after, metrics = jax.jit(pes_gradients(unroll, std=0.5))(phi, start_pes(state, phi), KEY)
    eps = after.perturbation
    np.testing.assert_allclose(g, 2 * eps**2 * (0.1 - 1) / 0.25, rtol=1e-12)
    np.testing.assert_allclose(after.positive.params, 0.1 + eps, rtol=1e-12)
    np.testing.assert_allclose(after.negative.params, 0.1 - eps, rtol=1e-12)
    np.testing.assert_allclose(metrics["loss"], (0.1 - 1) ** 2 + eps**2, rtol=1e-12)


def test_runs_restart_at_their_horizon_and_phases_put_them_out_of_step():
    _, phi, unroll, state, _ = run_of_drift()
    runs = jax.vmap(lambda step: state._replace(step=step))(jnp.arange(3, dtype=jnp.int32))
    grad_fn = pes_gradients(unroll, std=0.1)
    runs = jax.vmap(start_pes, in_axes=(0, None))(runs, phi)
    fresh = start_pes(state, phi)

    @jax.jit
    def step(runs, key):
        _, runs, _ = jax.vmap(grad_fn, in_axes=(None, 0, 0))(phi, runs, jax.random.split(key, 3))
        return jax.vmap(lambda run: restart(run, fresh, horizon=3))(runs)

    ages = []
    for i in range(4):
        runs = step(runs, jax.random.fold_in(KEY, i))
        ages.append(runs.step.tolist())
        new = runs.step == 0
        assert jnp.all((runs.perturbation == 0) == new)
        assert jnp.all((runs.positive.params == 0) == new)
    assert ages == [[1, 2, 0], [2, 0, 1], [0, 1, 2], [1, 2, 0]]


@pytest.mark.slow
def test_batches_are_drawn_anew_for_support_and_query_at_each_step_and_vmap_is_a_loop():
    rule_params, params, task = example()
    task = Episode(task.query, task.query)

    def batch_at(examples, step, key):
        index = jax.random.randint(key, (1,), 0, 5)
        return jax.tree.map(lambda x: x[index], examples)

    unroll = truncated_unroll(regression, rule=learned_optimizer, num_steps=4, batch_at=batch_at)
    grad_fn = jax.jit(truncated_gradients(unroll))
    state = start_inner(learned_optimizer, rule_params, params, task)
    keys = jax.random.split(KEY, 3)
    one_by_one = [grad_fn(rule_params, state, key) for key in keys]
    vmapped = jax.jit(jax.vmap(truncated_gradients(unroll), in_axes=(None, None, 0)))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *one_by_one)
    chex.assert_trees_all_close(vmapped(rule_params, state, keys), stacked, rtol=1e-9, atol=1e-12)
    losses = [float(metrics["last_loss"]) for _, _, metrics in one_by_one]
    assert len(set(losses)) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: truncated_unroll(distance, rule=drift, num_steps=0), "num_steps is 0"),
        (lambda: pes_gradients(run_of_drift()[2], std=0.0), "std is 0.0"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(UserError, match=message):
        make()
