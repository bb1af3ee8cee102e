"""Losses of pairs over devices: one device's value and gradient, and what a device compares."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from metagen_jax.gradients import gradients
from metagen_jax.parallel import data_parallel
from metagen_jax.self_supervised.contrastive import (
    info_nce,
    nt_xent,
    sigmoid_pairs,
    supervised_contrastive,
)
from metagen_jax.self_supervised.decorrelation import barlow_twins, vicreg

NUM_EXAMPLES = 24


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def labelled(a, b, labels, **options):
    z = jnp.concatenate([a, b])
    return supervised_contrastive(z, jnp.tile(labels, 2), temperature=0.3, **options)


LOSSES = {
    "nt_xent": lambda a, b, labels, **options: nt_xent(a, b, temperature=0.3, **options),
    "nt_xent, blocks": lambda a, b, labels, **options: nt_xent(
        a, b, temperature=0.3, block_size=4, **options
    ),
    "info_nce": lambda a, b, labels, **options: info_nce(a, b, temperature=0.3, **options),
    "info_nce, blocks": lambda a, b, labels, **options: info_nce(
        a, b, temperature=0.3, block_size=2, **options
    ),
    "supervised_contrastive": labelled,
    "supervised_contrastive, blocks": functools.partial(labelled, block_size=4),
    "sigmoid_pairs": lambda a, b, labels, **options: sigmoid_pairs(
        a, b, temperature=0.3, bias=-1.0, **options
    ),
    "sigmoid_pairs, blocks": lambda a, b, labels, **options: sigmoid_pairs(
        a, b, temperature=0.3, bias=-1.0, block_size=2, **options
    ),
    "barlow_twins": lambda a, b, labels, **options: barlow_twins(a, b, **options),
    "vicreg": lambda a, b, labels, **options: vicreg(a, b, **options),
}


def example(dtype):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(5, 4)), dtype)}
    views = rng.normal(size=(2, NUM_EXAMPLES, 5))
    batch = (*jnp.asarray(views, dtype), jnp.asarray(rng.integers(0, 4, NUM_EXAMPLES)))
    return params, batch, jax.random.key(0)


def gradient_of(name, axis_name=None):
    def loss_fn(params, batch, key):
        z_a, z_b = (jnp.tanh(x @ params["w"]) for x in batch[:2])
        return LOSSES[name](z_a, z_b, batch[2], axis_name=axis_name).mean(), {}

    return gradients(loss_fn)


@pytest.mark.parametrize("name", LOSSES)
def test_eight_devices_have_the_loss_and_gradient_of_one_in_float64(float64, name):
    arguments = example(jnp.float64)
    expected = jax.jit(gradient_of(name))(*arguments)
    many = data_parallel(gradient_of(name, "tasks"), devices=jax.devices("cpu")[:8])
    chex.assert_trees_all_close(many(*arguments), expected, rtol=0, atol=1e-12)
    # Without the other devices' rows it is another number.
    alone = data_parallel(gradient_of(name), devices=jax.devices("cpu")[:8])
    difference = alone(*arguments)[1]["loss"] - expected[1]["loss"]
    assert abs(difference) > 1e-3


@pytest.mark.parametrize(("method", "num_devices"), [("pmap", 8), ("shard_map", 2)])
def test_nt_xent_on_devices_in_float32(method, num_devices):
    arguments = example(jnp.float32)
    expected = jax.jit(gradient_of("nt_xent"))(*arguments)
    many = data_parallel(
        gradient_of("nt_xent, blocks", "tasks"),
        devices=jax.devices("cpu")[:num_devices],
        method=method,
    )
    chex.assert_trees_all_close(many(*arguments), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_eight_devices_have_the_loss_and_gradient_of_one_in_float32(name):
    arguments = example(jnp.float32)
    expected = jax.jit(gradient_of(name))(*arguments)
    many = data_parallel(gradient_of(name, "tasks"), devices=jax.devices("cpu")[:8])
    chex.assert_trees_all_close(many(*arguments), expected, rtol=1e-6, atol=1e-6)


def test_temporaries_of_the_ring_grow_with_the_block_and_not_with_the_square_of_the_batch():
    def temporaries(num_examples, block_size):
        """Of one of eight devices, for value and gradient."""

        def loss_fn(scale, views, key):
            z_a, z_b = (scale * view for view in views)
            losses = nt_xent(z_a, z_b, temperature=0.5, axis_name="tasks", block_size=block_size)
            return losses.mean(), {}

        many = data_parallel(gradients(loss_fn), devices=jax.devices("cpu")[:8])
        shape = jax.ShapeDtypeStruct((num_examples, 16), jnp.float32)
        lowered = jax.jit(many).lower(jnp.float32(1), (shape, shape), jax.random.key(0))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    # A device's views by those of all.
    scores = 4 * (2 * 2048 // 8) * (2 * 2048)
    assert temporaries(2048, None) >= scores
    assert temporaries(2048, 16) < scores / 4
    assert temporaries(4096, 16) < 2.2 * temporaries(2048, 16)


@pytest.mark.slow
def test_positives_of_a_device_are_its_own_pairs_and_its_classes_elsewhere():
    """Two devices of two examples along axes: what each finds and is distracted by, by hand."""
    # The other view of an example is on its own device; example 0 and example 2, on the other
    # device, have the same direction.
    e = np.eye(4, dtype=np.float32)
    z = jnp.asarray([[e[0], e[1]], [e[0], e[2]]])
    of_devices = jax.vmap(lambda z: nt_xent(z, z, temperature=1.0, axis_name="i"), axis_name="i")(z)
    # Of seven other views example 0 has three of its direction, example 1 one.
    first, second = np.log(3 * np.e + 4) - 1, np.log(np.e + 6) - 1
    np.testing.assert_allclose(of_devices, [[first, second] * 2] * 2, rtol=1e-6)
    # With classes: 0 on device 0 and 0 on device 1 are positives of each other, 1 and 2 have none.
    labels = jnp.asarray([[5, 6], [5, 7]])
    of_devices = jax.vmap(
        lambda z, y: supervised_contrastive(z, y, temperature=1.0, axis_name="i"), axis_name="i"
    )(z, labels)
    found = np.log(np.e + 2) - 1
    np.testing.assert_allclose(of_devices, [[found, 0], [found, 0]], rtol=1e-6)


@pytest.mark.slow
def test_a_single_row_on_each_device_has_the_others_for_candidates():
    z = np.random.default_rng(0).normal(size=(4, 1, 3)).astype(np.float32)
    labels = jnp.asarray([[0], [1], [0], [2]])

    def losses(z):
        return jax.vmap(
            lambda z, y: supervised_contrastive(z, y, temperature=0.5, axis_name="i"),
            axis_name="i",
        )(z, labels)

    expected = references.supervised_contrastive(z[:, 0], np.asarray(labels)[:, 0], 0.5)
    np.testing.assert_allclose(losses(z)[:, 0], expected, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda z: losses(z).sum())
    # To second order: a device's own candidates are none, and a sum of none has no derivative.
    chex.assert_tree_all_finite(jax.jit(lambda z: jax.jvp(gradient, (z,), (jnp.ones_like(z),)))(z))
