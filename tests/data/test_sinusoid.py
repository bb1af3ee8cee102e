"""The sinusoid tasks against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from metagen_jax.data.sinusoid import oracle_episode, sample_sinusoid_task, sinusoid


def draw(num_tasks, **kwargs):
    keys = jax.random.split(jax.random.key(0), num_tasks)
    return jax.vmap(lambda key: sample_sinusoid_task(key, **kwargs))(keys)


def test_sinusoid_by_hand():
    x = jnp.array([0.0, jnp.pi / 2, 2.0])
    np.testing.assert_allclose(
        sinusoid(x, jnp.float32(3), jnp.float32(jnp.pi / 2)),
        [-3, 0, 3 * np.sin(2 - np.pi / 2)],
        atol=1e-6,
    )


def test_points_lie_on_the_sinusoid_that_the_task_names():
    task = draw(50, num_shots=5, num_queries=7)
    for x, y in task.episode:
        expected = np.asarray(task.amplitude)[:, None, None] * np.sin(
            np.asarray(x, np.float64) - np.asarray(task.phase)[:, None, None]
        )
        np.testing.assert_allclose(y, expected, atol=1e-5)
    assert task.episode.support[0].shape == (50, 5, 1)
    assert task.episode.query[1].shape == (50, 7, 1)


def test_amplitude_phase_and_inputs_have_the_published_distributions_and_are_independent():
    task = draw(4000, num_shots=1, num_queries=1)
    drawn = np.stack(
        [task.amplitude, task.phase, task.episode.support[0].ravel(), task.episode.query[0].ravel()]
    )
    ranges = [(0.1, 5), (0, np.pi), (-5, 5), (-5, 5)]
    for values, (low, high) in zip(drawn, ranges, strict=True):
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    correlation = np.corrcoef(drawn) - np.eye(4)
    assert np.abs(correlation).max() < 4 / np.sqrt(4000)


def test_is_a_pure_function_of_the_key_whose_support_does_not_depend_on_the_queries():
    key = jax.random.key(3)
    task = sample_sinusoid_task(key, num_shots=5, num_queries=10)
    again = jax.jit(lambda k: sample_sinusoid_task(k, num_shots=5, num_queries=10))(key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), task, again)
    even = sample_sinusoid_task(key, num_shots=5, num_queries=3, even_queries=True)
    np.testing.assert_array_equal(even.episode.support[0], task.episode.support[0])
    assert even.amplitude == task.amplitude
    other = sample_sinusoid_task(jax.random.key(4), num_shots=5, num_queries=10)
    assert other.amplitude != task.amplitude


def test_even_queries_span_the_inputs():
    task = sample_sinusoid_task(jax.random.key(0), num_shots=1, num_queries=5, even_queries=True)
    np.testing.assert_allclose(task.episode.query[0].ravel(), [-5, -2.5, 0, 2.5, 5])


def test_an_oracle_is_given_amplitude_and_phase_beside_each_input():
    task = sample_sinusoid_task(jax.random.key(0), num_shots=5, num_queries=7)
    episode = oracle_episode(task)
    for (x, y), (given, same_y) in zip(task.episode, episode, strict=True):
        np.testing.assert_array_equal(given[:, :1], x)
        np.testing.assert_array_equal(given[:, 1], np.full(len(x), task.amplitude))
        np.testing.assert_array_equal(given[:, 2], np.full(len(x), task.phase))
        np.testing.assert_array_equal(same_y, y)


@pytest.mark.parametrize(
    "counts", [{"num_shots": 0, "num_queries": 1}, {"num_shots": 1, "num_queries": 0}]
)
def test_no_shots_or_no_queries_is_an_error_that_says_so(counts):
    with pytest.raises(ValueError, match=r"give 1 or more of each"):
        sample_sinusoid_task(jax.random.key(0), **counts)
