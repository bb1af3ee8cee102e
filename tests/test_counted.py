"""Means over what is counted: by hand, and the same on any devices in any chunks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.counted import counted_mean, weighted_by_count
from metagen_jax.errors import UserError
from metagen_jax.gradients import gradients, mean_over_tasks
from metagen_jax.parallel import data_parallel


def task_loss(params, task, key):
    """The mean over the counted numbers of a task of `(p x)^2`."""
    del key
    values, counted = task
    mean = counted_mean(jnp.square(params * values), counted)
    return mean, {
        "count": counted.sum().astype(values.dtype),
        "size": counted_mean(values, counted),
    }


def batch():
    rng = np.random.default_rng(0)
    counted = rng.random((16, 5)) < rng.random((16, 1))
    counted[3] = False
    return jnp.asarray(rng.normal(size=(16, 5))), jnp.asarray(counted)


def test_by_hand():
    values, counted = jnp.array([1.0, 2.0, 30.0]), jnp.array([True, True, False])
    assert counted_mean(values, counted) == 1.5
    nothing = jnp.zeros(3, bool)
    value, gradient = jax.value_and_grad(counted_mean)(values, nothing)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
    # Two devices, of 2 and 1 counted numbers: their mean is that of the three.
    both = jnp.array([[1.0, 2.0], [9.0, 5.0]]), jnp.array([[True, True], [False, True]])
    each = jax.vmap(lambda v, c: counted_mean(v, c, axis_name="i"), axis_name="i")(*both)
    np.testing.assert_allclose(each, [2, 10 / 3], rtol=1e-6)
    assert each.mean() == pytest.approx(8 / 3)


@pytest.mark.parametrize("chunk", [None, 1, 4, 16])
@pytest.mark.parametrize("num_devices", [1, 4])
def test_tasks_weigh_as_much_as_they_count(chunk, num_devices):
    with jax.enable_x64(True):
        values, counted = batch()
        expected = np.square(2 * np.asarray(values))[np.asarray(counted)].mean()
        grad_fn = weighted_by_count(
            gradients(task_loss),
            lambda g: data_parallel(
                mean_over_tasks(g, chunk=chunk), devices=jax.devices("cpu")[:num_devices]
            ),
        )
        gradient, metrics = grad_fn(jnp.asarray(2.0), (values, counted), jax.random.key(0))
        # d/dp (p x)^2 = 2 (p x)^2 / p.
        np.testing.assert_allclose(gradient, expected, rtol=1e-12)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-12)
        np.testing.assert_allclose(metrics["size"], values[counted].mean(), rtol=1e-12)
        assert metrics["count"] == counted.sum() / 16


def test_nothing_counted_anywhere_gives_zeros():
    values, counted = batch()
    grad_fn = weighted_by_count(gradients(task_loss), mean_over_tasks)
    results = grad_fn(jnp.asarray(2.0), (values, jnp.zeros_like(counted)), jax.random.key(0))
    chex.assert_trees_all_equal(*(jax.tree.map(f, results) for f in (lambda x: x, jnp.zeros_like)))


def test_says_which_metric_is_missing():
    def loss_fn(params, task, key):
        return params, {"accuracy": params}

    with pytest.raises(UserError, match="weighted_by_count needs `count`"):
        weighted_by_count(gradients(loss_fn), mean_over_tasks)(
            jnp.ones(()), jnp.ones(3), jax.random.key(0)
        )
