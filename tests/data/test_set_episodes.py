"""Episodes of one class, drawn on the device."""

import functools

import jax
import numpy as np
import pytest

from metagen_jax.data.episodes import check_episodes, group_by_class
from metagen_jax.data.set_episodes import first_shots, sample_set_episode, vary_shots
from metagen_jax.errors import UserError
from metagen_jax.types import Episode

KEY = jax.random.key(0)


def numbered():
    """Examples that are (class, number), 8 of each of 5 classes."""
    pairs = np.array([(c, i) for c in range(5) for i in range(8)])
    return group_by_class(pairs, pairs[:, 0])


@pytest.mark.parametrize(("num_shots", "num_queries"), [(0, 1), (3, 5), (7, 1)])
def test_support_and_query_are_different_examples_of_one_class(num_shots, num_queries):
    sample = jax.jit(
        functools.partial(sample_set_episode, num_shots=num_shots, num_queries=num_queries)
    )
    classes = set()
    for seed in range(20):
        episode = sample(jax.random.key(seed), numbered())
        assert (len(episode.support), len(episode.query)) == (num_shots, num_queries)
        both = np.concatenate(episode)
        assert len(set(both[:, 0])) == 1
        assert len(set(both[:, 1])) == num_shots + num_queries
        classes.add(int(both[0, 0]))
    assert classes == set(range(5))


def test_with_replacement_each_example_is_one_of_all():
    sample = functools.partial(sample_set_episode, num_shots=2, num_queries=1, replacement=True)
    episodes = jax.jit(jax.vmap(sample, (0, None)))(jax.random.split(KEY, 3200), numbered())
    drawn = np.concatenate(episodes, axis=1)
    assert np.all(drawn[..., 0] == drawn[:, :1, 0])
    # Of 8 examples any two are the same in an eighth of the episodes, and each is as likely.
    again = (drawn[:, :2, 1] == drawn[:, 2:, 1]).mean(0)
    np.testing.assert_allclose(again, 1 / 8, atol=4 * np.sqrt(7 / 64 / 3200))
    _, counts = np.unique(drawn[..., 1], return_counts=True)
    assert ((counts - 1200) ** 2 / 1200).sum() < 24.4  # 7 degrees of freedom, 0.001


def test_classes_of_any_size_suffice_with_replacement():
    check = functools.partial(check_episodes, numbered(), num_ways=1, num_shots=9, num_queries=1)
    check(replacement=True)
    with pytest.raises(UserError, match="9 shots and 1 queries need 10 examples"):
        check()


@pytest.mark.slow
def test_it_is_a_function_of_the_key_alone():
    sample = functools.partial(sample_set_episode, num_shots=2, num_queries=2)
    keys = jax.random.split(KEY, 4)
    together = jax.jit(jax.vmap(sample, (0, None)))(keys, numbered())
    for i, key in enumerate(keys):
        alone = sample(key, numbered())
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a, b[i]), alone, together)


@pytest.mark.slow
def test_grey_values_are_the_probabilities_of_ink():
    images = np.broadcast_to(np.array([0, 51, 255], np.uint8), (40, 2000, 3))
    data = group_by_class(images, np.zeros(40, int))
    drawn = sample_set_episode(KEY, data, num_shots=2, num_queries=2, values="bernoulli")
    for images in (*drawn.support, *drawn.query):
        assert set(np.unique(images)) == {0, 1}
        np.testing.assert_allclose(np.mean(images, 0), [0, 0.2, 1], atol=0.04)
    # Each example has a draw of its own.
    assert np.any(drawn.support[0] != drawn.query[0])
    stored = sample_set_episode(KEY, data, num_shots=1, num_queries=1)
    np.testing.assert_array_equal(stored.query[0], data.examples[0])
    assert stored.query.dtype == np.int32


def test_fewer_shots_are_the_first_of_the_same_episode():
    episode = sample_set_episode(KEY, numbered(), num_shots=4, num_queries=2)
    for num_shots in range(5):
        part = first_shots(episode, num_shots)
        np.testing.assert_array_equal(part.support, episode.support[:num_shots])
        np.testing.assert_array_equal(part.query, episode.query)


def test_varied_shots_repeat_what_is_left_and_leave_every_number_equally_often():
    episode = Episode(np.arange(4), np.array([9]))
    supports = jax.jit(jax.vmap(lambda key: vary_shots(key, episode)))(
        jax.random.split(KEY, 4000)
    ).support
    kinds, counts = np.unique(supports, axis=0, return_counts=True)
    assert kinds.tolist() == [[0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 2, 0], [0, 1, 2, 3]]
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3  # 3 degrees of freedom, 0.001


def test_what_cannot_be_is_refused():
    episode = sample_set_episode(KEY, numbered(), num_shots=4, num_queries=2)
    with pytest.raises(UserError, match="num_shots is 5 and there are 4; give 0 to as many"):
        first_shots(episode, 5)


@pytest.mark.usefixtures("ill_typed")
def test_unknown_values_are_refused():
    with pytest.raises(UserError, match='values is \'grey\'; give "stored" or "bernoulli"'):
        sample_set_episode(KEY, numbered(), num_shots=1, num_queries=1, values="grey")
