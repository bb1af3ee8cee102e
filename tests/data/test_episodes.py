"""Batches and episodes drawn on the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.data.episodes import (
    check_episodes,
    group_by_class,
    sample_batch,
    sample_distinct,
    sample_episode,
)

SHAPE = {"num_ways": 3, "num_shots": 2, "num_queries": 3}


def numbered(sizes=(5, 9, 6, 7)):
    """Examples that are (class, number), in classes of different sizes."""
    pairs = np.array([(c, i) for c, size in enumerate(sizes) for i in range(size)])
    order = np.random.default_rng(0).permutation(len(pairs))
    return group_by_class({"pair": pairs[order]}, pairs[order, 0])


def test_every_ordered_choice_of_distinct_numbers_is_equally_likely():
    keys = jax.random.split(jax.random.key(0), 24_000)
    draws = np.asarray(jax.vmap(lambda key: sample_distinct(key, 4, 3))(keys))
    choices, counts = np.unique(draws, axis=0, return_counts=True)
    assert len(choices) == 24
    assert all(len(set(choice)) == 3 for choice in choices.tolist())
    # 23 degrees of freedom: 49.7 has probability 0.001.
    assert ((counts - 1000) ** 2 / 1000).sum() < 49.7


def test_an_episode_has_distinct_classes_and_disjoint_examples_of_them():
    data = numbered()
    sample = jax.jit(functools.partial(sample_episode, **SHAPE))
    for seed in range(50):
        episode = sample(jax.random.key(seed), data)
        classes = []
        for label in range(3):
            parts = [np.asarray(x["pair"])[np.asarray(y) == label] for x, y in episode]
            assert [len(part) for part in parts] == [2, 3]
            both = np.concatenate(parts)
            assert len(set(both[:, 0])) == 1
            assert len(set(both[:, 1])) == 5
            classes.append(int(both[0, 0]))
        assert len(set(classes)) == 3


def test_the_labels_of_an_episode_say_nothing_of_its_classes():
    keys = jax.random.split(jax.random.key(1), 4000)
    episodes = jax.vmap(lambda key: sample_episode(key, numbered(), **SHAPE))(keys)
    first = np.asarray(episodes.support[0]["pair"])[:, 0, 0]
    counts = np.bincount(first, minlength=4)
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3  # 3 degrees of freedom, 0.001


def test_all_examples_of_a_turned_class_are_turned_alike():
    images = np.random.default_rng(0).normal(size=(2, 5, 5, 1))
    data = group_by_class(np.repeat(images, 6, axis=0), np.repeat([0, 1], 6))
    shape = {**SHAPE, "num_ways": 8, "num_rotations": 4}
    episode = sample_episode(jax.random.key(0), data, **shape)
    turned = [np.rot90(image, turns) for image in images for turns in range(4)]
    kinds = [
        next(i for i, candidate in enumerate(turned) if np.allclose(candidate, x, atol=1e-6))
        for x in np.asarray(episode.support[0])
    ]
    assert sorted(kinds) == sorted([*range(8)] * 2)
    assert kinds[::2] == kinds[1::2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_ways": 5}, "5-way episodes need 5 classes and the data has 4"),
        ({"num_queries": 4}, "need 6 examples of each class and the smallest class has 5"),
        ({"num_rotations": 3}, "num_rotations is 3; give 1, or 4"),
        ({"num_ways": 0}, "num_ways is 0, .* give 1 way or more"),
        ({"num_shots": -1}, "num_shots -1 .* no negative number"),
        ({"num_ways": 17, "num_rotations": 4}, "the data has 16 with their quarter turns"),
    ],
)
def test_impossible_episodes_are_refused(changes, message):
    check_episodes(numbered(), **SHAPE)
    asked = {**SHAPE, **changes}
    with pytest.raises(ValueError, match=message):
        check_episodes(numbered(), **asked)
    if "num_queries" not in changes:  # How large classes are can't be seen within a program.
        with pytest.raises(ValueError, match=message):
            jax.jit(functools.partial(sample_episode, **asked))(jax.random.key(0), numbered())


@pytest.mark.usefixtures("ill_typed")
def test_labels_must_match_examples():
    with pytest.raises(ValueError, match="2 labels for examples of lengths"):
        group_by_class(np.zeros((3, 1)), np.zeros(2))


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
