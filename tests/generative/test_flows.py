"""Flows: densities that integrate to one, samples, tasks under vmap, MAML, extremes, images."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagen_jax.errors import UserError
from metagen_jax.generative.bijectors import chain, logit
from metagen_jax.generative.couplings import spline_transform
from metagen_jax.generative.dequantisation import dequantized_log_prob
from metagen_jax.generative.flows import (
    flow_log_prob,
    flow_sample,
    glow,
    glow_images,
    iaf,
    maf,
    realnvp,
    realnvp_images,
    spline_flow,
)
from metagen_jax.generative.likelihoods import bits_per_dim, gaussian_log_prob
from metagen_jax.generative.maximum_likelihood import negative_log_likelihood_loss
from metagen_jax.gradients import gradients
from metagen_jax.meta.maml import maml_loss
from metagen_jax.nets.made import MADE
from metagen_jax.types import Episode

KEY = jax.random.key(0)
SMALL = {"num_layers": 2, "hidden_sizes": (5,)}
VECTORS = {
    "realnvp": realnvp(**SMALL),
    "glow": glow(**SMALL),
    "spline_flow": spline_flow(**SMALL, num_bins=3),
    "maf": maf(**SMALL),
    "iaf": iaf(**SMALL),
    "maf of splines": maf(**SMALL, transform=spline_transform(num_bins=3)),
}
IMAGES = {
    "realnvp_images": realnvp_images(num_levels=2, num_filters=2, num_blocks=0),
    "glow_images": glow_images(num_levels=2, num_steps=2, num_filters=2, num_blocks=0),
}
FLOWS = {
    **{name: (flow, (3,)) for name, flow in VECTORS.items()},
    **{name: (flow, (4, 4, 1)) for name, flow in IMAGES.items()},
}


def flows(*fast):
    """All of them, those that are not named being slow to compile."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in FLOWS]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def batch_of(shape, num_condition=None, num=32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num, *shape))
    condition = None if num_condition is None else rng.normal(size=(num, num_condition))
    return jax.tree.map(jnp.asarray, (x, condition))


def moved(params, seed=0, scale=0.3):
    """Parameters of which none is at zero, where a net says nothing."""
    rng = np.random.default_rng(seed)

    def move(path, p):
        fixed = any(word in str(path) for word in ("sign", "order"))
        return p + (0 if fixed else jnp.asarray(scale * rng.normal(size=p.shape), p.dtype))

    return jax.tree_util.tree_map_with_path(move, params)


def params_of(flow, shape, num_condition=None, **options):
    batch = jax.tree.map(jnp.float32, batch_of(shape, num_condition))
    return moved(jax.jit(flow.init)(KEY, *batch), **options)


@pytest.mark.parametrize("num_condition", [None, 2])
@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.slow
def test_densities_in_two_dimensions_integrate_to_one(name, num_condition):
    flow = VECTORS[name]
    # Nets of moderate scales, of whose density next to nothing is outside of the grid.
    params = params_of(flow, (2,), num_condition, scale=0.1)
    side = np.linspace(-15, 15, 601, dtype=np.float32)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    conditional = num_condition is not None
    log_prob = flow_log_prob(flow, conditional=conditional)

    @jax.jit
    def log_density(condition):
        def one(x):
            return log_prob(params, (x, condition) if conditional else x, KEY)

        return jax.vmap(one)(grid)

    conditions = [jnp.array([0.5, -1]), jnp.array([-1.0, 1])] if conditional else [None]
    densities = [np.exp(np.float64(log_density(condition))) for condition in conditions]
    for density in densities:
        np.testing.assert_allclose(density.sum() * (side[1] - side[0]) ** 2, 1, atol=1e-3)
    if conditional:
        assert np.abs(densities[0] - densities[1]).max() > 1e-3


