"""Samplers with a memory draw what those in order draw; temperature and nucleus by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from pixel_models import random_params

from metagen_jax.errors import UserError
from metagen_jax.generative.autoregressive import (
    autoregressive_log_prob,
    sample_in_order,
    sample_remembering,
)
from metagen_jax.generative.likelihoods import (
    categorical_log_prob,
    sample_categorical,
    sample_gaussian,
)
from metagen_jax.generative.maximum_likelihood import negative_log_likelihood_loss
from metagen_jax.generative.sequences import (
    draw_categorical,
    nucleus,
    sample_transformer,
    sample_wavenet,
)
from metagen_jax.meta.maml import maml_loss
from metagen_jax.nets.transformer import Transformer
from metagen_jax.nets.wavenet import WaveNet
from metagen_jax.types import Episode

KEY = jax.random.key(0)
CONDITION = np.array([0.3, -1.2])
NET = WaveNet(
    8, features=3, skip_features=9, dilations=(1, 2, 4), first_kernel_size=3, num_levels=8
)
PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def half_given(length, num_levels=8):
    rng = np.random.default_rng(0)
    return rng.integers(0, num_levels, length).astype(np.uint8), rng.random(length) < 0.3


@pytest.mark.parametrize("draw", [sample_categorical, draw_categorical(temperature=2, top_p=0.7)])
def test_cached_samples_of_wavenet_equal_those_in_order(draw):
    start, keep = half_given(40)
    params = random_params(NET, start, CONDITION)

    @jax.jit
    def samples(key, condition):
        cached = sample_wavenet(key, NET, params, draw, start, keep, condition=condition)

        def predict(x):
            return NET.apply(params, x, condition)

        return cached, sample_in_order(key, predict, draw, start, keep)

    drawn = []
    for key in jax.random.split(KEY, 3):
        for condition in (CONDITION, -CONDITION):
            cached, expected = samples(key, condition)
            assert cached.dtype == jnp.uint8
            np.testing.assert_array_equal(cached, expected)
            np.testing.assert_array_equal(cached[keep], start[keep])
            drawn.append(cached.tobytes())
    assert len(set(drawn)) == 6, "both the key and the condition count"


@pytest.mark.parametrize("kind", [{"norm": "pre", "by_distance": True}, {"norm": "post"}])
def test_cached_samples_of_a_transformer_equal_those_in_order(kind):
    """From nothing, after a prompt, and between tokens that are given."""
    net = Transformer(
        8, 12, width=6, depth=2, num_heads=2, hidden_width=7, causal=True, begin=7, **kind
    )
    start, scattered = half_given(11)
    start = start.astype(int)
    params = random_params(net, start, scale=0.8)

    @jax.jit
    def samples(key, keep):
        def predict(x):
            return net.apply(params, x, method="predict_next")

        cached = sample_transformer(key, net, params, sample_categorical, start, keep)
        return cached, sample_in_order(key, predict, sample_categorical, start, keep)

    drawn = []
    for key in jax.random.split(KEY, 3):
        for keep in (np.zeros(11, bool), np.arange(11) < 4, scattered):
            cached, expected = samples(key, keep)
            np.testing.assert_array_equal(cached, expected)
            np.testing.assert_array_equal(cached[keep], start[keep])
            drawn.append(cached.tobytes())
    assert len(set(drawn)) == 9


def test_samples_under_vmap_over_parameters_and_keys_are_a_loop():
    start, keep = half_given(12)
    tasks = [random_params(NET, start, seed=s) for s in (0, 1)]
    sample = functools.partial(sample_wavenet, sample_element=sample_categorical)

    def draw(key, params):
        return sample(key, NET, params, start=start, keep=keep)

    keys = jax.random.split(KEY)
    together = jax.jit(jax.vmap(draw))(keys, jax.tree.map(lambda *x: jnp.stack(x), *tasks))
    for i in range(2):
        np.testing.assert_array_equal(together[i], jax.jit(draw)(keys[i], tasks[i]))


def test_any_memory_will_do_and_elements_may_be_vectors():
    """Means that are the sum of all elements before, remembered as one vector."""

    def predict(x):
        return jnp.cumsum(x, axis=0) - x

    def remember(total, index, previous):
        return total + previous, total + previous

    def draw(key, mean):
        return sample_gaussian(key, mean, -1.0)

    start = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)))
    keep = np.array([False, True, False, False, True, False])
    sample = sample_remembering(KEY, remember, jnp.zeros(2), draw, start, keep)
    expected = sample_in_order(KEY, predict, draw, start, keep)
    np.testing.assert_allclose(sample, expected, rtol=1e-12)


@pytest.mark.slow
def test_maml_over_a_wavenet_equals_finite_differences():
    """New speakers from a few recordings: second order, through the inner step."""
    net = WaveNet(3, features=1, skip_features=3, dilations=(1,), first_kernel_size=1, num_levels=3)
    sounds = np.random.default_rng(0).integers(0, 3, (4, 6))
    params = random_params(net, sounds[0], seed=3)
    log_prob = autoregressive_log_prob(net.apply, categorical_log_prob)
    loss_fn = maml_loss(
        negative_log_likelihood_loss(log_prob), inner_optimizer=optax.sgd(0.1), num_steps=1
    )

    def loss(params):
        return loss_fn(params, Episode(sounds[:2], sounds[2:]), KEY)[0]

    grads = jax.jit(jax.grad(loss))(params)
    numerical = references.finite_differences(jax.jit(loss), params, step=1e-4)
    chex.assert_trees_all_close(grads, numerical, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.3, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 3, 4]),
        (0.94, [0, 1, 3, 4]),
        (0.96, [0, 1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
        (1e-9, [1]),
    ],
)
def test_the_nucleus_by_hand(top_p, kept):
    """The likeliest until their sum reaches `top_p`, that which reaches it included."""
    logits = jnp.log(PROBABILITIES) + 3
    cut = np.asarray(nucleus(logits, top_p))
    assert np.flatnonzero(np.isfinite(cut)).tolist() == kept
    np.testing.assert_array_equal(cut[kept], np.asarray(logits)[kept])
    of_two = nucleus(jnp.stack([logits, logits[::-1]]), top_p)
    np.testing.assert_array_equal(of_two, jnp.stack([cut, cut[::-1]]))


def test_of_equally_probable_classes_the_nucleus_has_the_first():
    cut = nucleus(jnp.zeros(4), 0.5)
    assert np.isfinite(cut).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, PROBABILITIES),
        (0.5, 1.0, PROBABILITIES**2),
        (2.0, 1.0, PROBABILITIES**0.5),
        (1.0, 0.8, PROBABILITIES * [0, 1, 0, 1, 1]),
        # The nucleus of what the temperature makes: 0.16 + 0.09 of 0.285 is more than 0.8.
        (0.5, 0.8, PROBABILITIES**2 * [0, 1, 0, 1, 0]),
        (0.0, 1.0, [0, 1, 0, 0, 0]),
    ],
)
def test_draws_have_the_probabilities_asked_for(temperature, top_p, expected):
    draw = draw_categorical(temperature=temperature, top_p=top_p)
    logits = jnp.log(PROBABILITIES)
    drawn = jax.jit(jax.vmap(lambda key: draw(key, logits)))(jax.random.split(KEY, 20_000))
    assert drawn.dtype == jnp.int32
    frequencies = np.bincount(drawn, minlength=5) / len(drawn)
    expected = np.asarray(expected) / np.sum(expected)
    errors = np.sqrt(expected * (1 - expected) / len(drawn))
    assert (np.abs(frequencies - expected) <= 4 * errors).all()


def test_extreme_logits_are_drawn_without_nan():
    with jax.enable_x64(False):
        for logits in ([-1e4, 1e4, 0.0], [-np.inf, 0.0, -np.inf]):
            draw = draw_categorical(temperature=0.01, top_p=0.9)
            assert draw(KEY, jnp.array(logits, jnp.float32)) == 1


@pytest.mark.usefixtures("ill_typed")
def test_says_what_is_needed():
    start, keep = half_given(5)
    params = random_params(NET, start)
    for top_p in (0, -0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"top_p is .*; give a probability over 0"):
            draw_categorical(top_p=top_p)
    with pytest.raises(UserError, match=r"temperature is -1; give 0 or more"):
        draw_categorical(temperature=-1)
    with pytest.raises(UserError, match=r"keep has shape \(3,\) for values of shape \(5,\)"):
        sample_wavenet(KEY, NET, params, sample_categorical, start, keep[:3])
    net = Transformer(8, 4, width=2, depth=1, num_heads=1, hidden_width=2, causal=True)
    start = start.astype(int)
    with pytest.raises(UserError, match="start has 5 tokens and max_length is 4; give fewer"):
        sample_transformer(KEY, net, params, sample_categorical, start, keep)
    net = net.clone(max_length=5, causal=False)
    of_both_sides = random_params(net, start)
    with pytest.raises(UserError, match="give causal=True"):
        sample_transformer(KEY, net, of_both_sides, sample_categorical, start, keep)
    with pytest.raises(UserError, match=r"a drawn element has shape \(8,\) and one of the values"):
        sample_wavenet(KEY, NET, params, lambda key, x: x, start, keep)
