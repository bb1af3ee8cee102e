"""CAVIA against plain loops, finite differences and values by hand, in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references

from metagen_jax.gradients import gradients
from metagen_jax.meta.cavia import cavia_loss, cavia_params, cavia_predict
from metagen_jax.supervised import squared_error_loss
from metagen_jax.types import Episode

RATE = 0.3
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def net(params, x):
    """The context is an input beside each x."""
    context = jnp.broadcast_to(params["context"], (len(x), len(params["context"])))
    inputs = jnp.concatenate([x, context], axis=-1)
    shared = params["shared"]
    return jnp.tanh(inputs @ shared["kernel"] + shared["bias"]) @ shared["head"]


regression = squared_error_loss(net)


def example(num_tasks=3):
    rng = np.random.default_rng(0)
    shared = {
        "kernel": rng.normal(size=(2 + 3, 4)),
        "bias": rng.normal(size=4),
        "head": rng.normal(size=(4, 1)),
    }
    tasks = Episode(
        (rng.normal(size=(num_tasks, 3, 2)), rng.normal(size=(num_tasks, 3, 1))),
        (rng.normal(size=(num_tasks, 5, 2)), rng.normal(size=(num_tasks, 5, 1))),
    )
    shared, tasks = jax.tree.map(jnp.asarray, (shared, tasks))
    return cavia_params(shared, 3), tasks


def one_task():
    params, tasks = example(1)
    return params, jax.tree.map(lambda x: x[0], tasks)


def contexts(shared, support, num_steps):
    """`[c_0, ..., c_K]` of plain gradient descent from zero."""

    def loss(context, support):
        return regression({"shared": shared, "context": context}, support, KEY)[0]

    return references.gradient_descent(loss, jnp.zeros(3), support, rate=RATE, num_steps=num_steps)


def assert_close(actual, expected, rtol=1e-11, atol=1e-12):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def test_params_hold_a_context_of_zeros():
    params = cavia_params({"w": jnp.ones(2)}, 4)
    chex.assert_trees_all_equal(params, {"shared": {"w": jnp.ones(2)}, "context": jnp.zeros(4)})


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_meta_gradient_equals_a_loop_and_finite_differences_and_is_zero_for_the_context(num_steps):
    params, task = one_task()
    # The context that is trained is never used: each task starts from zeros.
    params["context"] = jnp.array([1.0, -2.0, 3.0])
    loss_fn = cavia_loss(regression, inner_optimizer=optax.sgd(RATE), num_steps=num_steps)
    grads, metrics = jax.jit(gradients(loss_fn))(params, task, KEY)

    def loop(shared):
        context = contexts(shared, task.support, num_steps)[-1]
        return regression({"shared": shared, "context": context}, task.query, KEY)[0]

    loss, expected = jax.jit(jax.value_and_grad(loop))(params["shared"])
    assert_close(metrics["loss"], loss)
    assert_close(grads["shared"], expected)
    numerical = references.finite_differences(jax.jit(loop), params["shared"])
    assert_close(grads["shared"], numerical, rtol=1e-7, atol=1e-8)
    np.testing.assert_array_equal(grads["context"], np.zeros(3))


@pytest.mark.parametrize(
    ("gradient", "slope"), [("reverse", 1.28), ("mixed", 1.28), ("first_order", 0.64)]
)
def test_meta_gradient_worked_by_hand(gradient, slope):
    """`loss({s, c}, y) = (s c - y)^2`: one step of rate 0.1 from 0 at s = 2, y = 1 gives
    `c = 0.2 s y = 0.4`, and the query loss for a target of 0 is `(s c)^2 = 0.64`. Its derivative is
    `2 s c (c + s dc/ds) = 1.6 (0.4 + 0.4)`; to first order `dc/ds` is left out."""

    def product(params, target, key):
        return jnp.sum((params["shared"] * params["context"] - target) ** 2), {}

    loss_fn = cavia_loss(product, inner_optimizer=optax.sgd(0.1), num_steps=1, gradient=gradient)
    params = cavia_params(jnp.array(2.0), 1)
    grads, metrics = gradients(loss_fn)(params, Episode(1.0, 0.0), KEY)
    assert_close(metrics["loss"], 0.64)
    assert_close(grads["shared"], slope)


def test_the_inner_loop_moves_the_context_alone_and_from_zero():
    params, task = one_task()
    params["context"] = jnp.array([1.0, -2.0, 3.0])

    def predict(every_step):
        learner = cavia_predict(
            regression,
            lambda params, support, inputs: (params, net(params, inputs)),
            inner_optimizer=optax.sgd(RATE),
            num_steps=3,
            every_step=every_step,
        )
        return jax.jit(learner)(params, task.support, task.query[0], KEY)

    path = jax.jit(lambda shared: contexts(shared, task.support, 3))(params["shared"])
    adapted, outputs = predict(False)
    chex.assert_trees_all_equal(adapted["shared"], params["shared"])
    assert jnp.all(jnp.abs(path[-1]) > 1e-3)
    assert_close(adapted["context"], path[-1])
    assert_close(outputs, net({**params, "context": path[-1]}, task.query[0]))
    states, outputs = predict(True)
    assert_close(states["context"], jnp.stack(path))
    assert_close(outputs[0], net({**params, "context": jnp.zeros(3)}, task.query[0]))


def test_an_outer_optimiser_leaves_the_context_at_zero():
    params, task = one_task()
    grad_fn = gradients(cavia_loss(regression, inner_optimizer=optax.sgd(RATE), num_steps=1))
    optimizer = optax.adamw(0.1)
    grads, _ = jax.jit(grad_fn)(params, task, KEY)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(moved["context"], np.zeros(3))
    assert all(
        jnp.all(a != b)
        for a, b in zip(
            jax.tree.leaves(moved["shared"]), jax.tree.leaves(params["shared"]), strict=True
        )
    )


def test_metrics_are_those_of_the_query_after_the_last_step():
    params, task = one_task()

    def with_context(params, batch, key):
        loss, _ = regression(params, batch, key)
        return loss, {"context": params["context"]}

    loss_fn = cavia_loss(with_context, inner_optimizer=optax.sgd(RATE), num_steps=2)
    path = jax.jit(lambda shared: contexts(shared, task.support, 2))(params["shared"])
    assert_close(jax.jit(loss_fn)(params, task, KEY)[1]["context"], path[-1])


@pytest.mark.slow
def test_jit_and_vmap_change_nothing():
    params, tasks = example()
    grad_fn = gradients(cavia_loss(regression, inner_optimizer=optax.sgd(RATE), num_steps=2))
    jitted = jax.jit(grad_fn)
    one_by_one = [jitted(params, jax.tree.map(lambda x, t=t: x[t], tasks), KEY) for t in range(3)]
    assert_close(grad_fn(params, jax.tree.map(lambda x: x[0], tasks), KEY), one_by_one[0])
    vmapped = jax.jit(jax.vmap(grad_fn, in_axes=(None, 0, None)))
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *one_by_one)
    assert_close(vmapped(params, tasks, KEY), expected)


@pytest.mark.parametrize(
    "params",
    [jnp.zeros(3), {"shared": jnp.zeros(3)}, {"shared": 0.0, "context": 0.0, "head": 0.0}],
    ids=["array", "no context", "more"],
)
def test_refuses_parameters_without_their_two_parts(params):
    message = r'give a dict of "shared" and "context", as cavia_params\(shared, num_context\)'
    with pytest.raises(ValueError, match=message) as error:
        cavia_loss(regression, inner_optimizer=optax.sgd(RATE), num_steps=1)(
            params, Episode(0.0, 0.0), KEY
        )
    assert "\n" not in str(error.value)


def test_refuses_an_empty_context():
    with pytest.raises(ValueError, match="num_context is 0; give 1 or more"):
        cavia_params({}, 0)
