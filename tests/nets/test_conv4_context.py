"""A context of zeros changes nothing, others modulate the third block, and CAVIA adapts them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references

from metagen_jax.gradients import gradients
from metagen_jax.meta.cavia import cavia_loss, cavia_params
from metagen_jax.nets.conv4 import Conv4
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.types import Episode

KEY = jax.random.key(0)
NUM_CONTEXT = 3


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def example(strided, num_images=5):
    """A net, parameters away from the initial ones, so that leaving one out shows, and images."""
    images = random(num_images, 17, 16, 2)
    net = Conv4(4, num_filters=8, strided=strided)
    params = jax.jit(net.init)(KEY, images, context=jnp.zeros(NUM_CONTEXT))["params"]
    return net, jax.tree.map(lambda p: p + 0.1 * random(*p.shape, seed=1), params), images


def test_has_the_parameters_of_conv4_and_one_linear_layer_more():
    images = jnp.zeros((1, 28, 28, 1))
    film = jax.eval_shape(lambda: Conv4(5).init(KEY, images, context=jnp.zeros(100)))["params"]
    conv4 = jax.eval_shape(Conv4(5).init, KEY, images)["params"]
    assert jax.tree.map(jnp.shape, film.pop("film")) == {"kernel": (100, 128)}
    assert jax.tree.map(jnp.shape, film) == jax.tree.map(jnp.shape, conv4)


@pytest.mark.parametrize(
    ("strided", "num_reference"), [(True, 3), pytest.param(False, None, marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_a_context_of_zeros_is_conv4_in_value_and_gradient(strided, num_reference):
    net, params, images = example(strided)
    conv4 = Conv4(4, num_filters=8, strided=strided)

    def loss(apply, params, images, context):
        logits = apply({"params": params}, images, num_reference, context=context)
        return jnp.sum(random(5, 4, seed=2) * logits)

    value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    value, grads = value_and_grad(net.apply, params, images, jnp.zeros(NUM_CONTEXT))
    without = {name: leaf for name, leaf in params.items() if name != "film"}
    expected, expected_grads = value_and_grad(conv4.apply, without, images, None)
    assert np.all(grads.pop("film")["kernel"] == 0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, expected_grads
    )


@pytest.mark.parametrize("strided", [True, False])
def test_equals_the_same_net_in_numpy(strided):
    net, params, images = example(strided)
    context = 3 * random(NUM_CONTEXT, seed=3)
    actual = jax.jit(net.apply)({"params": params}, images, context=context)

    params, x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, images))
    for block in range(4):
        conv, norm = params[f"conv{block}"], params[f"norm{block}"]
        strides = (2, 2) if strided else (1, 1)
        x = references.convolve_same(x, conv["kernel"], strides) + conv["bias"]
        x = references.batch_norm(x, norm["scale"], norm["bias"], epsilon=1e-3)
        if not strided:
            x, _ = references.max_pool_2x2(x)
        if block == 2:
            scale, shift = np.split(context @ params["film"]["kernel"], 2)
            assert np.any(1 + scale < 0), "so that it matters what comes before the modulation"
            x = (1 + scale) * x + shift
        x = np.maximum(x, 0)
    x = x.mean((1, 2)) if strided else x.reshape(len(x), -1)
    expected = x @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strided", [True, False])
def test_the_initial_net_learns_from_a_context_of_zeros(strided):
    images = random(5, 16, 16, 1)
    net = Conv4(4, num_filters=8, strided=strided)
    params = jax.jit(net.init)(KEY, images, context=jnp.zeros(NUM_CONTEXT))
    slope = jax.jit(
        jax.grad(lambda c: jnp.sum(random(5, 4) * net.apply(params, images, context=c)))
    )
    assert np.all(np.abs(slope(jnp.zeros(NUM_CONTEXT))) > 1e-4)


@pytest.mark.slow
def test_images_after_the_reference_are_answered_one_by_one():
    net, params, images = example(True)
    context = random(NUM_CONTEXT, seed=3)

    @jax.jit
    def answer(queries):
        both = jnp.concatenate([images[:3], queries])
        return net.apply({"params": params}, both, num_reference=3, context=context)[3:]

    alone = np.concatenate([answer(images[3:4]), answer(images[4:])])
    np.testing.assert_allclose(answer(images[3:]), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_adapts_by_cavia():
    """The queries are the support set, so that adaptation must lower their loss in every task."""
    net, shared, _ = example(True)
    loss_fn = cross_entropy_loss(
        lambda params, x: net.apply({"params": params["shared"]}, x, context=params["context"])
    )
    tasks = (random(2, 5, 17, 16, 2), jnp.arange(10).reshape(2, 5) % 4)
    params = cavia_params(shared, NUM_CONTEXT)
    grad_fn = gradients(cavia_loss(loss_fn, inner_optimizer=optax.sgd(0.1), num_steps=2))
    over_tasks = jax.jit(jax.vmap(grad_fn, in_axes=(None, 0, None)))
    grads, metrics = over_tasks(params, Episode(tasks, tasks), KEY)
    before, _ = jax.jit(jax.vmap(loss_fn, in_axes=(None, 0, None)))(params, tasks, KEY)
    assert np.all(metrics["loss"] < before)
    assert np.all(grads["context"] == 0)
    assert np.abs(grads["shared"]["film"]["kernel"]).max() > 1e-3
