"""The meta-gradient against plain loops, finite differences and the closed form, in float64."""

from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from toy_tasks import KEY, example, net, one_task, plain_loss, regression

from metagen_jax.gradients import gradients, mean_over_tasks
from metagen_jax.meta.adapt import Gradient
from metagen_jax.meta.maml import maml_loss, maml_predict
from metagen_jax.types import Episode

RATE = 0.1


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def unstacked(tasks):
    return [jax.tree.map(lambda x, t=t: x[t], tasks) for t in range(len(tasks.support[0]))]


def assert_close(actual, expected, rtol=1e-11, atol=1e-12):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_meta_gradient_equals_a_loop_over_tasks_and_finite_differences(num_steps):
    params, tasks = example()
    loss_fn = maml_loss(regression, inner_optimizer=optax.sgd(RATE), num_steps=num_steps)
    grads, metrics = jax.jit(mean_over_tasks(gradients(loss_fn)))(params, tasks, KEY)

    supports, queries = zip(*unstacked(tasks), strict=True)

    def loop(params):
        return references.maml_loop(
            plain_loss, params, supports, queries, rate=RATE, num_steps=num_steps
        )

    loss, expected = jax.jit(jax.value_and_grad(loop))(params)
    assert grads["body"]["kernel"].dtype == jnp.float64
    assert_close(metrics["loss"], loss)
    assert_close(grads, expected)
    numerical = references.finite_differences(jax.jit(loop), params)
    assert_close(grads, numerical, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("gradient", get_args(Gradient))
@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_meta_gradient_is_the_closed_form_on_a_quadratic(gradient, num_steps):
    """With `loss(theta, c) = 1/2 (theta - c)^T A (theta - c)`, A symmetric, a step of rate a gives
    `theta' - c_s = (I - a A)(theta - c_s)`, so that `theta_K = c_s + M (theta - c_s)` with
    `M = (I - a A)^K`, and the meta-gradient is `M^T A (theta_K - c_q)`. To first order M^T is
    missing: d theta_K / d theta is taken for the identity.
    """
    rng = np.random.default_rng(0)
    half = rng.normal(size=(4, 4))
    a = half @ half.T
    theta, support, query = rng.normal(size=(3, 4))

    def quadratic(theta, centre, key):
        return (theta - centre) @ a @ (theta - centre) / 2, {}

    loss_fn = maml_loss(
        quadratic, inner_optimizer=optax.sgd(RATE), num_steps=num_steps, gradient=gradient
    )
    grads, metrics = jax.jit(gradients(loss_fn))(theta, Episode(support, query), KEY)

    m = np.linalg.matrix_power(np.eye(4) - RATE * a, num_steps)
    error = support + m @ (theta - support) - query
    assert_close(metrics["loss"], error @ a @ error / 2)
    expected = a @ error if gradient == "first_order" else m.T @ a @ error
    assert_close(grads, expected)


def test_without_steps_it_is_the_plain_loss_on_the_query():
    params, task = one_task()
    loss_fn = maml_loss(regression, inner_optimizer=optax.sgd(RATE), num_steps=0)
    expected = jax.jit(gradients(regression))(params, task.query, KEY)
    assert_close(jax.jit(gradients(loss_fn))(params, task, KEY), expected)


def test_first_order_lacks_exactly_the_hessian_term():
    """One step: `(I - a H) g` against `g`, H the support loss's Hessian at theta, g the gradient of
    the query loss at theta'."""
    params, task = one_task()
    exact, first_order = (
        jax.jit(
            jax.grad(
                maml_loss(
                    regression, inner_optimizer=optax.sgd(RATE), num_steps=1, gradient=gradient
                ),
                has_aux=True,
            )
        )(params, task, KEY)[0]
        for gradient in ("reverse", "first_order")
    )
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda p: plain_loss(unravel(p), task.support)))(flat)

    @jax.jit
    def query_gradient(params):
        path = references.gradient_descent(plain_loss, params, task.support, rate=RATE, num_steps=1)
        return jax.grad(plain_loss)(path[-1], task.query)

    query_grad = query_gradient(params)
    term = RATE * hessian @ jax.flatten_util.ravel_pytree(query_grad)[0]
    assert_close(first_order, query_grad)
    assert jnp.abs(term).max() > 1e-3
    assert_close(jax.tree.map(jnp.subtract, first_order, exact), unravel(term))


