"""The outer gradient that saves little against that which saves all, in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
import toy_tasks
from jax.sharding import Mesh, PartitionSpec

from metagen_jax.gradients import gradients, mean_over_tasks, mixed_gradients, task_keys
from metagen_jax.meta.adapt import adapt, at_step
from metagen_jax.meta.maml import maml_loss
from metagen_jax.nets.convolution import convolve, max_pool_2x2
from metagen_jax.parallel import data_parallel
from metagen_jax.types import Episode

KEY = jax.random.key(0)
LIFTS = {"reverse": gradients, "remat": gradients, "mixed": mixed_gradients}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def assert_close(actual, expected, rtol=1e-10, atol=1e-12):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def net(params, images):
    maps = convolve(images, params["kernel"]) + params["bias"]
    return jax.nn.relu(max_pool_2x2(maps) * params["scale"]).mean((1, 2)) @ params["head"]


def loss_with_all_options(gradient, rate, weight, params, images, labels):
    """A task's loss whose inner loop uses all that `adapt` offers, and all that it gives."""

    def loss_fn(params, batch, key):
        """With noise, a constant, integers, and closed-over values of both kinds."""
        images, labels = batch
        outputs = net(params, images + 0.1 * jax.random.normal(key, images.shape))
        log_probs = jax.nn.log_softmax(outputs) * jax.lax.stop_gradient(1 + outputs**2)
        loss = -weight * jnp.mean(jnp.take_along_axis(log_probs, labels[:, None], 1))
        return loss, {"squares": jnp.sum(outputs**2) + closed_over.sum(), "sum": labels.sum()}

    def per_step(path):
        return path == "bias"

    def batch_at(support, step, key):
        rows = (step + jnp.arange(2)) % 3
        return jax.tree.map(lambda x: x[rows], support)

    closed_over = labels
    adapted = adapt(
        LIFTS[gradient](loss_fn),
        params,
        (images, labels),
        KEY,
        optimizer=optax.adam(rate, eps_root=1e-8),
        num_steps=3,
        gradient=gradient,
        trainable=lambda path: path != "scale",
        per_step=per_step,
        batch_at=batch_at,
        trajectory=True,
    )
    last, _ = loss_fn(at_step(adapted.params, 3, per_step), (images, labels), KEY)
    seen = jnp.sum(adapted.metrics["loss"] ** 2) + jnp.sum(adapted.metrics["squares"])
    return last + seen + optax.tree.norm(adapted.trajectory, squared=True)


@pytest.mark.slow
def test_all_modes_are_equal_in_value_and_in_all_gradients():
    params = {
        "kernel": random(3, 3, 1, 2),
        "bias": random(4, 2, seed=1),
        "scale": random(2, seed=2),
        "head": random(2, 3, seed=3),
    }
    images, labels = random(2, 3, 4, 4, 1, seed=4), jnp.array([[0, 1, 2], [2, 2, 0]])

    def results(gradient):
        one = jax.value_and_grad(loss_with_all_options, argnums=(1, 2, 3, 4))
        each = jax.vmap(one, in_axes=(None, None, None, None, 0, 0))
        return jax.jit(each, static_argnums=0)(gradient, 0.05, 1.3, params, images, labels)

    expected = results("reverse")
    assert all(jnp.all(jnp.any(x.reshape(2, -1) != 0, 1)) for x in jax.tree.leaves(expected))
    assert_close(results("remat"), expected)
    assert_close(results("mixed"), expected)


def game(lift):
    """A field that is no gradient: two players, each of whom descends a loss of its own."""

    def of_a(a, others, key):
        b, x = others
        return jnp.sum(jnp.tanh(x @ a) * b), {}

    def of_b(b, others, key):
        a, x = others
        return jnp.sum((jnp.cos(x @ a) - b) ** 2), {}

    def grad_fn(params, x, key):
        a, b, turn = params
        return (lift(of_a)(a, (b, x), key)[0], lift(of_b)(b, (a, x), key)[0], turn), {}

    return grad_fn


