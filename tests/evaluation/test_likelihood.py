"""Test log-likelihoods: the same for every chunk and number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.errors import UserError
from metagen_jax.evaluation.likelihood import evaluate_log_prob, importance_sampled_log_prob
from metagen_jax.generative.likelihoods import gaussian_log_prob
from metagen_jax.generative.vae import gaussian_inference, importance_weighted_log_prob

KEY = jax.random.key(0)
INFER = gaussian_inference(
    lambda params, x: (params * x, jnp.full_like(x, -0.5)),
    lambda params, z: z,
    lambda x, mean: gaussian_log_prob(x, mean, -1.0).sum(),
)


def noisy(params, x, key):
    return params - jnp.square(x).sum() + jax.random.normal(key)


@pytest.mark.parametrize("chunk", [1, 2, 5, 7, 100])
def test_importance_samples_are_the_same_for_every_chunk(chunk):
    x = jnp.array([0.3, -1.2])
    expected = importance_weighted_log_prob(INFER, num_samples=7)(0.5, x, KEY)
    actual = importance_sampled_log_prob(INFER, num_samples=7, chunk=chunk)(0.5, x, KEY)
    assert actual == pytest.approx(float(expected), rel=1e-6)


def test_thousands_of_samples_reach_the_marginal_likelihood():
    """`z ~ N(0, 1)`, `x = z + e^-1 noise`: `x ~ N(0, 1 + e^-2)`."""
    x = jnp.array([0.3, -1.2])
    exact = gaussian_log_prob(x, 0.0, 0.5 * jnp.log1p(jnp.exp(-2.0))).sum()
    actual = importance_sampled_log_prob(INFER, num_samples=5000)(0.5, x, KEY)
    assert actual == pytest.approx(float(exact), abs=0.03)


def test_weights_that_underflow_are_added_as_logarithms():
    infer = gaussian_inference(
        lambda params, x: (x, jnp.zeros_like(x)),
        lambda params, z: z,
        lambda x, z: jnp.full((), -1e4),
    )
    x = jnp.zeros(2)
    for chunk in (1, 3):
        log_prob = importance_sampled_log_prob(infer, num_samples=6, chunk=chunk)
        assert log_prob((), x, KEY) == pytest.approx(-1e4, rel=1e-6)


@pytest.mark.parametrize(("chunk", "num_devices"), [(1, 1), (3, 1), (100, 1), (2, 4)])
def test_an_estimate_is_that_of_a_loop(chunk, num_devices):
    examples = jnp.arange(10.0).reshape(5, 2)
    devices = jax.local_devices()[:num_devices]
    found = evaluate_log_prob(
        noisy, jnp.float32(0.5), examples, key=KEY, chunk=chunk, devices=devices
    )
    expected = [float(noisy(0.5, x, jax.random.fold_in(KEY, n))) for n, x in enumerate(examples)]
    np.testing.assert_allclose(found.per_task, expected, rtol=1e-6)
    assert found.mean == pytest.approx(np.mean(expected))
    assert found.interval == pytest.approx(1.96 * np.std(expected, ddof=1) / np.sqrt(5))


def test_an_example_of_probability_zero_is_seen():
    found = evaluate_log_prob(
        lambda params, x, key: jnp.log(x), (), jnp.array([1.0, 0.0]), key=KEY, chunk=2
    )
    assert found.mean == -np.inf


def test_mistakes_are_named():
    with pytest.raises(UserError, match="num_samples is 0"):
        importance_sampled_log_prob(INFER, num_samples=0)
    with pytest.raises(UserError, match="chunk is 0"):
        importance_sampled_log_prob(INFER, num_samples=1, chunk=0)
    with pytest.raises(UserError, match="1 example"):
        evaluate_log_prob(noisy, 0.5, jnp.zeros((1, 2)), key=KEY)
    with pytest.raises(UserError, match=r"shape \(2,\); give one number"):
        evaluate_log_prob(lambda params, x, key: x, (), jnp.zeros((3, 2)), key=KEY)