@pytest.mark.parametrize("gradient", ["reverse", "mixed"])
@pytest.mark.slow
def test_maml_of_maml_equals_nested_plain_code(gradient):
    params, tasks = example(4)
    a, b = (jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], tasks) for i in (0, 1))
    outer_episode = jax.tree.map(lambda x: x[0], Episode(a, b))

    inner = maml_loss(regression, inner_optimizer=optax.sgd(RATE), num_steps=1, gradient=gradient)
    outer = maml_loss(inner, inner_optimizer=optax.sgd(0.05), num_steps=2)
    value_and_grad = jax.jit(jax.value_and_grad(outer, has_aux=True))
    (loss, _), grads = value_and_grad(params, outer_episode, KEY)

    def descend(loss, params, batch, rate):
        return jax.tree.map(lambda p, g: p - rate * g, params, jax.grad(loss)(params, batch))

    def plain_inner(params, episode):
        adapted = descend(plain_loss, params, episode.support, RATE)
        return plain_loss(adapted, episode.query)

    def plain_outer(params):
        for _ in range(2):
            params = descend(plain_inner, params, outer_episode.support, 0.05)
        return plain_inner(params, outer_episode.query)

    expected = jax.jit(jax.value_and_grad(plain_outer))(params)
    assert_close((loss, grads), expected)


@pytest.mark.parametrize("part", ["head", "body"])
def test_trainable_equals_a_loop_with_masked_steps(part):
    params, task = one_task()
    loss_fn = maml_loss(
        regression,
        inner_optimizer=optax.sgd(RATE),
        num_steps=3,
        trainable=lambda path: path.startswith(part),
    )
    mask = jax.tree.map(jnp.zeros_like, params)
    mask[part] = jax.tree.map(jnp.ones_like, params[part])

    def loop(params):
        return references.maml_loop(
            plain_loss, params, [task.support], [task.query], rate=RATE, num_steps=3, mask=mask
        )

    (loss, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, task, KEY)
    assert_close((loss, grads), jax.jit(jax.value_and_grad(loop))(params))
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads)), "the outer loop moves every leaf"


def test_query_loss_weights_equal_a_loop_over_the_steps():
    params, task = one_task()
    weights = np.array([0.5, 0.2, 0.3])

    @jax.jit
    def loop(params):
        path = references.gradient_descent(plain_loss, params, task.support, rate=RATE, num_steps=3)
        losses = [plain_loss(p, task.query) for p in path[1:]]
        first_order = [jax.grad(plain_loss)(p, task.query) for p in path[1:]]
        return sum(map(jnp.multiply, weights, losses)), first_order

    (loss, first_order), grads = jax.jit(jax.value_and_grad(loop, has_aux=True))(params)
    assert_close(weighted_meta_gradient(params, task, weights, "reverse"), (loss, grads))
    summed = jax.tree.map(lambda *g: sum(map(jnp.multiply, weights, g)), *first_order)
    assert_close(weighted_meta_gradient(params, task, weights, "first_order"), (loss, summed))


def test_query_loss_weights_all_on_the_last_step_are_plain_maml():
    params, task = one_task()
    last = weighted_meta_gradient(params, task, np.array([0.0, 0.0, 1.0]), "reverse")
    assert_close(last, weighted_meta_gradient(params, task, None, "reverse"))


def weighted_meta_gradient(params, task, weights, gradient):
    loss_fn = maml_loss(
        regression,
        inner_optimizer=optax.sgd(RATE),
        num_steps=3,
        gradient=gradient,
        query_loss_weights=weights,
    )
    (loss, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, task, KEY)
    return loss, grads


