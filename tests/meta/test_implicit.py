"""The implicit meta-gradient against closed forms and differentiated loops, in float64."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_tasks import KEY, example, net, one_task, plain_loss, regression

from metagen_jax.gradients import gradients
from metagen_jax.meta.implicit import implicit_maml_gradients, implicit_maml_predict
from metagen_jax.meta.maml import maml_loss
from metagen_jax.types import Episode

RATE = 0.05
STRENGTH = 2.0


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def implicit(loss_fn=regression, *, num_steps=5, num_cg_steps=5, **options):
    """The library's, with what most tests have in common."""
    options = {"inner_optimizer": optax.sgd(RATE), "strength": STRENGTH, **options}
    return implicit_maml_gradients(
        loss_fn, num_steps=num_steps, num_cg_steps=num_cg_steps, **options
    )


def assert_close(actual, expected, rtol=1e-11, atol=1e-12):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def inner_path(params, support, num_steps):
    """`[phi_0, ..., phi_K]`, stacked, of gradient descent on the proximal problem."""

    def proximal(phi):
        leaves = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), phi, params))
        return plain_loss(phi, support) + STRENGTH / 2 * sum(leaves)

    def step(phi, _):
        moved = jax.tree.map(lambda p, g: p - RATE * g, phi, jax.grad(proximal)(phi))
        return moved, moved

    _, path = jax.lax.scan(step, params, None, length=num_steps)
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), params, path)


def last(path):
    return jax.tree.map(lambda x: x[-1], path)


def test_converges_to_the_closed_form_on_a_quadratic_as_cg_steps_grow():
    """With `loss(phi, c) = 1/2 (phi - c)^T A (phi - c)` the inner minimum is
    `phi = (A + s I)^-1 (A c_s + s theta)` and the derivative of `loss(phi, c_q)` with respect to
    theta is `(I + A / s)^-1 A (phi - c_q)`, s the strength."""
    rng = np.random.default_rng(0)
    half = rng.normal(size=(6, 6))
    a = half @ half.T
    theta, support, query = rng.normal(size=(3, 6))

    def quadratic(phi, centre, key):
        return (phi - centre) @ a @ (phi - centre) / 2, {}

    phi = np.linalg.solve(a + STRENGTH * np.eye(6), a @ support + STRENGTH * theta)
    b = a @ (phi - query)
    matrix = np.eye(6) + a / STRENGTH
    exact = np.linalg.solve(matrix, b)
    optimizer = optax.sgd(1 / (STRENGTH + np.linalg.eigvalsh(a)[-1]))

    errors = []
    for num_cg_steps in range(8):
        grad_fn = implicit(
            quadratic, inner_optimizer=optimizer, num_steps=400, num_cg_steps=num_cg_steps
        )
        direction, metrics = jax.jit(grad_fn)(theta, Episode(support, query), KEY)
        errors.append(np.linalg.norm(direction - exact))
        residual = np.linalg.norm(matrix @ direction - b) / np.linalg.norm(b)
        assert_close(metrics["cg_residual"], residual, rtol=1e-6, atol=1e-13)
        assert metrics["inner_gradient_norm"] < 1e-10
        assert_close(metrics["loss"], (phi - query) @ a @ (phi - query) / 2)
    assert errors[0] > 0.1
    assert all(after < before for before, after in itertools.pairwise(errors[:7]))
    assert max(errors[6:]) < 1e-10


def test_equals_the_gradient_through_all_steps_of_the_inner_loop():
    params, task = one_task()

    @jax.jit
    @jax.value_and_grad
    def through_all_steps(params):
        return plain_loss(last(inner_path(params, task.support, 500)), task.query)

    loss, expected = through_all_steps(params)
    direction, metrics = jax.jit(implicit(num_steps=500, num_cg_steps=25))(params, task, KEY)
    assert_close(metrics["loss"], loss)
    assert_close(direction, expected, rtol=1e-8, atol=1e-9)
    first_order, _ = jax.jit(implicit(num_steps=500, num_cg_steps=0))(params, task, KEY)
    difference = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), first_order, expected)
    assert min(jax.tree.leaves(difference)) > 1e-3


