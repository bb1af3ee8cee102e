"""MAML over generative models: the meta-gradient, through their noise, by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagen_jax.generative.autoregressive import autoregressive_log_prob
from metagen_jax.generative.likelihoods import bernoulli_log_prob
from metagen_jax.generative.maximum_likelihood import negative_log_likelihood_loss
from metagen_jax.generative.vae import gaussian_inference, vae_loss
from metagen_jax.meta.maml import maml_loss
from metagen_jax.nets.pixelcnn import PixelCNN
from metagen_jax.nets.vae import DenseVAE
from metagen_jax.types import Episode

KEY = jax.random.key(0)
SHAPE = (3, 3, 1)


def vae():
    net = DenseVAE(SHAPE, num_latents=2, hidden_sizes=(4,))
    infer = gaussian_inference(
        lambda params, x: net.apply(params, x, method="encode"),
        lambda params, z: net.apply(params, z, method="decode"),
        lambda x, decoded: bernoulli_log_prob(x, decoded[..., 0]).sum(),
    )
    return net, vae_loss(infer)


def pixelcnn():
    net = PixelCNN(1, features=2, num_layers=2, first_kernel_size=3)
    return net, negative_log_likelihood_loss(autoregressive_log_prob(net.apply, bernoulli_log_prob))


@pytest.mark.parametrize("model", [vae, pytest.param(pixelcnn, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_meta_gradient_with_fixed_noise_equals_finite_differences(model):
    with jax.enable_x64(True):
        net, loss_fn = model()
        rng = np.random.default_rng(0)
        images = rng.integers(0, 2, size=(5, *SHAPE)).astype(float)
        episode = Episode(jnp.asarray(images[:3]), jnp.asarray(images[3:]))
        shapes = jax.eval_shape(net.init, KEY, images[0])
        params, direction = (
            jax.tree.map(lambda p: jnp.asarray(0.5 * rng.normal(size=p.shape)), shapes)
            for _ in range(2)
        )
        loss = maml_loss(loss_fn, inner_optimizer=optax.sgd(0.1), num_steps=2)

        @jax.jit
        def along(t):
            moved = jax.tree.map(lambda p, v: p + t * v, params, direction)
            return loss(moved, episode, KEY)[0]

        step = 1e-4
        expected = (along(step) - along(-step)) / (2 * step)
        assert jax.jit(jax.grad(along))(0.0) == pytest.approx(float(expected), rel=1e-6)
        # First-order MAML leaves out a part that is not small here.
        first = maml_loss(
            loss_fn, inner_optimizer=optax.sgd(0.1), num_steps=2, gradient="first_order"
        )
        grads = jax.jit(jax.grad(lambda p: first(p, episode, KEY)[0]))(params)
        slope = sum(
            jnp.vdot(a, b)
            for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True)
        )
        assert abs(slope - expected) > 1e-3 * abs(expected)