def test_metrics_are_those_of_the_query_after_the_last_step():
    params, task = one_task()

    def with_metric(params, batch, key):
        loss, _ = regression(params, batch, key)
        return loss, {"root": jnp.sqrt(loss), "outputs": net(params, batch[0])}

    @jax.jit
    def loop(params):
        path = references.gradient_descent(plain_loss, params, task.support, rate=RATE, num_steps=2)
        return with_metric(path[-1], task.query, KEY)[1]

    for weights in (None, np.array([0.9, 0.1])):
        loss_fn = maml_loss(
            with_metric, inner_optimizer=optax.sgd(RATE), num_steps=2, query_loss_weights=weights
        )
        assert_close(jax.jit(loss_fn)(params, task, KEY)[1], loop(params))


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), ()])
@pytest.mark.usefixtures("ill_typed")
def test_refuses_query_loss_weights_that_are_not_one_a_step(shape):
    with pytest.raises(ValueError, match="one weight for each of the 3 inner steps"):
        maml_loss(
            regression,
            inner_optimizer=optax.sgd(RATE),
            num_steps=3,
            query_loss_weights=np.ones(shape),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": -1}, "num_steps is -1; give 0 or more"),
        ({"num_steps": 1, "gradient": "second"}, "gradient is 'second'; give \"reverse\","),
    ],
)
@pytest.mark.usefixtures("ill_typed")
def test_refuses_an_impossible_inner_loop_before_it_is_called(options, message):
    with pytest.raises(ValueError, match=message):
        maml_loss(regression, inner_optimizer=optax.sgd(RATE), **options)
    if "gradient" not in options:
        with pytest.raises(ValueError, match=message):
            maml_predict(regression, lambda *_: 0, inner_optimizer=optax.sgd(RATE), **options)


def test_predicts_with_another_number_of_steps_than_it_was_trained_with():
    params, task = one_task()
    inputs = task.query[0]

    def predict_fn(params, support, inputs):
        return {"outputs": net(params, inputs), "support": support[1].sum()}

    def predict(num_steps, every_step):
        learner = maml_predict(
            regression,
            predict_fn,
            inner_optimizer=optax.sgd(RATE),
            num_steps=num_steps,
            every_step=every_step,
        )
        return jax.jit(learner)(params, task.support, inputs, KEY)

    @jax.jit
    def loop(params):
        path = references.gradient_descent(plain_loss, params, task.support, rate=RATE, num_steps=5)
        return jnp.stack([net(p, inputs) for p in path])

    expected = loop(params)
    assert_close(predict(5, True)["outputs"], expected)
    assert_close(predict(2, True)["outputs"], expected[:3])
    assert_close(predict(0, False)["outputs"], expected[0])
    assert_close(predict(5, False), {"outputs": expected[5], "support": task.support[1].sum()})


def test_jit_and_vmap_change_nothing():
    params, tasks = example()
    loss_fn = maml_loss(regression, inner_optimizer=optax.sgd(RATE, momentum=0.9), num_steps=2)
    grad_fn = gradients(loss_fn)
    jitted = jax.jit(grad_fn)
    one_by_one = [jitted(params, task, KEY) for task in unstacked(tasks)]
    assert_close(grad_fn(params, unstacked(tasks)[0], KEY), one_by_one[0])
    vmapped = jax.jit(jax.vmap(grad_fn, in_axes=(None, 0, None)))
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *one_by_one)
    assert_close(vmapped(params, tasks, KEY), expected)


def test_support_and_query_may_be_any_pytrees():
    """An episode without labels whose support and query differ in structure."""

    def reconstruction(params, batch, key):
        images = batch["images"] if isinstance(batch, dict) else batch
        code = jnp.tanh(images @ params)
        return jnp.mean((code @ params.T - images) ** 2), {}

    rng = np.random.default_rng(0)
    params, support, query = (jnp.asarray(rng.normal(size=s)) for s in [(3, 2), (4, 3), (6, 3)])
    loss_fn = maml_loss(reconstruction, inner_optimizer=optax.sgd(RATE), num_steps=1)
    episode = Episode({"images": support, "unused": support}, query)
    loss, _ = jax.jit(loss_fn)(params, episode, KEY)
    grads = jax.jit(jax.grad(lambda p: reconstruction(p, support, KEY)[0]))(params)
    assert_close(loss, reconstruction(params - RATE * grads, query, KEY)[0])