def test_log_prob_worked_by_hand():
    """One activation norm of data with means 1, 2 and deviations 3, 4, and nets that say zero."""
    batch = jnp.array([[-2.0, -2.0], [4.0, 6.0]])
    flow = maf(num_layers=1, hidden_sizes=(3,))
    log_prob = flow_log_prob(flow)(flow.init(KEY, batch), jnp.array([4.0, 2.0]), KEY)
    np.testing.assert_allclose(log_prob, -0.5 - np.log(2 * np.pi * 12), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", flows("realnvp", "spline_flow", "maf"))
def test_tasks_under_vmap_equal_a_loop_in_log_prob_samples_and_gradients(name):
    flow, shape = FLOWS[name]
    x, _ = jax.tree.map(jnp.float32, batch_of(shape, num=3))
    log_prob = flow_log_prob(flow)
    sample = flow_sample(flow, shape)

    @jax.jit
    def evaluate(params, x):
        def mean(params):
            return jax.vmap(log_prob, (None, 0, None))(params, x, KEY).mean()

        return jax.value_and_grad(mean)(params), sample(KEY, params)

    start = params_of(flow, shape)
    tasks = [(moved(start, seed, 0.1), x + seed) for seed in (1, 2)]
    stack = functools.partial(jax.tree.map, lambda *a: jnp.stack(a))
    together = jax.jit(jax.vmap(evaluate))(*stack(*tasks))
    chex.assert_trees_all_close(
        together, stack(*[evaluate(*task) for task in tasks]), rtol=1e-3, atol=1e-4
    )
    assert jnp.abs(together[1][0] - together[1][1]).max() > 1e-3


@pytest.mark.slow
def test_an_inverse_autoregressive_flow_by_its_equations(float64):
    """`z_i = m_i(u_<i, c) + exp(s_i(u_<i, c)) u_i`, then the same in reversed order."""
    flow = VECTORS["iaf"]
    params = jax.tree.map(jnp.float64, params_of(flow, (3,), 2))
    u, condition = jnp.array([0.3, -1.2, 0.8]), jnp.array([0.5, -1.0])
    z, log_det = jax.jit(flow.inverse)(params, u, condition)
    expected, total = u, 0.0
    # Noise to data begins at the last layer of the chain.
    for name, order in (("layer1", "reversed"), ("layer0", "natural")):
        net = MADE((5,), num_params=2, order=order)
        shift, raw = net.apply(params[name], expected, condition)
        log_scale = -3 * np.tanh(raw / 3)
        expected = (expected - shift) * np.exp(log_scale)
        total += log_scale.sum()
    np.testing.assert_allclose(z, expected, rtol=1e-12)
    np.testing.assert_allclose(log_det, total, rtol=1e-12)
    jacobian = jax.jacobian(lambda u: flow.inverse(params, u, condition)[0])(u)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], rtol=1e-10)


@pytest.mark.parametrize("name", flows("maf"))
def test_samples_are_the_noise_that_their_z_is(name):
    flow, shape = FLOWS[name]
    params = params_of(flow, shape)
    sample = jax.jit(jax.vmap(flow_sample(flow, shape), (0, None)))
    x = sample(jax.random.split(KEY, 400), params)
    z, _ = jax.jit(jax.vmap(flow.forward, (None, 0)))(params, x)
    parts = [part.reshape(400, -1) for part in jax.tree.leaves(z)]
    z = np.concatenate(parts, axis=1)
    assert z.shape[1] == np.prod(shape)
    assert np.abs(z.mean(0)).max() < 5 / 20
    assert np.abs(np.cov(z.T) - np.eye(z.shape[1])).max() < 5 * np.sqrt(2) / 20


