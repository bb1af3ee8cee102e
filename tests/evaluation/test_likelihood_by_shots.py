"""Likelihoods by shots: those of the ordinary code at none, of a plain loop at more."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagen_jax.data.episodes import group_by_class
from metagen_jax.data.set_episodes import sample_set_episode
from metagen_jax.errors import UserError
from metagen_jax.evaluation.likelihood import evaluate_log_prob, importance_sampled_log_prob
from metagen_jax.evaluation.likelihood_by_shots import (
    adapted_log_probs,
    choose_adaptation,
    evaluate_nll,
)
from metagen_jax.generative.likelihoods import bernoulli_log_prob, gaussian_log_prob
from metagen_jax.generative.maximum_likelihood import negative_log_likelihood_loss
from metagen_jax.generative.vae import gaussian_inference
from metagen_jax.gradients import task_keys
from metagen_jax.types import MetaParams

KEY = jax.random.key(0)
NUM_TASKS, NUM_QUERIES, NUM_PIXELS = 8, 2, 4
EVALUATE = {"key": KEY, "num_tasks": NUM_TASKS, "chunk": 3}


def data():
    """Six classes of ten binary pictures, each pixel with a probability of the class."""
    rng = np.random.default_rng(0)
    rates = rng.uniform(size=(6, 1, NUM_PIXELS))
    images = (rng.uniform(size=(6, 10, NUM_PIXELS)) < rates).astype(np.uint8)
    return group_by_class(images.reshape(60, -1), np.repeat(np.arange(6), 10))


SAMPLE = functools.partial(sample_set_episode, num_shots=4, num_queries=NUM_QUERIES)


def log_prob(params, x, key):
    return bernoulli_log_prob(x, params).sum()


LOSS = negative_log_likelihood_loss(log_prob)
LOGITS = jnp.array([0.3, -0.2, 1.0, 0.0])


def episodes():
    """The episodes that `evaluate_nll` draws, one after the other."""
    sample = jax.jit(SAMPLE)
    for key in task_keys(KEY, NUM_TASKS):
        episode_key, predict_key = jax.random.split(key)
        yield sample(episode_key, data()), predict_key


def nll(logits, images):
    """Of Bernoulli pixels, in NumPy."""
    return np.where(images == 1, np.log1p(np.exp(-logits)), np.log1p(np.exp(logits))).sum(-1)


@pytest.mark.parametrize("num_shots", [0, 1, 3])
def test_equals_a_plain_loop_of_episodes_and_steps(num_shots):
    """The gradient of a Bernoulli's logits is probability minus frequency."""
    rate, num_steps = 0.7, 3
    log_probs = adapted_log_probs(LOSS, log_prob, rule=optax.sgd, num_steps=num_steps)
    estimate = evaluate_nll(
        log_probs,
        MetaParams(LOGITS, jnp.float32(rate)),
        SAMPLE,
        data(),
        num_shots=num_shots,
        **EVALUATE,
    )
    expected = []
    for episode, _ in episodes():
        support, logits = np.asarray(episode.support)[:num_shots], np.array(LOGITS, float)
        for _ in range(num_steps if num_shots else 0):
            logits -= rate * (1 / (1 + np.exp(-logits)) - support.mean(0))
        expected.append(nll(logits, np.asarray(episode.query)).mean())
    np.testing.assert_allclose(estimate.per_task, expected, rtol=1e-5)
    assert estimate.mean == pytest.approx(np.mean(expected), rel=1e-5)
    assert estimate.interval == pytest.approx(
        1.96 * np.std(expected, ddof=1) / np.sqrt(NUM_TASKS), rel=1e-4
    )


def test_without_shots_it_is_the_ordinary_likelihood_of_the_same_images():
    params = MetaParams(LOGITS, jnp.float32(1.0))
    log_probs = adapted_log_probs(LOSS, log_prob, rule=optax.sgd, num_steps=5)
    by_shots = evaluate_nll(log_probs, params, SAMPLE, data(), num_shots=0, **EVALUATE)
    queries = jnp.concatenate([episode.query for episode, _ in episodes()])
    ordinary = evaluate_log_prob(log_prob, LOGITS, queries, key=KEY)
    per_task = -ordinary.per_task.reshape(NUM_TASKS, NUM_QUERIES).mean(1)
    np.testing.assert_allclose(by_shots.per_task, per_task, rtol=1e-6)


INFER = gaussian_inference(
    lambda params, x: (params * x.astype(jnp.float32), jnp.full(x.shape, -0.3)),
    lambda params, z: params * z,
    lambda x, mean: gaussian_log_prob(x.astype(jnp.float32), mean, -0.5).sum(),
)


