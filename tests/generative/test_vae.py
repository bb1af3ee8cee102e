"""Bounds of variational autoencoders, against models whose log p(x) is known."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from linear_vae import NOISE, decode, encode, linear_model, log_likelihood

from metagen_jax.errors import UserError
from metagen_jax.generative.likelihoods import bernoulli_log_prob, gaussian_log_prob
from metagen_jax.generative.maximum_likelihood import negative_log_likelihood_loss
from metagen_jax.generative.vae import (
    doubly_reparameterized_log_prob,
    gaussian_inference,
    gaussian_kl,
    hierarchical_inference,
    importance_weighted_log_prob,
    vae_loss,
)
from metagen_jax.gradients import gradients
from metagen_jax.meta.maml import maml_loss
from metagen_jax.nets.vae import LadderVAE
from metagen_jax.types import Episode

KEY = jax.random.key(0)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


INFER = gaussian_inference(encode, decode, log_likelihood)


def marginal(params, x):
    """`log N(x; b, W W^T + noise^2 1)`: the marginal likelihood of probabilistic PCA, in NumPy."""
    weights, offset = (np.asarray(params["decoder"][name]) for name in ("weights", "offset"))
    covariance = weights @ weights.T + NOISE**2 * np.eye(len(x))
    deviation = np.asarray(x) - offset
    quadratic = deviation @ np.linalg.solve(covariance, deviation)
    return -0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * covariance)[1])


def test_kl_of_gaussians_by_hand_and_where_it_cancels():
    # N(1, 2^2) from N(0, 1): (4 + 1 - 1) / 2 - log 2.
    assert gaussian_kl(jnp.float32(1), jnp.log(2.0)) == pytest.approx(2 - np.log(2), rel=1e-6)
    # Twice the scale of the prior, a prior scale away from its mean.
    kl = gaussian_kl(jnp.float32(5), jnp.log(6.0), 2.0, np.log(3.0))
    assert kl == pytest.approx(2 - np.log(2), rel=1e-6)
    # log_std^2 to the second order, where exp(2 r) - 1 - 2 r would leave nothing of float32.
    assert gaussian_kl(jnp.float32(0), jnp.float32(1e-3)) == pytest.approx(1e-6, rel=2e-3)


@pytest.mark.usefixtures("float64")
def test_with_the_exact_posterior_every_bound_is_the_marginal_likelihood():
    rng = np.random.default_rng(0)
    params, x = linear_model(rng), rng.normal(size=4)
    exact = marginal(params, x)
    one = importance_weighted_log_prob(INFER, num_samples=1)
    many = importance_weighted_log_prob(INFER, num_samples=7)
    twice = doubly_reparameterized_log_prob(encode, decode, log_likelihood, num_samples=7)
    for bound in (one, many, twice):
        assert jax.jit(bound)(params, x, KEY) == pytest.approx(exact, abs=1e-10)


@pytest.mark.usefixtures("float64")
def test_the_elbo_with_the_exact_posterior_is_the_marginal_likelihood_in_the_mean():
    rng = np.random.default_rng(0)
    params, x = linear_model(rng), rng.normal(size=4)
    draws = jnp.broadcast_to(jnp.asarray(x), (20_000, 4))
    loss, metrics = jax.jit(vae_loss(INFER))(params, draws, KEY)
    # One draw has a standard deviation of 1 from the log-likelihood, and 20,000 of 0.01.
    assert loss == pytest.approx(-marginal(params, x), abs=0.04)
    assert metrics["elbo"] == pytest.approx(-float(loss), rel=1e-12)
    assert metrics["kl"] == pytest.approx(float(gaussian_kl(*encode(params, x)).sum()), rel=1e-9)


@pytest.mark.usefixtures("float64")
def test_bounds_rise_with_the_samples_and_stay_below():
    rng = np.random.default_rng(1)
    params, x = linear_model(rng, error=0.2), rng.normal(size=4)
    draws = jnp.broadcast_to(jnp.asarray(x), (4000, 4))
    losses = [
        negative_log_likelihood_loss(importance_weighted_log_prob(INFER, num_samples=k))
        for k in (1, 2, 8, 64)
    ]
    bounds = jax.jit(lambda *args: [-loss(*args)[0] for loss in losses])(params, draws, KEY)
    exact = marginal(params, x)
    assert (np.diff(bounds) > 0).all()
    assert bounds[0] < exact - 0.1
    assert exact - 0.02 < bounds[-1] < exact + 0.01


def test_beta_and_free_nats_by_hand():
    def infer(params, x, key):
        del params, key
        log_ratio = jnp.zeros(())
        return INFER_TYPE(log_likelihood=x["ll"], log_ratio=log_ratio, kl=x["kl"])

    INFER_TYPE = type(INFER(linear_model(np.random.default_rng(0)), jnp.zeros(4), KEY))
    batch = {
        "ll": jnp.array([-3.0, -5.0]),
        "kl": jnp.array([[0.2, 1.0], [0.4, 3.0]]),
    }
    # Mean log-likelihood -4; mean KL divergences 0.3 and 2.
    assert vae_loss(infer)({}, batch, KEY)[0] == pytest.approx(6.3)
    assert vae_loss(infer, beta=2.0)({}, batch, KEY)[0] == pytest.approx(8.6)
    assert vae_loss(infer, free_nats=0.5)({}, batch, KEY)[0] == pytest.approx(6.5)
    loss, metrics = vae_loss(infer, beta=0.1, free_nats=0.5)({}, batch, KEY)
    assert loss == pytest.approx(4.25)
    assert metrics["elbo"] == pytest.approx(-6.3)
    assert metrics["kl"] == pytest.approx(2.3)


@pytest.mark.slow
def test_keys_of_examples_may_be_given():
    rng = np.random.default_rng(0)
    params, batch = linear_model(rng, error=0.2), jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(KEY, jnp.arange(3))
    iwae = negative_log_likelihood_loss(importance_weighted_log_prob(INFER, num_samples=2))
    for loss in (vae_loss(INFER), iwae):
        assert loss(params, batch, keys)[0] == loss(params, batch, KEY)[0]


@pytest.mark.usefixtures("float64")
def test_the_doubly_reparameterized_gradient_is_the_plain_one_in_the_mean():
    rng = np.random.default_rng(2)
    params, x = linear_model(rng, error=0.2), rng.normal(size=4)
    draws = jnp.broadcast_to(jnp.asarray(x), (40_000, 4))
    plain = importance_weighted_log_prob(INFER, num_samples=4)
    twice = doubly_reparameterized_log_prob(encode, decode, log_likelihood, num_samples=4)
    grads = [
        jax.jit(gradients(negative_log_likelihood_loss(bound)))(params, draws, KEY)
        for bound in (plain, twice)
    ]
    (expected, plain_metrics), (actual, metrics) = grads
    assert metrics["loss"] == pytest.approx(float(plain_metrics["loss"]), rel=1e-12)
    # The same draws: what has its plain gradient has it exactly.
    chex.assert_trees_all_close(actual["decoder"], expected["decoder"], rtol=1e-9)
    size = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected["encoder"]))
    chex.assert_trees_all_close(actual["encoder"], expected["encoder"], atol=0.03 * size)


@pytest.mark.usefixtures("float64")
def test_the_doubly_reparameterized_gradient_vanishes_at_the_exact_posterior():
    rng = np.random.default_rng(0)
    params, x = linear_model(rng), rng.normal(size=4)
    for bound, vanishes in (
        (doubly_reparameterized_log_prob(encode, decode, log_likelihood, num_samples=5), True),
        (importance_weighted_log_prob(INFER, num_samples=5), False),
    ):
        encoder = jax.jit(jax.grad(bound))(params, jnp.asarray(x), KEY)["encoder"]
        largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(encoder))
        assert (largest < 1e-10) == vanishes


@pytest.mark.usefixtures("float64")
def test_the_doubly_reparameterized_gradient_by_its_equation():
    """`sum_k w_k^2 d log W_k / dz_k dz_k / dphi`, one sample at a time."""
    rng = np.random.default_rng(3)
    params, x = linear_model(rng, error=0.2), jnp.asarray(rng.normal(size=4))
    bound = doubly_reparameterized_log_prob(encode, decode, log_likelihood, num_samples=3)
    mean, log_std = encode(params, x)
    noise = [jax.random.normal(jax.random.fold_in(KEY, k), (2,)) for k in range(3)]

    def log_weight(z):
        log_posterior = gaussian_log_prob(z, mean, log_std).sum()
        prior = gaussian_log_prob(z, 0.0, 0.0).sum()
        return log_likelihood(x, decode(params, z)) + prior - log_posterior

    z = [mean + jnp.exp(log_std) * epsilon for epsilon in noise]
    shares = jax.nn.softmax(jnp.stack([log_weight(z_k) for z_k in z]))
    slopes = [share**2 * jax.grad(log_weight)(z_k) for share, z_k in zip(shares, z, strict=True)]
    expected = sum(
        slope * jnp.exp(log_std) * epsilon for slope, epsilon in zip(slopes, noise, strict=True)
    )
    actual = jax.jit(jax.grad(bound))(params, x, KEY)["encoder"]
    np.testing.assert_allclose(actual["offset"], sum(slopes), rtol=1e-9)
    np.testing.assert_allclose(actual["log_std"], expected, rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_a_flow_of_the_latents_is_the_posterior_that_it_makes():
    """`z = 2 u + 1` of a Gaussian is a Gaussian, of the same draws."""
    rng = np.random.default_rng(4)
    params, x = linear_model(rng, error=0.2), jnp.asarray(rng.normal(size=4))

    def flow(params, x, u):
        del params, x
        return 2 * u + 1, 2 * jnp.log(2.0)

    def moved(params, x):
        mean, log_std = encode(params, x)
        return 2 * mean + 1, log_std + jnp.log(2.0)

    actual = gaussian_inference(encode, decode, log_likelihood, flow=flow)(params, x, KEY)
    expected = gaussian_inference(moved, decode, log_likelihood)(params, x, KEY)
    assert actual.log_likelihood == pytest.approx(float(expected.log_likelihood), rel=1e-12)
    assert actual.log_ratio == pytest.approx(float(expected.log_ratio), rel=1e-10)
    np.testing.assert_array_equal(actual.kl, actual.log_ratio[None])


@pytest.mark.usefixtures("float64")
def test_the_context_of_a_flow_is_what_the_encoder_gives_or_the_example():
    rng = np.random.default_rng(4)
    params, x = linear_model(rng, error=0.2), jnp.asarray(rng.normal(size=4))

    def shift(params, context, u):
        return u + context[:2], jnp.zeros(())

    def with_context(params, x):
        return *encode(params, x), 2 * x

    def moved(factor):
        return lambda params, x: (encode(params, x)[0] + factor * x[:2], encode(params, x)[1])

    for given, factor in ((encode, 1), (with_context, 2)):
        actual = gaussian_inference(given, decode, log_likelihood, flow=shift)(params, x, KEY)
        expected = gaussian_inference(moved(factor), decode, log_likelihood)(params, x, KEY)
        assert actual.log_likelihood == pytest.approx(float(expected.log_likelihood), rel=1e-12)
        assert actual.log_ratio == pytest.approx(float(expected.log_ratio), rel=1e-10)


@pytest.mark.usefixtures("float64")
def test_a_hierarchy_of_one_level_is_a_gaussian_and_of_two_sums_its_levels():
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=4))
    gaussians = [[tuple(rng.normal(size=(2, n))) for n in (2, 3)] for _ in range(2)]
    draws = [jnp.asarray(rng.normal(size=n)) for n in (2, 3)]
    levels = [
        (z, *(tuple(map(jnp.asarray, pair)) for pair in pairs))
        for z, *pairs in zip(draws, *gaussians, strict=True)
    ]
    infer = hierarchical_inference(lambda *_: (x, levels), log_likelihood)
    actual = infer({}, x, KEY)
    each = [
        np.asarray(gaussian_log_prob(z, *q) - gaussian_log_prob(z, *p)).sum() for z, q, p in levels
    ]
    assert actual.log_ratio == pytest.approx(sum(each), rel=1e-12)
    kl = [gaussian_kl(*q, *p) for _, q, p in levels]
    np.testing.assert_allclose(actual.kl, np.concatenate(kl), rtol=1e-12)


def bernoulli(x, logits):
    return bernoulli_log_prob(x, logits).sum()


LADDER = LadderVAE(shape=(3,), num_latents=(2, 2), hidden_sizes=(4, 3), activation=jnp.tanh)


def linear_bernoulli(params, z):
    return decode(params, z)


MODELS = {
    "gaussian": gaussian_inference(encode, linear_bernoulli, bernoulli),
    "ladder": hierarchical_inference(LADDER.apply, lambda x, logits: bernoulli(x, logits[:, 0])),
}


def losses(name):
    yield vae_loss(MODELS[name], beta=0.5, free_nats=0.1)
    yield negative_log_likelihood_loss(importance_weighted_log_prob(MODELS[name], num_samples=3))
    if name == "gaussian":
        yield negative_log_likelihood_loss(
            doubly_reparameterized_log_prob(encode, linear_bernoulli, bernoulli, num_samples=3)
        )


def tasks_of(name, num_tasks):
    """Parameters of each task, and batches of binary examples."""
    rng = np.random.default_rng(6)
    if name == "ladder":
        params = LADDER.init(KEY, jnp.zeros(3), KEY)
        examples = rng.integers(0, 2, (num_tasks, 5, 3))
    else:
        params = linear_model(rng, error=0.2)
        examples = rng.integers(0, 2, (num_tasks, 5, 4))
    stacked = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=(num_tasks, *jnp.shape(x))), params)
    return stacked, jnp.asarray(examples, float)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", MODELS)
def test_vmap_over_tasks_is_a_loop_in_value_and_gradient(name):
    params, batches = tasks_of(name, 2)

    def all_of(params, batch):
        return [jax.value_and_grad(loss, has_aux=True)(params, batch, KEY) for loss in losses(name)]

    together = jax.jit(jax.vmap(all_of))(params, batches)
    alone = jax.jit(all_of)
    for task in range(2):
        own, expected = jax.tree.map(lambda x: x[task], ((params, batches), together))  # noqa: B023
        chex.assert_trees_all_close(alone(*own), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_maml_over_a_bound_has_the_gradient_of_finite_differences():
    params, batches = jax.tree.map(lambda x: x[0], tasks_of("gaussian", 1))
    episode = Episode(batches[:2], batches[2:])
    infer = MODELS["gaussian"]
    bound = importance_weighted_log_prob(infer, num_samples=2)
    for loss in (vae_loss(infer), negative_log_likelihood_loss(bound)):
        meta_loss = maml_loss(loss, inner_optimizer=optax.sgd(0.1), num_steps=1)
        value = jax.jit(lambda params, f=meta_loss: f(params, episode, KEY)[0])
        expected = references.finite_differences(value, params)
        chex.assert_trees_all_close(jax.jit(jax.grad(value))(params), expected, atol=1e-7)


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_latents_and_logits_have_finite_losses_and_gradients(scale):
    params = {
        "encoder": {
            "weights": jnp.full((2, 4), scale),
            "offset": jnp.full(2, -scale),
            "log_std": jnp.array([-20.0, 10.0]),
        },
        "decoder": {"weights": jnp.full((4, 2), scale), "offset": jnp.full(4, -scale)},
    }
    for loss in losses("gaussian"):
        grads, metrics = jax.jit(gradients(loss))(params, jnp.eye(4), KEY)
        chex.assert_tree_all_finite((grads, metrics))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="num_samples is 0"):
        importance_weighted_log_prob(INFER, num_samples=0)
    with pytest.raises(UserError, match="num_samples is 0"):
        doubly_reparameterized_log_prob(encode, decode, log_likelihood, num_samples=0)
    with pytest.raises(UserError, match="beta is -1"):
        vae_loss(INFER, beta=-1.0)
    with pytest.raises(UserError, match=r"free_nats is -0\.1"):
        vae_loss(INFER, free_nats=-0.1)


@pytest.mark.usefixtures("ill_typed")
def test_a_likelihood_that_is_not_summed_is_named():
    unsummed = functools.partial(gaussian_log_prob, log_std=jnp.zeros(()))
    infer = gaussian_inference(encode, decode, unsummed)
    params = linear_model(np.random.default_rng(0))
    with pytest.raises(UserError, match=r"has shape \(4,\); give one number, summed"):
        infer(params, jnp.zeros(4), KEY)