@pytest.mark.slow
def test_conditional_samples_follow_their_condition(float64):
    flow = VECTORS["maf"]
    params = jax.tree.map(jnp.float64, params_of(flow, (3,), 2))
    sample = jax.jit(flow_sample(flow, (3,)))
    for condition in (jnp.zeros(2), jnp.ones(2)):
        z, _ = flow.forward(params, sample(KEY, params, condition), condition)
        np.testing.assert_allclose(z, jax.random.normal(jax.random.split(KEY, 1)[0], 3), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", flows("maf"))
def test_maml_over_a_flow_differentiates_to_second_order(float64, name):
    """Along some directions, against finite differences of the loss after two inner steps."""
    flow, shape = FLOWS[name]
    x, _ = batch_of(shape, num=6)
    params = jax.tree.map(jnp.float64, params_of(flow, shape, scale=0.2))
    episode = Episode(x[:3], 1.5 * x[3:] + 0.5)
    loss = maml_loss(
        negative_log_likelihood_loss(flow_log_prob(flow)),
        inner_optimizer=optax.sgd(0.01),
        num_steps=2,
    )
    meta_gradient = jax.jit(gradients(loss))(params, episode, KEY)[0]

    @jax.jit
    def along(t, direction):
        return loss(jax.tree.map(lambda p, v: p + t * v, params, direction), episode, KEY)[0]

    for seed in range(3):
        direction = moved(jax.tree.map(jnp.zeros_like, params), seed)
        steps = ((-2, 1), (-1, -8), (1, 8), (2, -1))
        numerical = sum(w * along(s * 1e-4, direction) for s, w in steps) / 12e-4
        slope = sum(map(jnp.vdot, *map(jax.tree.leaves, (meta_gradient, direction))))
        np.testing.assert_allclose(slope, numerical, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", flows("glow", "maf of splines"))
@pytest.mark.slow
def test_gradients_and_inverses_are_finite_at_extremes_in_float32(name):
    flow, shape = FLOWS[name]
    log_prob = flow_log_prob(flow)
    params = params_of(flow, shape)

    @jax.jit
    @jax.vmap
    def evaluate(x):
        grads = jax.value_and_grad(log_prob, argnums=(0, 1))(params, x, KEY)
        z, _ = flow.forward(params, x)
        noise = jax.tree.map(lambda part: jnp.resize(x.ravel(), part.shape), z)
        return grads, flow.inverse(params, noise)

    x, _ = jax.tree.map(jnp.float32, batch_of(shape, num=4))
    points = jnp.concatenate([0 * x[:1], 1e4 * x, jnp.full_like(x[:1], 1e4), -1e4 * abs(x[:1])])
    for leaf in jax.tree.leaves(evaluate(points)):
        assert np.isfinite(leaf).all()


def test_a_flow_of_one_layer_learns_a_gaussian_to_its_entropy():
    """A mean that depends on what comes before is all that it takes; by chance, as by independent
    normals, which is where it starts, the loss is 0.51 nats higher."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 2)) @ [[2, 1.6], [0, 1.2]]
    x = jnp.float32((x - x.mean(0)) / x.std(0))
    flow = maf(num_layers=1, hidden_sizes=(16,))
    grad_fn = gradients(negative_log_likelihood_loss(flow_log_prob(flow)))
    optimizer = optax.adam(0.03)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            grads, metrics = grad_fn(params, x, KEY)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), metrics["loss"]

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=100)[1]

    losses = train(flow.init(KEY, x))
    covariance = np.cov(x.T)
    entropy = 1 + np.log(2 * np.pi) + 0.5 * np.linalg.slogdet(covariance)[1]
    assert losses[0] > entropy + 0.4
    assert abs(losses[-1] - entropy) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "conditional"), [((28, 28, 1), False), ((32, 32, 3), True)])
def test_flows_of_images_take_those_of_28_and_32_pixels(shape, conditional):
    batch = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    condition = jax.ShapeDtypeStruct((2, 10), jnp.float32) if conditional else None
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (batch, condition))
    for flow in (realnvp_images(), glow_images(num_steps=2)):
        params = jax.eval_shape(flow.init, KEY, batch, condition)
        z, log_det = jax.eval_shape(flow.forward, params, *one)
        assert sum(part.size for part in z) == np.prod(shape)
        assert log_det.shape == ()
        x, _ = jax.eval_shape(flow.inverse, params, z, one[1])
        assert x.shape == shape


@pytest.mark.slow
def test_bits_per_dimension_of_images_at_the_start():
    """Data-dependent initialisation has normalised all channels: next to a Gaussian's bits."""
    images = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 1))
    flow = chain(logit(0.05), IMAGES["glow_images"])
    params = jax.jit(flow.init)(KEY, jnp.float32((images + 0.5) / 256))
    log_prob = flow_log_prob(flow)

    @jax.jit
    def bound(image):
        return dequantized_log_prob(KEY, image, lambda y: log_prob(params, y, KEY))

    bits = bits_per_dim(float(np.mean([bound(image) for image in images])), num_dims=16)
    # A normal of the deviation of the logits of uniform noise, in nats, and their log-slope.
    t = 0.05 + 0.9 * (np.arange(10_000) + 0.5) / 10_000
    logits = np.log(t) - np.log1p(-t)
    density = gaussian_log_prob(logits, logits.mean(), np.log(logits.std()))
    expected = 8 - np.mean(np.asarray(density) + np.log(0.9 / (t * (1 - t)))) / np.log(2)
    assert bits == pytest.approx(expected, abs=0.15)


def test_says_what_is_needed():
    for builder in (realnvp, glow, maf, iaf, spline_flow):
        with pytest.raises(UserError, match="is 0; give a positive number"):
            builder(num_layers=0)
    for builder in (realnvp_images, glow_images):
        with pytest.raises(UserError, match="num_levels is 0; give a positive number"):
            builder(num_levels=0)
    with pytest.raises(UserError, match="7x7 can't be squeezed; give an even height and width"):
        jax.eval_shape(glow_images(num_levels=3).init, KEY, jnp.zeros((2, 28, 28, 1)))