@pytest.mark.parametrize("options", [{"num_cg_steps": 0}, {"damping": 1e14}])
def test_without_cg_steps_or_with_endless_damping_it_is_the_first_order_gradient(options):
    params, task = one_task()

    @jax.jit
    def first_order(params):
        phi = last(inner_path(params, task.support, 5))
        return jax.grad(plain_loss)(phi, task.query)

    direction, _ = jax.jit(implicit(**options))(params, task, KEY)
    assert_close(direction, first_order(params))


def test_damping_adds_to_the_strength_in_the_equation_alone():
    params, task = one_task()
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    @jax.jit
    def dense(params):
        phi = last(inner_path(params, task.support, 5))
        at_phi = jax.flatten_util.ravel_pytree(phi)[0]
        hessian = jax.hessian(lambda p: plain_loss(unravel(p), task.support))(at_phi)
        b = jax.flatten_util.ravel_pytree(jax.grad(plain_loss)(phi, task.query))[0]
        return unravel(jnp.linalg.solve(jnp.eye(len(flat)) + hessian / (STRENGTH + 3.0), b))

    direction, _ = jax.jit(implicit(num_cg_steps=25, damping=3.0))(params, task, KEY)
    assert_close(direction, dense(params), rtol=1e-9, atol=1e-10)


def test_memory_does_not_grow_with_the_inner_steps_but_that_of_maml_does():
    params = {
        "body": {"kernel": jnp.zeros((16, 64)), "bias": jnp.zeros(64)},
        "head": {"kernel": jnp.zeros((64, 1))},
    }
    batch = (jnp.zeros((128, 16)), jnp.zeros((128, 1)))
    optimizer = optax.sgd(RATE)

    def growth(grad_fn):
        sizes = [
            jax.jit(grad_fn(num_steps))
            .lower(params, Episode(batch, batch), KEY)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
            for num_steps in (5, 50)
        ]
        return sizes[1] / sizes[0]

    assert growth(lambda steps: implicit(num_steps=steps)) < 1.03
    assert (
        growth(
            lambda steps: gradients(
                maml_loss(regression, inner_optimizer=optimizer, num_steps=steps)
            )
        )
        > 3
    )


@pytest.mark.slow
def test_jit_and_vmap_change_nothing():
    params, tasks = example()
    grad_fn = implicit()
    jitted = jax.jit(grad_fn)
    one_by_one = [jitted(params, jax.tree.map(lambda x, t=t: x[t], tasks), KEY) for t in range(3)]
    assert_close(grad_fn(params, jax.tree.map(lambda x: x[0], tasks), KEY), one_by_one[0])
    vmapped = jax.jit(jax.vmap(grad_fn, in_axes=(None, 0, None)))
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *one_by_one)
    assert_close(vmapped(params, tasks, KEY), expected, rtol=1e-9)


def bowl(phi, batch, key):
    """`1/2 sum h phi^2 + l . phi`, whose Hessian is `diag(h)`."""
    curvature, slope = batch
    return jnp.sum(curvature * phi**2) / 2 + slope @ phi, {}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("curvature", "slope"),
    [([0.0, 0.0, 0.0], [1.0, -2.0, 3.0]), ([4.0, 1.0, 0.0], [0.0, 0.0, 0.0])],
    ids=["solved from the start", "nothing to solve"],
)
def test_conjugate_gradients_that_have_nothing_to_do_give_no_nan(dtype, curvature, slope):
    zero, curvature, slope = (np.asarray(x, dtype) for x in (np.zeros(3), curvature, slope))
    episode = Episode((curvature, zero), (zero, slope))
    direction, metrics = jax.jit(implicit(bowl))(jnp.ones(3, dtype), episode, KEY)
    assert_close(direction, slope, rtol=0, atol=0)
    assert metrics["cg_residual"] == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_far_more_steps_than_dimensions_change_nothing_and_the_residual_is_the_true_one(dtype):
    zero, curvature, slope = (
        np.asarray(x, dtype) for x in (np.zeros(3), [100.0, 1.0, 0.01], [1.0, 2.0, 3.0])
    )
    episode = Episode((curvature, zero), (zero, slope))
    grad_fn = implicit(bowl, num_steps=0, num_cg_steps=200)
    direction, metrics = jax.jit(grad_fn)(jnp.ones(3, dtype), episode, KEY)
    epsilon = np.finfo(dtype).eps
    assert_close(direction, slope / (1 + curvature / 2), rtol=100 * epsilon, atol=0)
    assert direction.dtype == dtype
    assert metrics["cg_residual"] < 100 * epsilon