@pytest.mark.slow
def test_without_shots_a_bound_is_that_of_the_ordinary_code_with_its_keys():
    bound = importance_sampled_log_prob(INFER, num_samples=5)
    log_probs = adapted_log_probs(LOSS, bound, rule=optax.sgd, num_steps=5)
    params = MetaParams(jnp.float32(0.8), jnp.float32(1.0))
    by_shots = evaluate_nll(log_probs, params, SAMPLE, data(), num_shots=0, **EVALUATE)
    expected = []
    for episode, predict_key in episodes():
        keys = task_keys(jax.random.split(predict_key)[1], NUM_QUERIES)
        values = [bound(params.init, x, k) for x, k in zip(episode.query, keys, strict=True)]
        expected.append(-np.mean(values))
    np.testing.assert_allclose(by_shots.per_task, expected, rtol=1e-5)


@pytest.mark.slow
def test_importance_sampled_figures_fall_with_samples():
    figures = []
    for num_samples in (1, 10, 1000):
        bound = importance_sampled_log_prob(INFER, num_samples=num_samples)
        log_probs = adapted_log_probs(LOSS, bound, rule=optax.sgd, num_steps=1)
        params = MetaParams(jnp.float32(0.8), jnp.float32(1.0))
        estimate = evaluate_nll(
            log_probs, params, SAMPLE, data(), num_shots=0, key=KEY, num_tasks=100, chunk=50
        )
        figures.append(float(estimate.mean))
    assert figures == sorted(figures, reverse=True)
    assert figures[0] - figures[-1] > 0.1


def test_the_order_of_the_support_set_does_not_matter_to_full_batches():
    log_probs = jax.jit(adapted_log_probs(LOSS, log_prob, rule=optax.sgd, num_steps=3))
    params = MetaParams(LOGITS, jnp.float32(0.5))
    episode = SAMPLE(KEY, data())
    there = log_probs(params, episode.support, episode.query, KEY)
    back = log_probs(params, episode.support[::-1], episode.query, KEY)
    np.testing.assert_allclose(there, back, rtol=1e-6)


def test_the_best_rate_and_steps_of_validation_are_chosen():
    """The grid of a plain loop, in which the largest rate overshoots."""
    rates, num_steps, num_shots = (0.01, 1.0, 300.0), 4, 2
    log_probs = adapted_log_probs(
        LOSS, log_prob, rule=optax.sgd, num_steps=num_steps, every_step=True
    )
    chosen = choose_adaptation(
        log_probs,
        {rate: MetaParams(LOGITS, jnp.float32(rate)) for rate in rates},
        SAMPLE,
        data(),
        num_shots=num_shots,
        **EVALUATE,
    )
    grid = np.zeros((len(rates), num_steps + 1))
    for row, rate in enumerate(rates):
        for episode, _ in episodes():
            support, logits = np.asarray(episode.support)[:num_shots], np.array(LOGITS, float)
            for step in range(num_steps + 1):
                grid[row, step] += nll(logits, np.asarray(episode.query)).mean() / NUM_TASKS
                logits = logits - rate * (1 / (1 + np.exp(-logits)) - support.mean(0))
    row, step = np.unravel_index(grid.argmin(), grid.shape)
    assert (chosen.candidate, chosen.num_steps) == (rates[row], step)
    assert rates[row] == 1.0
    assert chosen.nll.mean == pytest.approx(grid.min(), rel=1e-5)


def test_what_is_needed_is_said():
    params = MetaParams(LOGITS, jnp.float32(0.5))
    log_probs = adapted_log_probs(LOSS, log_prob, rule=optax.sgd, num_steps=1)
    with pytest.raises(UserError, match="num_shots is 5 and there are 4"):
        evaluate_nll(log_probs, params, SAMPLE, data(), num_shots=5, **EVALUATE)
    with pytest.raises(UserError, match="candidates is empty"):
        choose_adaptation(log_probs, {}, SAMPLE, data(), num_shots=1, **EVALUATE)
    with pytest.raises(UserError, match="make it with every_step=True"):
        choose_adaptation(log_probs, {1: params}, SAMPLE, data(), num_shots=1, **EVALUATE)
    with pytest.raises(UserError, match=r"log_probs must give \(\.\.\., 2\)"):
        evaluate_nll(lambda *_: jnp.zeros(3), params, SAMPLE, data(), num_shots=1, **EVALUATE)
