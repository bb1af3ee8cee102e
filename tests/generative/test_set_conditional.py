"""Models of an example given a set: the loss over a set, predictions from a support set."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagen_jax.generative.likelihoods import bernoulli_log_prob, gaussian_log_prob
from metagen_jax.generative.set_conditional import Given, set_log_probs, set_loss
from metagen_jax.generative.vae import hierarchical_inference, importance_weighted_log_prob
from metagen_jax.gradients import gradients
from metagen_jax.nets.set_vae import SetVAE
from metagen_jax.types import Episode

KEY = jax.random.key(0)


def encode(params, x):
    return x * params["scale"]


def log_prob(params, given, key):
    """Normal around the shrunken mean of what is given."""
    count = given.present.sum()
    mean = (given.present @ given.memory + params["prior"]) / (count + 1)
    noise = params["noise"] * jax.random.normal(key)
    return gaussian_log_prob(given.example, mean, 0.0).sum() + noise


PARAMS = {"scale": jnp.float32(0.7), "prior": jnp.float32(0.2), "noise": jnp.float32(0.0)}


def normal_nll(x, mean):
    return 0.5 * (np.square(x - mean) + np.log(2 * np.pi)).sum()


def test_the_loss_is_the_mean_of_all_predictions_from_those_before():
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    episode = Episode(jnp.asarray(x[:3]), jnp.asarray(x[3:]))
    loss, metrics = jax.jit(set_loss(encode, log_prob))(PARAMS, episode, KEY)
    terms = [normal_nll(x[t], (0.7 * x[:t].sum(0) + 0.2) / (t + 1)) for t in range(5)]
    assert loss == pytest.approx(np.mean(terms), rel=1e-5)
    assert metrics["nll_first"] == pytest.approx(terms[0], rel=1e-5)
    assert metrics["nll_last"] == pytest.approx(terms[-1], rel=1e-5)


@pytest.mark.parametrize("num_shots", [0, 1, 4])
def test_queries_are_predicted_from_the_support_set_alone(num_shots):
    rng = np.random.default_rng(1)
    support, queries = (rng.normal(size=(n, 3)).astype(np.float32) for n in (num_shots, 2))
    log_probs = jax.jit(set_log_probs(encode, log_prob))(PARAMS, support, queries, KEY)
    mean = (0.7 * support.sum(0) + 0.2) / (num_shots + 1)
    np.testing.assert_allclose(log_probs, [-normal_nll(x, mean) for x in queries], rtol=1e-5)


def test_every_prediction_has_noise_of_its_own():
    noisy = PARAMS | {"noise": jnp.float32(1.0)}
    same = jnp.ones((3, 2))
    log_probs = set_log_probs(encode, log_prob)
    noise = log_probs(noisy, same, same, KEY) - log_probs(PARAMS, same, same, KEY)
    expected = [jax.random.normal(jax.random.fold_in(KEY, i)) for i in range(3)]
    np.testing.assert_allclose(noise, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_set_vae_trains_through_it_and_the_set_helps():
    """Sets of one of two constant pictures: what an example is, can only be known of another."""
    net = SetVAE((4,), num_context=2, num_latents=1, num_features=4, num_units=8)

    def both(module, x, key):
        return module(x[0], module.encode(x), jnp.ones(len(x), bool), key)

    def apply(params, given, key):
        return net.apply(params, given.example, given.memory, given.present, key)

    infer = hierarchical_inference(
        apply, lambda given, decoded: bernoulli_log_prob(given.example, decoded[..., 0]).sum()
    )
    bound = importance_weighted_log_prob(infer, num_samples=1)

    def encode(params, x):
        return net.apply(params, x, method="encode")

    grad_fn = gradients(set_loss(encode, bound))

    optimizer = optax.adam(2e-2)

    def step(carry, key):
        params, state = carry
        kind = jax.random.bernoulli(key, 0.5, (8, 1, 1))
        pictures = jnp.broadcast_to(kind, (8, 3, 4)).astype(jnp.float32)
        episodes = Episode(pictures[:, :2], pictures[:, 2:])
        of_all = jax.vmap(grad_fn, (None, 0, 0))
        grads, _ = of_all(params, episodes, jax.random.split(key, 8))
        mean = jax.tree.map(lambda g: g.mean(0), grads)
        updates, state = optimizer.update(mean, state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(key):
        params = net.init(key, jnp.zeros((2, 4)), key, method=both)
        start = (params, optimizer.init(params))
        return jax.lax.scan(step, start, jax.random.split(key, 200))[0][0]

    params = train(KEY)
    bound = importance_weighted_log_prob(infer, num_samples=200)
    log_probs = jax.jit(set_log_probs(encode, bound))
    ones = jnp.ones((1, 4))
    none, one = (-float(log_probs(params, x, ones, KEY)[0]) for x in (ones[:0], ones))
    # Nothing known: log 2 at best; then next to nothing is left to explain.
    assert np.log(2) - 0.1 < none < 1.2
    assert one < 0.3


def test_what_is_absent_has_no_gradient():
    given = Given(jnp.ones(2), jnp.full((3, 2), 5.0), np.array([True, False, True]))

    def value(memory):
        return log_prob(PARAMS, given._replace(memory=memory), KEY)

    grads = jax.grad(value)(given.memory)
    np.testing.assert_array_equal((grads != 0).any(1), given.present)
