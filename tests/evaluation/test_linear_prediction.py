"""Linear prediction against SciPy's Laplace distribution and a process whose taps are known."""

import math

import numpy as np
import pytest
from scipy import stats

from metagen_jax.errors import UserError
from metagen_jax.evaluation.linear_prediction import (
    LinearPrediction,
    fit_linear_prediction,
    linear_prediction_log_prob,
)

# Levels that lie closer in the middle, as mu-law's do.
VALUES = np.sinh(np.linspace(-3, 3, 41))
EDGES = np.sinh(np.linspace(-3, 3, 81)[1::2])
TAPS, SCALE = np.array([-0.5, 1.2]), 0.6


def a_process(length, seed=0):
    """`x_t = 1.2 x_{t-1} - 0.5 x_{t-2} + 0.1 + noise`, as the codes of its values."""
    noise = np.random.default_rng(seed).laplace(0, SCALE, length)
    x = np.zeros(length + 2)
    for t in range(2, length + 2):
        x[t] = TAPS @ x[t - 2 : t] + 0.1 + noise[t - 2]
    return np.searchsorted(EDGES, x[2:])


def test_log_probabilities_are_masses_of_the_noise_between_edges():
    model = LinearPrediction(TAPS, 0.1, SCALE, VALUES, EDGES)
    codes = a_process(200)
    x = np.concatenate([np.zeros(2), VALUES[codes]])
    ends = np.concatenate([[-np.inf], EDGES, [np.inf]])
    expected = []
    for t, code in enumerate(codes):
        noise = stats.laplace(TAPS @ x[t : t + 2] + 0.1, SCALE)
        expected.append(np.log(noise.cdf(ends[code + 1]) - noise.cdf(ends[code])))
    np.testing.assert_allclose(linear_prediction_log_prob(model, codes), expected, rtol=1e-9)


def test_the_probabilities_of_all_codes_sum_to_one():
    for scale in (0.01, 1.0, 100.0):
        model = LinearPrediction(np.array([0.9]), 0.0, scale, VALUES, EDGES)
        for first in (0, 17, 40):
            pairs = [np.array([first, code]) for code in range(41)]
            masses = [np.exp(linear_prediction_log_prob(model, pair)[1]) for pair in pairs]
            assert sum(masses) == pytest.approx(1, rel=1e-12)


def test_far_from_the_prediction_the_mass_is_small_and_not_zero():
    """By hand: the first code, from a prediction `d` above its edge, has `exp(-d / b) / 2`."""
    model = LinearPrediction(np.array([1.0]), 0.0, 1e-3, VALUES, EDGES)
    log_prob = linear_prediction_log_prob(model, np.array([40, 0]))[1]
    assert log_prob == pytest.approx(-(VALUES[40] - EDGES[0]) / 1e-3 - math.log(2), rel=1e-12)


def test_bytes_are_codes_as_good_as_others():
    levels = np.arange(256.0)
    model = LinearPrediction(np.array([0.9]), 0.0, 9.0, levels, levels[1:] - 0.5)
    codes = np.array([250, 255, 0, 255])
    log_probs = linear_prediction_log_prob(model, codes)
    np.testing.assert_array_equal(
        linear_prediction_log_prob(model, codes.astype(np.uint8)), log_probs
    )
    assert log_probs[1] > np.log(0.01)


def test_taps_and_noise_of_a_process_are_found():
    codes = a_process(60_000)
    model = fit_linear_prediction(np.split(codes, 6), values=VALUES, edges=EDGES, num_taps=3)
    np.testing.assert_allclose(model.taps, [0, *TAPS], atol=0.03)
    assert model.offset == pytest.approx(0.1, abs=0.02)
    assert model.scale == pytest.approx(SCALE, rel=0.05)


def test_the_scale_is_where_the_likelihood_of_the_codes_is_largest():
    codes = a_process(2000)
    model = fit_linear_prediction([codes], values=VALUES, edges=EDGES, num_taps=2)

    def likelihood(scale):
        return linear_prediction_log_prob(model._replace(scale=scale), codes).sum()

    best = likelihood(model.scale)
    assert best > likelihood(1.02 * model.scale)
    assert best > likelihood(model.scale / 1.02)


def test_sequences_of_silence_are_fitted_too():
    model = fit_linear_prediction([np.full(50, 20)], values=VALUES, edges=EDGES)
    log_probs = linear_prediction_log_prob(model, np.full(50, 20))
    assert (log_probs > -1e-6).all()


def test_says_what_is_needed():
    codes = a_process(100)
    with pytest.raises(UserError, match="there are 41 edges for 41 values; give one between"):
        fit_linear_prediction([codes], values=VALUES, edges=VALUES)
    with pytest.raises(UserError, match="there are 40 edges for 41 values; give one between"):
        fit_linear_prediction([codes], values=VALUES, edges=EDGES[::-1])
    with pytest.raises(UserError, match="there are 9 samples for 8 taps; give more"):
        fit_linear_prediction([codes[:9]], values=VALUES, edges=EDGES)
