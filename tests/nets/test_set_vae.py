"""The set VAE: its distributions and draws against NumPy; the order of the set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.nets.set_vae import SetVAE

KEY = jax.random.key(0)
SHAPE = (2, 3)
NET = SetVAE(SHAPE, num_context=3, num_latents=2, num_features=4, num_units=5)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def both(module, x, given, present, key):
    return module(x, module.encode(given), present, key)


def examples(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *SHAPE))


def params():
    x, given, present = examples(1)[0], examples(2), np.ones(2, bool)
    with jax.enable_x64(True):
        shapes = jax.eval_shape(lambda key: NET.init(key, x, given, present, key, method=both), KEY)
        rng = np.random.default_rng(1)
        return jax.tree.map(lambda p: jnp.asarray(0.5 * rng.normal(size=p.shape)), shapes)


@jax.jit
def apply(params, x, given, present, key):
    return NET.apply(params, x, given, present, key, method=both)


def gaussian(outputs):
    mean, raw = np.split(outputs, 2)
    return mean, 7 * np.tanh(raw / 7)


def reference(weights, x, given):
    """Prior and posterior of the context, and those of z given a context."""

    def net(name, x):
        layers = weights[name]
        for layer in [*sorted(n for n in layers if n != "head"), "head"]:
            x = x @ layers[layer]["kernel"] + layers[layer]["bias"]
            if layer != "head":
                x = np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
        return x

    def context(features):
        count = 1 + len(features)
        mean = (weights["pseudo"] + sum(features)) / count
        return gaussian(net("statistic", np.append(mean, 1 / count)))

    features = [net("features", example.ravel()) for example in given]
    own = net("features", x.ravel())

    def latents(c):
        return gaussian(net("prior", c)), gaussian(net("posterior", np.concatenate([own, c])))

    def decoded(z, c):
        return net("decoder", np.concatenate([z, c])).reshape(*SHAPE, 1)

    return context(features), context([*features, own]), latents, decoded


@pytest.mark.parametrize("num_given", [0, 1, 3])
def test_distributions_are_those_of_the_docstring(num_given):
    x, given, weights = examples(1)[0], examples(num_given, seed=2), params()
    decoded, (context, latent) = apply(weights, x, given, np.ones(num_given, bool), KEY)
    as_numpy = jax.tree.map(np.asarray, weights["params"])
    prior, posterior, of_latents, of_decoder = reference(as_numpy, x, given)
    close = {"rtol": 1e-10, "atol": 1e-12}
    np.testing.assert_allclose(np.array(context.prior), np.array(prior), **close)
    np.testing.assert_allclose(np.array(context.posterior), np.array(posterior), **close)
    prior, posterior = of_latents(np.asarray(context.z))
    np.testing.assert_allclose(np.array(latent.prior), np.array(prior), **close)
    np.testing.assert_allclose(np.array(latent.posterior), np.array(posterior), **close)
    np.testing.assert_allclose(decoded, of_decoder(latent.z, context.z), **close)


def test_latents_are_drawn_from_their_posteriors():
    x, given, weights = examples(1)[0], examples(2), params()
    draw = jax.jit(jax.vmap(lambda key: apply(weights, x, given, np.ones(2, bool), key)[1]))
    context, latent = draw(jax.random.split(KEY, 4000))
    for level in (context, latent):
        noise = (level.z - level.posterior.mean) / np.exp(level.posterior.log_std)
        assert np.abs(noise.mean(0)).max() < 5 / np.sqrt(4000)
        assert np.abs(noise.std(0) - 1).max() < 0.06


def test_samples_come_from_the_priors_alone():
    given, weights = examples(2), params()
    memory = NET.apply(weights, given, method="encode")
    present = np.ones(2, bool)
    sample = NET.apply(weights, memory, present, KEY, method="sample")
    as_numpy = jax.tree.map(np.asarray, weights["params"])
    (mean, log_std), _, of_latents, of_decoder = reference(as_numpy, given[0], given)
    keys = jax.random.split(KEY)
    c = mean + np.exp(log_std) * np.asarray(jax.random.normal(keys[0], (3,)))
    (mean, log_std), _ = of_latents(c)
    z = mean + np.exp(log_std) * np.asarray(jax.random.normal(keys[1], (2,)))
    np.testing.assert_allclose(sample, of_decoder(z, c), rtol=1e-10)


def test_order_does_not_matter_and_absent_examples_are_not_there():
    x, given, weights = examples(1)[0], examples(3, seed=2), params()
    there = apply(weights, x, given, np.ones(3, bool), KEY)[0]
    back = apply(weights, x, given[::-1], np.ones(3, bool), KEY)[0]
    np.testing.assert_allclose(there, back, rtol=1e-12)
    masked = apply(weights, x, given, np.array([True, False, True]), KEY)[0]
    alone = apply(weights, x, given[[0, 2]], np.ones(2, bool), KEY)[0]
    np.testing.assert_allclose(masked, alone, rtol=1e-12)
    assert np.abs(there - masked).max() > 1e-3


@pytest.mark.slow
def test_every_parameter_counts_and_extremes_are_finite():
    x, given, weights = np.float32(examples(1)[0]), np.float32(examples(2, seed=2)), params()

    @jax.jit
    def value_and_grad(weights):
        def total(weights):
            decoded, levels = apply(weights, x, given, np.ones(2, bool), KEY)
            priors = [jnp.tanh(jnp.array(level.prior)).sum() for level in levels]
            return jnp.tanh(decoded).sum() + sum(priors)

        return jax.value_and_grad(total)(weights)

    for path, grad in jax.tree.leaves_with_path(value_and_grad(weights)[1]):
        assert np.abs(grad).max() > 0, path
    large = jax.tree.map(lambda p: jnp.float32(1e3 * p), weights)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(value_and_grad(large)))


def test_what_is_known_of_an_example_stands_beside_it_and_stays_as_it_is():
    def known(scale, x):
        return scale * x[:, 0]

    given = examples(2)
    net = NET.clone(embed=lambda x: known(2.0, x))
    weights = net.init(KEY, given, method="encode")
    beside = np.concatenate([given.reshape(2, 6), 2 * given[:, 0]], 1)
    plain = SetVAE((9,), num_context=3, num_latents=2, num_features=4, num_units=5)
    expected = plain.apply(weights, beside, method="encode")
    np.testing.assert_allclose(net.apply(weights, given, method="encode"), expected, rtol=1e-12)

    def total(scale):
        learning = NET.clone(embed=lambda x: known(scale, x))
        return learning.apply(weights, given, method="encode").sum()

    assert jax.grad(total)(2.0) == 0
