"""Means over tasks and their intervals."""

import numpy as np
import pytest

from metagen_jax.errors import UserError
from metagen_jax.evaluation.estimates import estimate, estimate_ratio, percent


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


def test_a_ratio_weighs_tasks_by_what_they_count():
    """By hand: 6 / 3 = 2; deviations 2 - 2 = 0 and 4 - 4 = 0 of one proportional to its counts."""
    ratio = estimate_ratio(np.array([2.0, 4.0]), np.array([1, 2]))
    assert (float(ratio.mean), float(ratio.interval)) == (2.0, 0.0)
    of_alike = estimate_ratio(np.array([6.0, 2.0, 4.0]), np.array([2, 2, 2]))
    plain = estimate(np.array([3.0, 1.0, 2.0]))
    assert of_alike.mean == pytest.approx(plain.mean)
    assert of_alike.interval == pytest.approx(plain.interval)


def test_the_interval_of_a_ratio_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        counts = rng.integers(1, 20, 100)
        # Noise that a whole task has in common.
        totals = counts * (3 + rng.normal(0, 1, 100))
        ratio = estimate_ratio(totals, counts)
        covered += abs(ratio.mean - 3) < ratio.interval
    assert 0.925 < covered / 1000 < 0.965


def test_a_ratio_to_nothing_is_refused():
    with pytest.raises(UserError, match="counts sum to 0; a ratio needs something counted"):
        estimate_ratio(np.array([1.0, 2.0]), np.array([0, 0]))
