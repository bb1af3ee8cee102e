"""Reptile's direction against plain loops, its mini-batches, and that it learns, in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from toy_tasks import KEY, example, one_task, plain_loss, regression

from metagen_jax.gradients import gradients, mean_over_tasks, task_keys
from metagen_jax.meta.reptile import (
    mini_batches,
    reptile_gradients,
    reptile_over_gradients,
)
from metagen_jax.supervised import squared_error_loss
from metagen_jax.types import Episode, MetaParams

RATE = 0.1


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def assert_close(actual, expected, rtol=1e-11, atol=1e-12):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def test_one_step_of_sgd_gives_the_rate_times_the_support_gradient():
    params, task = one_task()
    grad_fn = reptile_gradients(regression, inner_optimizer=optax.sgd(RATE), num_steps=1)
    direction, _ = jax.jit(grad_fn)(params, task, KEY)
    grads = jax.jit(jax.grad(plain_loss))(params, task.support)
    assert_close(direction, jax.tree.map(lambda g: RATE * g, grads))


@pytest.mark.parametrize(
    "optimizer", [optax.sgd(RATE), optax.adam(RATE, b1=0.0)], ids=["sgd", "adam"]
)
@pytest.mark.parametrize("num_steps", [0, 4])
def test_equals_a_plain_loop_in_direction_and_query_loss(optimizer, num_steps):
    params, task = one_task()

    def with_metric(params, batch, key):
        loss, _ = regression(params, batch, key)
        return loss, {"root": jnp.sqrt(loss)}

    @jax.jit
    def loop(params):
        path = references.optimizer_loop(plain_loss, params, [task.support] * num_steps, optimizer)
        return jax.tree.map(jnp.subtract, params, path[-1]), plain_loss(path[-1], task.query)

    grad_fn = reptile_gradients(with_metric, inner_optimizer=optimizer, num_steps=num_steps)
    direction, metrics = jax.jit(grad_fn)(params, task, KEY)
    expected, loss = loop(params)
    assert_close(direction, expected)
    assert_close(metrics, {"loss": loss, "root": jnp.sqrt(loss)})


def test_over_the_gradient_of_a_loss_it_is_the_same():
    params, task = one_task()
    options = {"inner_optimizer": optax.adam(RATE, b1=0.0), "num_steps": 3}
    expected = jax.jit(reptile_gradients(regression, **options))(params, task, KEY)
    actual = jax.jit(reptile_over_gradients(gradients(regression), **options))(params, task, KEY)
    assert_close(actual, expected)


def test_two_players_each_go_towards_where_their_game_leads():
    """`x` goes down and `y` up the bilinear game `x y`, to the mean of a batch: no gradient."""

    def field(params, batch, key):
        x, y = params
        return (y - batch.mean(), -(x - batch.mean())), {"x": x}

    support, query = jnp.array([0.5, 1.5]), jnp.array([3.0])
    grad_fn = reptile_over_gradients(field, inner_optimizer=optax.sgd(RATE), num_steps=4)
    direction, metrics = jax.jit(grad_fn)((2.0, -1.0), Episode(support, query), KEY)
    x, y = 2.0, -1.0
    for _ in range(4):
        x, y = x - RATE * (y - 1), y + RATE * (x - 1)
    assert_close(direction, (2.0 - x, -1.0 - y))
    assert_close(metrics, {"x": x})


@pytest.mark.slow
def test_batched_is_the_mean_of_serial_directions():
    params, tasks = example()
    grad_fn = reptile_gradients(
        regression, inner_optimizer=optax.adam(RATE, b1=0.0), num_steps=3, batch_at=mini_batches(2)
    )
    serial = jax.jit(grad_fn)
    results = [
        serial(params, jax.tree.map(lambda x, t=t: x[t], tasks), key)
        for t, key in enumerate(task_keys(KEY, 3))
    ]
    assert_close(
        grad_fn(params, jax.tree.map(lambda x: x[0], tasks), task_keys(KEY, 3)[0]), results[0]
    )
    expected = jax.tree.map(lambda *xs: sum(xs) / 3, *results)
    for chunk in (None, 1, 2):
        batched = jax.jit(mean_over_tasks(grad_fn, chunk=chunk))(params, tasks, KEY)
        assert_close(batched, expected)


def test_an_outer_rate_of_one_ends_where_the_inner_loop_did():
    """Algorithm 1: `theta <- theta + epsilon (theta_K - theta)`."""
    params, task = one_task()
    grad_fn = reptile_gradients(regression, inner_optimizer=optax.sgd(RATE), num_steps=5)
    direction, _ = jax.jit(grad_fn)(params, task, KEY)
    outer = optax.sgd(1.0)
    updates, _ = outer.update(direction, outer.init(params), params)

    @jax.jit
    def last(params):
        return references.gradient_descent(
            plain_loss, params, task.support, rate=RATE, num_steps=5
        )[-1]

    assert_close(optax.apply_updates(params, updates), last(params))


def test_a_state_that_is_carried_goes_on_as_in_one_loop_over_tasks():
    """Serial tasks, an outer rate of one, and RMSProp that never begins anew."""
    params, tasks = example(2)
    optimizer = optax.rmsprop(RATE, decay=0.9)
    grad_fn = reptile_gradients(
        regression, inner_optimizer=optimizer, num_steps=3, carry_state=True
    )

    @jax.jit
    def serial(params):
        carried = MetaParams(params, optimizer.init(params))
        for t in range(2):
            task = jax.tree.map(lambda x: x[t], tasks)  # noqa: B023
            carried = optax.tree.sub(carried, grad_fn(carried, task, KEY)[0])
        return carried.init

    @jax.jit
    def loop(params):
        batches = [jax.tree.map(lambda x: x[t], tasks.support) for t in (0, 0, 0, 1, 1, 1)]  # noqa: B023
        return references.optimizer_loop(plain_loss, params, batches, optimizer)[-1]

    assert_close(serial(params), loop(params))


def test_leaves_outside_trainable_have_no_direction():
    params, task = one_task()
    grad_fn = reptile_gradients(
        regression,
        inner_optimizer=optax.sgd(RATE),
        num_steps=2,
        trainable=lambda path: path.startswith("head"),
    )
    direction, _ = jax.jit(grad_fn)(params, task, KEY)
    assert_close(direction["body"], jax.tree.map(jnp.zeros_like, params["body"]), atol=0)
    assert jnp.all(direction["head"]["kernel"] != 0)


def test_the_key_reaches_mini_batches_and_losses():
    """A loss that gives the mean of the batch, so that the direction shows which batch it was."""

    def pull(params, batch, key):
        return params * batch.mean(), {"noise": jax.random.normal(key)}

    support = 2.0 ** jnp.arange(6)
    grad_fn = jax.jit(
        reptile_gradients(
            pull, inner_optimizer=optax.sgd(1.0), num_steps=1, batch_at=mini_batches(2)
        )
    )
    sums = {(2.0**i + 2.0**j) / 2 for i in range(6) for j in range(i)}
    directions, noise = set(), set()
    for key in jax.random.split(KEY, 20):
        direction, metrics = grad_fn(jnp.zeros(()), Episode(support, support), key)
        directions.add(float(direction))
        noise.add(float(metrics["noise"]))
    assert directions <= sums
    assert len(directions) > 5
    assert len(noise) == 20


def test_mini_batches_draw_every_pair_equally_often_and_no_example_twice():
    support = {"x": np.arange(10).reshape(5, 2), "y": 10 * np.arange(5)}
    batch_at = mini_batches(2)

    @jax.jit
    @jax.vmap
    def draw(key):
        return batch_at(support, jnp.int32(0), key)

    batch = draw(jax.random.split(KEY, 4000))
    rows = np.asarray(batch["y"] // 10)
    np.testing.assert_array_equal(batch["x"], support["x"][rows])
    assert np.all(rows[:, 0] != rows[:, 1])
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(rows.T), 1)
    expected = 4000 / 20
    assert np.abs(counts[~np.eye(5, dtype=bool)] - expected).max() < 5 * np.sqrt(expected)


def test_a_mini_batch_of_all_examples_is_a_permutation():
    batch = mini_batches(7)(np.arange(7), jnp.int32(3), KEY)
    np.testing.assert_array_equal(np.sort(batch), np.arange(7))


def linear_tasks(key, num_tasks=8):
    """Weights near a common centre, fewer examples than weights, so that the start matters."""
    weight_key, input_key = jax.random.split(key)
    weights = 2.0 + 0.3 * jax.random.normal(weight_key, (num_tasks, 10, 1))
    x = jax.random.normal(input_key, (num_tasks, 10, 10))
    y = x @ weights
    return Episode((x[:, :4], y[:, :4]), (x[:, 4:], y[:, 4:]))


def test_learns_a_start_from_which_a_few_steps_suffice():
    """From zero the loss after adaptation is around 25, and no start can do better than the centre,
    where it is at most `10 * 0.3^2 = 0.9` before adaptation."""
    grad_fn = reptile_gradients(
        squared_error_loss(lambda params, x: x @ params),
        inner_optimizer=optax.sgd(0.03),
        num_steps=5,
        batch_at=mini_batches(3),
    )
    batched = mean_over_tasks(grad_fn)

    def train(params, key):
        direction, metrics = batched(params, linear_tasks(key), key)
        return params - 0.5 * direction, metrics["loss"]

    params, losses = jax.jit(lambda p, keys: jax.lax.scan(train, p, keys))(
        jnp.zeros((10, 1)), jax.random.split(KEY, 150)
    )
    assert losses[:5].mean() > 15
    assert losses[-20:].mean() < 0.9
    np.testing.assert_allclose(params, 2.0, atol=0.25)


def test_derivative_free_memory_does_not_grow_with_the_steps():
    params, task = one_task()

    def temporaries(num_steps):
        grad_fn = reptile_gradients(
            regression, inner_optimizer=optax.sgd(RATE), num_steps=num_steps
        )
        compiled = jax.jit(grad_fn).lower(params, task, KEY).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Eight bytes a step for the support loss of each.
    assert temporaries(50) <= temporaries(5) + 45 * 64


def test_vmap_equals_a_loop():
    params, tasks = example()
    grad_fn = reptile_gradients(regression, inner_optimizer=optax.sgd(RATE), num_steps=2)
    jitted = jax.jit(grad_fn)
    loop = [jitted(params, jax.tree.map(lambda x, t=t: x[t], tasks), KEY) for t in range(3)]
    vmapped = jax.jit(jax.vmap(grad_fn, in_axes=(None, 0, None)))(params, tasks, KEY)
    assert_close(vmapped, jax.tree.map(lambda *xs: jnp.stack(xs), *loop))


def test_where_the_support_teaches_nothing_the_direction_is_zero_and_finite():
    params, task = one_task()
    # Zeros are answered exactly, whatever the rounding, which Adam would blow up.
    params = jax.tree.map(jnp.zeros_like, params)
    perfect = Episode((task.support[0], jnp.zeros_like(task.support[1])), task.query)
    grad_fn = reptile_gradients(regression, inner_optimizer=optax.adam(RATE, b1=0.0), num_steps=3)
    direction, metrics = jax.jit(grad_fn)(params, perfect, KEY)
    chex.assert_tree_all_finite((direction, metrics))
    assert_close(metrics, jax.jit(gradients(regression))(params, task.query, KEY)[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("support", "message"),
    [
        (np.zeros((3, 2)), r"hold \[3\] examples; a mini-batch of 4 needs 4 or more"),
        ((np.zeros(5), np.zeros(6)), r"hold \[5, 6\] examples; .* the same number in every leaf"),
    ],
)
def test_refuses_a_support_set_of_too_few_or_unequal_examples(support, message):
    with pytest.raises(ValueError, match=message):
        mini_batches(4)(support, jnp.int32(0), KEY)


def test_refuses_empty_mini_batches():
    with pytest.raises(ValueError, match="size is 0; give 1 or more examples"):
        mini_batches(0)