@pytest.mark.parametrize(
    ("lift", "gradient"),
    [(gradients, "remat"), (gradients, "mixed"), (mixed_gradients, "mixed")],
)
def test_right_for_a_game_whose_jacobian_is_not_symmetric(lift, gradient):
    # The count of turns is an integer leaf of what moves.
    params, x = (random(2), random(3, seed=1), jnp.array(0)), random(3, 2, seed=2)

    @jax.jit
    def outer(players, x):
        adapted = adapt(
            game(lift),
            (*players, params[2]),
            x,
            KEY,
            optimizer=optax.sgd(0.3),
            num_steps=2,
            gradient=gradient,
        )
        a, b, _ = adapted.params
        return jnp.sum(jnp.sin(a)) + jnp.sum(b**3)

    grads = jax.jit(jax.grad(outer, argnums=(0, 1)))(params[:2], x)
    numerical = references.finite_differences(lambda args: outer(*args), (params[:2], x))
    assert_close(grads, numerical, rtol=1e-7, atol=1e-9)


def test_the_game_is_far_from_a_gradient():
    """Otherwise the Jacobian in place of its transpose would be right as well."""
    a, b, x = random(2), random(3, seed=1), random(3, 2, seed=2)
    field = jax.jit(jax.jacobian(lambda players: game(gradients)((*players, 0), x, KEY)[0][:2]))
    jacobian = field((a, b))
    assert jnp.abs(jacobian[0][1] - jacobian[1][0].T).max() > 0.5


def compiled(loss_fn, params, gradient, **options):
    """The meta-gradient, support and query being 100 examples of a row of the parameters' size."""
    loss = maml_loss(loss_fn, inner_optimizer=optax.sgd(0.1), gradient=gradient, **options)
    examples = jnp.ones((100, jax.tree.leaves(params)[0].shape[-1]))
    meta_gradient = jax.jit(jax.grad(loss, has_aux=True))
    return meta_gradient.lower(params, Episode(examples, examples), KEY).compile()


def temporaries(loss_fn, params, gradient, num_steps):
    program = compiled(loss_fn, params, gradient, num_steps=num_steps)
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("gradient", ["remat", "mixed"])
def test_memory_hardly_grows_with_the_steps(gradient):
    def loss_fn(params, batch, key):
        return jnp.mean(jnp.tanh(jnp.tanh(batch * params) + params[::-1]) ** 2), {}

    few, many = (temporaries(loss_fn, jnp.ones(64), gradient, n) for n in (2, 20))
    assert many < 1.3 * few
    assert temporaries(loss_fn, jnp.ones(64), "reverse", 20) > 3 * many


def test_mixed_mode_saves_no_backward_pass_through_layers_that_are_scanned():
    def loss_fn(params, batch, key):
        outputs, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x * w), None), batch, params)
        return jnp.mean(outputs**2), {}

    layers = jnp.ones((20, 8))
    mixed, remat = (temporaries(loss_fn, layers, mode, 3) for mode in ("mixed", "remat"))
    assert mixed < 0.7 * remat


def test_in_mixed_mode_leaves_that_stay_cost_nothing_more():
    def loss_fn(params, batch, key):
        hidden = batch
        for kernel in params["body"]:
            hidden = jnp.tanh(hidden @ kernel)
        return jnp.mean((hidden @ params["head"]) ** 2), {}

    params = {"body": [jnp.ones((8, 8))] * 3, "head": jnp.ones((8, 8))}
    options = {"num_steps": 2, "trainable": lambda path: path == "head"}
    mixed, reverse = (
        compiled(loss_fn, params, mode, **options).cost_analysis()["flops"]
        for mode in ("mixed", "reverse")
    )
    assert mixed < 1.1 * reverse


def test_devices_that_share_the_tasks_give_the_same():
    params, tasks = toy_tasks.example(4)

    def mean(gradient, chunk=None):
        loss = maml_loss(
            toy_tasks.regression,
            inner_optimizer=optax.sgd(0.1, momentum=0.9),
            num_steps=2,
            gradient=gradient,
        )
        return mean_over_tasks(gradients(loss), chunk=chunk)

    expected = jax.jit(mean("reverse"))(params, tasks, KEY)
    devices = jax.devices()[:2]
    split_over = data_parallel(mean("mixed", chunk=1), devices=devices)
    assert_close(split_over(params, tasks, KEY), expected)

    # The same in a shard_map that tells what differs from device to device.
    def on_each(params, tasks, keys):
        params = jax.lax.pcast(params, "tasks", to="varying")
        return jax.lax.pmean(mean("mixed")(params, tasks, keys), "tasks")

    split, mesh = PartitionSpec("tasks"), Mesh(np.array(devices), ("tasks",))
    specs = {"in_specs": (PartitionSpec(), split, split), "out_specs": PartitionSpec()}
    mapped = jax.jit(jax.shard_map(on_each, mesh=mesh, check_vma=True, **specs))
    assert_close(mapped(params, tasks, task_keys(KEY, 4)), expected)
