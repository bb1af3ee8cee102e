"""The lifts: a loss's gradient, and its mean over tasks for every way to split them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagen_jax.gradients import (
    count_tasks,
    gradients,
    mean_over_tasks,
    mixed_gradients,
    task_keys,
)

KEY = jax.random.key(0)
NUM_TASKS = 7


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def noisy_loss(params, task, key):
    """Its value, gradient and metrics differ from task to task and from key to key."""
    noise = jax.random.normal(key, params["w"].shape)
    errors = jnp.tanh(task["x"] @ params["w"] + params["b"]) - task["y"] + noise.sum()
    right = errors[0] > 0
    return jnp.mean(errors**2), {"largest": errors.max(), "right": right, "each": errors}


def example(num_tasks=NUM_TASKS):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=3), "b": rng.normal()}
    tasks = {"x": rng.normal(size=(num_tasks, 5, 3)), "y": rng.normal(size=(num_tasks, 5))}
    return jax.tree.map(jnp.asarray, (params, tasks))


def assert_close(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_gradients_gives_the_derivative_with_the_loss_among_the_metrics():
    def loss_fn(params, batch, key):
        return jnp.sum(batch * params**3), {"norm": jnp.abs(params).sum()}

    params, batch = jnp.array([1.0, -2.0]), jnp.array([10.0, 0.5])
    grads, metrics = jax.jit(gradients(loss_fn))(params, batch, KEY)
    assert_close(grads, jnp.array([30.0, 6.0]))
    assert_close(metrics, {"loss": jnp.array(6.0), "norm": jnp.array(3.0)})


def test_the_pull_back_of_mixed_gradients_by_hand():
    """The loss `a p^3` has the gradient `3 a p^2`, whose cotangent v goes to p as `6 a p v` and to
    a as `3 p^2 v`; to these come those of the loss, 2, and of the metric `p^2`, 5."""

    def loss_fn(params, batch, key):
        return jnp.sum(batch * params**3), {"square": jnp.sum(params**2)}

    p, a, v = jnp.array([1.0, -2.0]), jnp.array([10.0, 0.5]), jnp.array([1.0, 3.0])
    out, pull = jax.vjp(lambda p, a: mixed_gradients(loss_fn)(p, a, KEY), p, a)
    assert_close(out, gradients(loss_fn)(p, a, KEY))
    of_p, of_a = pull((v, {"loss": jnp.array(2.0), "square": jnp.array(5.0)}))
    assert_close(of_p, 6 * a * p * v + 2 * 3 * a * p**2 + 5 * 2 * p)
    assert_close(of_a, 3 * p**2 * v + 2 * p**3)


def test_mixed_gradients_equal_gradients_up_to_the_third_derivative():
    params, tasks = example(2)

    def outer(lift, params, task, scale, count):
        def loss_fn(params, task, key):
            """Closes over a number and an integer that differ from task to task."""
            loss, metrics = noisy_loss(params, task, key)
            return scale * loss + count * jax.lax.stop_gradient(loss) * params["b"], metrics

        direction, metrics = lift(loss_fn)(params, task, KEY)
        return jnp.sin(direction["w"]).sum() + direction["b"] ** 2 + metrics["largest"]

    def derivatives(lift):
        def size(*arguments):
            grads = jax.grad(outer, argnums=(1, 2, 3))(lift, *arguments)
            return sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)), grads

        of_one = jax.grad(size, argnums=(0, 1, 2), has_aux=True)
        each = jax.vmap(of_one, in_axes=(None, 0, 0, 0))
        return jax.jit(each)(params, tasks, jnp.array([1.0, 2.0]), jnp.array([3, -1]))

    assert_close(derivatives(mixed_gradients), derivatives(gradients))


@pytest.mark.slow
def test_mixed_gradients_refuse_forward_mode():
    params, tasks = example(1)
    task = jax.tree.map(lambda x: x[0], tasks)

    def direction(lift, loss_fn):
        return lambda params: lift(loss_fn)(params, task, KEY)[0]

    def nested(params, task, key):
        return optax.tree.norm(direction(mixed_gradients, noisy_loss)(params), squared=True), {}

    mixed = direction(mixed_gradients, noisy_loss)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(mixed, (params,), (params,))
    with pytest.raises((TypeError, NotImplementedError)):
        jax.vjp(direction(mixed_gradients, nested), params)[1](params)


@pytest.fixture(scope="module")
def loop():
    """The mean over tasks by a Python loop, each task with the key of its index."""
    with jax.enable_x64(True):
        params, tasks = example()
        one_task = jax.jit(gradients(noisy_loss))
        results = [
            one_task(params, jax.tree.map(lambda x, t=t: x[t], tasks), jax.random.fold_in(KEY, t))
            for t in range(NUM_TASKS)
        ]
        return jax.tree.map(lambda *xs: sum(xs) / NUM_TASKS, *results)


@pytest.mark.parametrize("chunk", ["auto", None, 1, 2, 3, 4, 7, 100])
def test_mean_over_tasks_equals_a_loop_for_every_chunk(chunk, loop):
    params, tasks = example()
    grad_fn = mean_over_tasks(gradients(noisy_loss), chunk=chunk)
    assert_close(jax.jit(grad_fn)(params, tasks, KEY), loop)


def test_mean_over_tasks_is_the_same_without_jit(loop):
    params, tasks = example()
    assert_close(mean_over_tasks(gradients(noisy_loss), chunk=3)(params, tasks, KEY), loop)


@pytest.mark.parametrize("chunk", [None, 3])
def test_mean_over_tasks_takes_one_key_a_task(chunk, loop):
    params, tasks = example()
    grad_fn = jax.jit(mean_over_tasks(gradients(noisy_loss), chunk=chunk))
    keys = task_keys(KEY, NUM_TASKS)
    assert_close(grad_fn(params, tasks, keys), loop)
    # Half of the tasks with their own keys: what one of two devices computes.
    half = jax.tree.map(lambda x: x[4:], tasks)
    rest = jax.tree.map(lambda x: x[:4], tasks)
    both = [grad_fn(params, part, k) for part, k in ((rest, keys[:4]), (half, keys[4:]))]
    assert_close(jax.tree.map(lambda a, b: (4 * a + 3 * b) / 7, *both), loop)


def test_the_key_of_a_task_does_not_depend_on_how_many_there_are():
    few, many = (jax.random.key_data(task_keys(KEY, n)) for n in (3, 8))
    np.testing.assert_array_equal(few, many[:3])
    assert len(np.unique(many, axis=0)) == 8


def test_memory_grows_with_the_chunk_and_not_with_the_tasks():
    def temporaries(num_tasks, chunk):
        def loss_fn(params, task, key):
            hidden = jnp.tanh(task[:, None] * params)
            return jnp.sum(jnp.sin(hidden @ jnp.cos(hidden.T))), {}

        grad_fn = jax.jit(mean_over_tasks(gradients(loss_fn), chunk=chunk))
        compiled = grad_fn.lower(jnp.ones(64), jnp.ones((num_tasks, 50)), KEY).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(64, 2) < 1.2 * temporaries(8, 2)
    assert temporaries(64, None) > 10 * temporaries(64, 2)


@pytest.mark.parametrize("chunk", [0, -1])
def test_refuses_a_chunk_that_is_not_positive(chunk):
    with pytest.raises(ValueError, match=f"chunk is {chunk}; give a positive number"):
        mean_over_tasks(gradients(noisy_loss), chunk=chunk)


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        ({"x": np.ones((3, 2)), "y": np.ones(4)}, r"\[3, 4\]"),
        ({"x": np.ones((3, 2)), "y": np.float32(1)}, r"\[0, 3\]"),
        (np.ones((0, 2)), r"\[0\]"),
        ({}, r"\[\]"),
    ],
)
def test_refuses_a_batch_without_a_common_leading_axis(batch, sizes):
    with pytest.raises(ValueError, match=f"leading axes of {sizes}"):
        mean_over_tasks(gradients(noisy_loss))(None, batch, KEY)


def test_counts_the_tasks_of_a_pytree():
    assert count_tasks({"x": np.ones((3, 2)), "keys": jax.random.split(KEY, 3)}) == 3


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("num_keys", [4, 8])
def test_refuses_another_number_of_keys_than_tasks(chunk, num_keys):
    params, tasks = example()
    with pytest.raises(ValueError, match=rf"keys of shape \({num_keys},\) for 7 tasks"):
        mean_over_tasks(gradients(noisy_loss), chunk=chunk)(
            params, tasks, jax.random.split(KEY, num_keys)
        )


def test_one_task_at_a_time_takes_one_branch_of_a_condition():
    calls = []

    def loss_fn(params, task, key):
        def branch(name):
            def value(x):
                jax.debug.callback(lambda: calls.append(name))
                return jnp.sum(x)

            return value

        return jax.lax.cond(task > 0, branch("positive"), branch("other"), params * task), {}

    grad_fn = jax.jit(mean_over_tasks(gradients(loss_fn), chunk=1))
    jax.block_until_ready(grad_fn(jnp.ones(2), jnp.array([1.0, -1.0, 2.0]), KEY))
    jax.effects_barrier()
    assert sorted(calls) == ["other", "positive", "positive"]
