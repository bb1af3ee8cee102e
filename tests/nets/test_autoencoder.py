"""The autoencoder against a NumPy version of itself, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagen_jax.gradients import gradients
from metagen_jax.nets.autoencoder import Autoencoder
from metagen_jax.supervised import squared_error_loss
from metagen_jax.training import init_state, train_step

KEY = jax.random.key(0)


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def conv_in_numpy(x, kernel, bias, stride=1):
    """The "SAME" convolution of one image, output by output."""
    height, width, _ = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    top = max((rows - 1) * stride + 3 - height, 0) // 2
    left = max((columns - 1) * stride + 3 - width, 0) // 2
    padded = np.pad(x, ((top, 3), (left, 3), (0, 0)))
    result = np.empty((rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            patch = padded[stride * i : stride * i + 3, stride * j : stride * j + 3]
            result[i, j] = np.tensordot(patch, kernel, 3) + bias
    return result


@pytest.mark.parametrize("shape", [pytest.param((8, 8, 1), marks=pytest.mark.slow), (7, 10, 2)])
def test_equals_the_same_net_written_in_numpy(shape):
    net = Autoencoder(shape, num_latents=3, num_filters=2)
    images = random(2, *shape)
    variables = net.init(KEY, images)
    params = jax.tree.map(lambda p: p + 0.1 * random(*p.shape, seed=1), variables["params"])
    latents = net.apply({"params": params}, images, method="encode")
    outputs = net.apply({"params": params}, images)
    assert latents.shape == (2, 3)
    assert outputs.shape == images.shape
    p = jax.tree.map(np.asarray, params)
    for image, latent, output in zip(images, latents, outputs, strict=True):
        x = np.asarray(image)
        for i in range(2):
            layer = p[f"down_{i}"]
            x = np.maximum(conv_in_numpy(x, layer["kernel"], layer["bias"], 2), 0)
        small = x.shape
        z = x.ravel() @ p["to_latents"]["kernel"] + p["to_latents"]["bias"]
        np.testing.assert_allclose(latent, z, rtol=1e-4, atol=1e-5)
        x = (z @ p["from_latents"]["kernel"] + p["from_latents"]["bias"]).reshape(small)
        sizes = [(-(-shape[0] // 2), -(-shape[1] // 2)), shape[:2]]
        for i, (height, width) in enumerate(sizes):
            x = np.maximum(x, 0).repeat(2, 0).repeat(2, 1)[:height, :width]
            x = conv_in_numpy(x, p[f"up_{i}"]["kernel"], p[f"up_{i}"]["bias"])
        np.testing.assert_allclose(output, x, rtol=1e-4, atol=1e-4)


def test_decode_of_encode_is_the_reconstruction():
    net = Autoencoder((28, 28, 1), num_filters=2)
    images = random(3, 28, 28, 1)
    variables = net.init(KEY, images)
    latents = net.apply(variables, images, method="encode")
    assert latents.shape == (3, 64)
    decoded = net.apply(variables, latents, method="decode")
    np.testing.assert_allclose(decoded, net.apply(variables, images), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_learns_to_reconstruct_better_than_the_mean_picture():
    """Pictures of two numbers each; the mean of all is the best that ignores its input."""
    codes = np.random.default_rng(0).uniform(size=(64, 2)).astype(np.float32)
    wave = np.cos(np.pi * (np.arange(8) + 0.5) / 8)
    patterns = np.stack([np.tile(wave, (8, 1)), np.tile(wave[:, None], (1, 8))])[..., None]
    images = jnp.asarray(np.tensordot(codes, patterns, 1), jnp.float32)
    net = Autoencoder((8, 8, 1), num_latents=2, num_filters=4)
    optimizer = optax.adam(1e-2)
    step = train_step(
        gradients(squared_error_loss(net.apply)), optimizer, lambda key, data: (data, data)
    )
    state = init_state(net.init(KEY, images), optimizer, KEY)
    for _ in range(150):
        state, metrics = step(state, images)
    assert metrics["loss"] < 0.1 * jnp.square(images - images.mean(0)).mean()
