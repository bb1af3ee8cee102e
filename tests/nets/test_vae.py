"""Nets of variational autoencoders: shapes, and the latents of the ladder by their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.nets.vae import ConvVAE, DenseVAE, LadderVAE

KEY = jax.random.key(0)
NETS = {
    "dense": DenseVAE(shape=(5, 6, 2), num_latents=3, hidden_sizes=(8, 7)),
    "dense, two": DenseVAE(shape=(5, 6, 2), num_latents=3, hidden_sizes=(8,), num_params=2),
    "conv": ConvVAE(shape=(5, 6, 2), num_latents=3, num_filters=4, num_units=8),
    "conv, two": ConvVAE(shape=(5, 6, 2), num_latents=3, num_filters=4, num_params=2),
}
LADDER = LadderVAE(shape=(5,), num_latents=(3, 2), hidden_sizes=(7, 6))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.slow
def test_latents_and_parameters_have_their_shapes(name):
    net = NETS[name]
    x = jax.random.normal(KEY, (5, 6, 2))
    params = net.init(KEY, x)
    mean, log_std = net.apply(params, x, method="encode")
    assert mean.shape == log_std.shape == (3,)
    decoded = net.apply(params, mean, method="decode")
    assert decoded.shape == ((5, 6, 2, 2 if "two" in name else 1))
    np.testing.assert_array_equal(net.apply(params, x), decoded)


def test_the_context_comes_with_the_gaussian_and_from_the_same_layers():
    net = DenseVAE(shape=(4,), num_latents=3, hidden_sizes=(8,), num_context=5)
    x = jax.random.normal(KEY, (4,))
    params = net.init(KEY, x)
    mean, log_std, context = net.apply(params, x, method="encode_with_context")
    assert context.shape == (5,)
    for actual, expected in zip(
        (mean, log_std), net.apply(params, x, method="encode"), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)
    hidden, head = (params["params"]["encoder"][name] for name in ("hidden0", "head"))
    outputs = jnp.tanh(x @ hidden["kernel"] + hidden["bias"]) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(context, outputs[6:], rtol=1e-6)


@pytest.mark.parametrize("name", ["dense", "conv"])
@pytest.mark.slow
def test_standard_deviations_are_bounded_for_any_input(name):
    net = NETS[name]
    params = net.init(KEY, jnp.zeros((5, 6, 2)))
    x = 1e6 * jax.random.normal(KEY, (5, 6, 2))
    raw = jax.tree.map(lambda p: 1e3 * p, params)
    _, log_std = net.apply(raw, x, method="encode")
    assert (jnp.abs(log_std) <= 7).all()


@pytest.mark.slow
def test_the_ladder_multiplies_what_it_knows_from_below_and_above():
    x = jax.random.normal(KEY, (5,))
    params = LADDER.init(KEY, x, KEY)
    _, (top, bottom) = LADDER.apply(params, x, KEY)
    assert top.z.shape == (2,)
    assert bottom.z.shape == (3,)
    np.testing.assert_array_equal(top.prior.mean, np.zeros(2))
    np.testing.assert_array_equal(top.prior.log_std, np.zeros(2))
    for level in (top, bottom):
        # Knowledge from below adds precision to the prior's.
        assert (level.posterior.log_std < level.prior.log_std).all()
    precision = np.exp(-2 * top.posterior.log_std)
    of_data = precision - 1
    # The mean of the product is the data's, shrunk by its share of the precision.
    hidden = x
    for layer in ("hidden0", "hidden1"):
        part = params["params"]["up_0"][layer]
        hidden = jax.nn.elu(hidden @ part["kernel"] + part["bias"])
    for layer in ("hidden0", "hidden1"):
        part = params["params"]["up_1"][layer]
        hidden = jax.nn.elu(hidden @ part["kernel"] + part["bias"])
    part = params["params"]["evidence_1"]
    mean, raw = np.split(hidden @ part["kernel"] + part["bias"], 2)
    np.testing.assert_allclose(of_data, np.exp(-14 * np.tanh(raw / 7)), rtol=1e-4)
    np.testing.assert_allclose(top.posterior.mean, of_data / precision * mean, rtol=1e-4)


@pytest.mark.slow
def test_the_ladder_draws_each_level_from_its_posterior_and_samples_from_the_prior():
    x = jax.random.normal(KEY, (5,))
    params = LADDER.init(KEY, x, KEY)
    keys = jax.random.split(KEY, 4000)
    decoded, levels = jax.vmap(lambda key: LADDER.apply(params, x, key))(keys)
    assert decoded.shape == (4000, 5, 1)
    for level in levels:
        standardised = (level.z - level.posterior.mean) * jnp.exp(-level.posterior.log_std)
        np.testing.assert_allclose(standardised.mean(0), 0, atol=0.07)
        np.testing.assert_allclose(standardised.std(0), 1, atol=0.05)
    # What is below depends on what was drawn above.
    assert (levels[1].prior.mean.std(0) > 0).all()
    sampled = jax.vmap(lambda key: LADDER.apply(params, key, method="sample"))(keys[:3])
    assert sampled.shape == (3, 5, 1)
    assert not jnp.array_equal(sampled[0], sampled[1])
