"""Batches and episodes drawn on the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.data.episodes import group_by_class, sample_batch


def test_a_batch_has_each_example_equally_often_with_the_label_of_its_class():
    labels = np.repeat([7, 3, 5], [1, 2, 5])
    data = group_by_class(np.arange(8), labels)
    batch = jax.jit(functools.partial(sample_batch, batch_size=8000))
    examples, classes = batch(jax.random.key(0), data)
    # Classes are numbered in the order of their labels 3, 5, 7.
    np.testing.assert_array_equal(classes, np.searchsorted([3, 5, 7], labels[examples]))
    assert classes.dtype == jnp.int32
    counts = np.bincount(examples, minlength=8)
    assert np.all(np.abs(counts - 1000) < 5 * np.sqrt(1000))


def test_a_turned_example_of_a_batch_has_a_label_of_its_own():
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 2)).astype(np.uint8)
    data = group_by_class(images, np.repeat(np.arange(3), 2))
    batch = jax.jit(functools.partial(sample_batch, batch_size=64, num_rotations=4))
    examples, labels = batch(jax.random.key(1), data)
    assert examples.dtype == np.uint8
    assert set(np.asarray(labels).tolist()) == set(range(12))
    for example, label in zip(np.asarray(examples), np.asarray(labels), strict=True):
        kind, turns = divmod(int(label), 4)
        candidates = [np.rot90(image, turns) for image in images[2 * kind : 2 * kind + 2]]
        assert any(np.array_equal(example, candidate) for candidate in candidates)