def test_stops_where_the_curvature_is_negative():
    """`A = diag(2, -4)`, `b = (1, 1)`: the first direction, `b - A b = (-1, 5)`, has curvature
    `2 - 100`, so that b is what is left, with a residual of `sqrt(26) / sqrt(2)`."""
    episode = Episode((np.array([1.0, -5.0]), np.zeros(2)), (np.zeros(2), np.ones(2)))
    grad_fn = implicit(bowl, strength=1.0, num_steps=0, num_cg_steps=10)
    direction, metrics = jax.jit(grad_fn)(jnp.zeros(2), episode, KEY)
    assert_close(direction, np.ones(2), rtol=0, atol=0)
    assert_close(metrics["cg_residual"], np.sqrt(13))


def test_one_key_makes_the_inner_problem_one_function():
    """With noise in the loss, drawn anew at each step, the inner problem would have no minimum."""

    def noisy(phi, batch, key):
        return jnp.sum((phi - batch - jax.random.normal(key, phi.shape)) ** 2) / 2, {}

    grad_fn = jax.jit(implicit(noisy, inner_optimizer=optax.sgd(0.3), num_steps=40))
    losses = set()
    for key in jax.random.split(KEY, 3):
        _, metrics = grad_fn(jnp.zeros(3), Episode(1.0, 1.0), key)
        assert metrics["inner_gradient_norm"] < 1e-10
        losses.add(float(metrics["loss"]))
    assert len(losses) == 3


def test_metrics_are_those_of_the_query_and_of_the_two_problems():
    params, task = one_task()

    def with_metric(params, batch, key):
        loss, _ = regression(params, batch, key)
        return loss, {"root": jnp.sqrt(loss)}

    @jax.jit
    def expected(params):
        phi = last(inner_path(params, task.support, 5))
        loss = plain_loss(phi, task.query)
        pull = jax.tree.map(lambda a, b: STRENGTH * (a - b), phi, params)
        slope = jax.tree.map(jnp.add, jax.grad(plain_loss)(phi, task.support), pull)
        norm = jnp.linalg.norm(jax.flatten_util.ravel_pytree(slope)[0])
        return {"loss": loss, "root": jnp.sqrt(loss), "inner_gradient_norm": norm}

    _, metrics = jax.jit(implicit(with_metric))(params, task, KEY)
    residual = metrics.pop("cg_residual")
    assert 0 < residual < 1
    assert_close(metrics, expected(params))


def test_predicts_by_the_proximal_inner_loop():
    params, task = one_task()
    inputs = task.query[0]

    def predict_fn(params, support, inputs):
        return {"outputs": net(params, inputs), "support": support[1].sum()}

    def predict(num_steps, every_step):
        learner = implicit_maml_predict(
            regression,
            predict_fn,
            inner_optimizer=optax.sgd(RATE),
            num_steps=num_steps,
            strength=STRENGTH,
            every_step=every_step,
        )
        return jax.jit(learner)(params, task.support, inputs, KEY)

    path = jax.jit(lambda p: inner_path(p, task.support, 5))(params)
    expected = jax.vmap(net, in_axes=(0, None))(path, inputs)
    assert_close(predict(5, True)["outputs"], expected)
    assert_close(predict(5, False), {"outputs": expected[5], "support": task.support[1].sum()})
    assert_close(predict(0, False)["outputs"], expected[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, "strength is 0.0; give a positive one"),
        ({"strength": -1.0}, "strength is -1.0; give a positive one"),
        ({"num_cg_steps": -1}, "num_cg_steps is -1 and damping 0.0; give 0 or more"),
        ({"damping": -0.5}, "num_cg_steps is 5 and damping -0.5; give 0 or more"),
    ],
)
def test_refuses_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        implicit(**options)
    assert "\n" not in str(error.value)


def test_predict_refuses_a_strength_that_is_not_positive():
    with pytest.raises(ValueError, match=r"strength is 0\.0; give a positive one"):
        implicit_maml_predict(
            regression,
            lambda params, support, inputs: net(params, inputs),
            inner_optimizer=optax.sgd(RATE),
            num_steps=1,
            strength=0.0,
        )
