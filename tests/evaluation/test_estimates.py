"""Means over tasks and their intervals."""

import numpy as np

from metagen_jax.evaluation.estimates import estimate, percent


def test_interval_worked_by_hand():
    # Deviations -1/4, 0, 1/4 from 1/2: s^2 = (1/16 + 0 + 1/16) / 2 = 1/16, s = 1/4.
    accuracy = estimate(np.array([0.25, 0.5, 0.75]))
    assert accuracy.mean == 0.5
    np.testing.assert_allclose(accuracy.interval, 1.96 * 0.25 / np.sqrt(3))


def test_interval_covers_the_true_mean_95_times_in_100():
    draws = np.random.default_rng(0).binomial(25, 0.8, size=(1000, 2000)) / 25
    accuracy = estimate(draws)
    covered = np.mean(np.abs(accuracy.mean - 0.8) < accuracy.interval)
    assert 0.935 < covered < 0.965


def test_one_entry_is_the_estimate_of_its_column():
    steps = np.random.default_rng(0).normal(size=(20, 3))
    for of_all, alone in zip(estimate(steps).at(1), estimate(steps[:, 1]), strict=True):
        np.testing.assert_allclose(of_all, alone, rtol=1e-12, atol=1e-15)


def test_one_diverged_task_makes_mean_and_interval_infinite_and_only_where_it_diverged():
    errors = estimate(np.array([[1.0, 5.0, np.inf], [2.0, np.nan, 1.0], [6.0, 5.0, 1.0]]))
    np.testing.assert_array_equal(errors.mean, [3, np.inf, np.inf])
    np.testing.assert_allclose(errors.interval, [1.96 * np.sqrt(7 / 3), np.inf, np.inf])


def test_percent_is_as_in_a_table():
    assert percent(estimate(np.array([0.97, 0.99]))) == "98.00 ± 1.96 %"
