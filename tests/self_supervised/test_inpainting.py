"""Holes and hidden patches, the losses of both by hand, the field of two players."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.errors import UserError
from metagen_jax.generative.gan import NON_SATURATING, GANParams
from metagen_jax.gradients import task_keys
from metagen_jax.parallel import data_parallel
from metagen_jax.self_supervised.inpainting import (
    hide_box,
    inpainting_gradients,
    inpainting_loss,
    masked_autoencoder_loss,
    split_patches,
    with_hole,
)

KEY = jax.random.key(0)


def hide(key):
    return hide_box(key, shape=(4, 5), size=(2, 3))


def fill(params, inputs):
    return jnp.tanh(inputs @ params["fill"])


def score(params, images):
    return jnp.tanh(images.reshape(len(images), -1) @ params["w"]).sum(1)


def example(dtype=jnp.float64):
    images_key, fill_key, w_key = jax.random.split(KEY, 3)
    generator = {"fill": jax.random.normal(fill_key, (3, 2), dtype)}
    discriminator = {"w": jax.random.normal(w_key, (40, 3), dtype)}
    return GANParams(generator, discriminator), jax.random.normal(images_key, (8, 4, 5, 2), dtype)


def test_boxes_are_anywhere_equally_often():
    masks = np.asarray(jax.vmap(hide)(jax.random.split(KEY, 900)))
    assert (masks.sum((1, 2)) == 6).all()
    corners = [tuple(np.argwhere(mask)[0]) for mask in masks]
    counts = [corners.count((i, j)) for i in range(3) for j in range(3)]
    assert sum(counts) == 900
    assert np.abs(np.array(counts) - 100).max() < 4.5 * 10
    with pytest.raises(UserError, match=r"a box of \(5, 3\) does not fit"):
        hide_box(KEY, shape=(4, 5), size=(5, 3))


def test_the_hole_is_black_and_named_and_alone_counts():
    with jax.enable_x64(True):
        params, images = example()
        hidden = np.asarray(jax.vmap(hide)(task_keys(KEY, 8)))
        seen = with_hole(images, jnp.asarray(hidden))
        np.testing.assert_array_equal(seen[..., 2], hidden)
        np.testing.assert_array_equal(seen[..., :2], np.where(hidden[..., None], 0, images))
        filled = np.tanh(np.asarray(seen) @ np.asarray(params.generator["fill"]))
        errors = [
            (filled[n, i, j, c] - images[n, i, j, c]) ** 2
            for n, i, j in np.argwhere(hidden)
            for c in (0, 1)
        ]
        loss, _ = inpainting_loss(fill, hide)(params.generator, images, KEY)
        np.testing.assert_allclose(loss, np.mean(errors), rtol=1e-10)


@pytest.mark.slow
def test_the_field_is_each_players_gradient_of_its_own_loss_at_the_same_holes():
    with jax.enable_x64(True):
        params, images = example()
        grad_fn = inpainting_gradients(
            fill, score, hide, losses=NON_SATURATING, adversarial_weight=0.3
        )
        field, metrics = grad_fn(params, images, KEY)
        hole_keys = jax.vmap(jax.random.split, out_axes=1)(task_keys(KEY, 8))[0]
        hidden = jax.vmap(hide)(hole_keys)

        def filled(generator):
            return jnp.where(hidden[..., None], fill(generator, with_hole(images, hidden)), images)

        def generator_loss(generator):
            error = jnp.square(filled(generator) - images).sum() / (8 * 6 * 2)
            fooled = jax.nn.softplus(-score(params.discriminator, filled(generator))).mean()
            return 0.7 * error + 0.3 * fooled

        def discriminator_loss(discriminator):
            fake = score(discriminator, filled(params.generator))
            real = score(discriminator, images)
            return jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()

        expected = GANParams(
            jax.grad(generator_loss)(params.generator),
            jax.grad(discriminator_loss)(params.discriminator),
        )
        chex.assert_trees_all_close(field, expected, rtol=1e-9)
        error = jnp.square(filled(params.generator) - images).sum() / (8 * 6 * 2)
        np.testing.assert_allclose(metrics["reconstruction_loss"], error, rtol=1e-10)
        whole = generator_loss(params.generator)
        np.testing.assert_allclose(metrics["generator_loss"], whole, rtol=1e-10)
        many = data_parallel(grad_fn, devices=jax.devices("cpu")[:8])
        chex.assert_trees_all_close(many(params, images, KEY)[0], field, atol=1e-12)


@pytest.mark.slow
def test_a_penalty_is_of_images_filled_and_whole():
    with jax.enable_x64(True):
        params, images = example()

        def penalty(score_one, real, fake, key):
            return 2 * score_one(real) - jnp.square(real - fake).sum()

        def discriminator(penalty):
            grad_fn = inpainting_gradients(
                fill, score, hide, losses=NON_SATURATING, adversarial_weight=0.3, penalty=penalty
            )
            return grad_fn(params, images, KEY)

        field, metrics = discriminator(penalty)
        without, _ = discriminator(None)
        errors = 6 * 2 * metrics["reconstruction_loss"]
        scores = score(params.discriminator, images).mean()
        np.testing.assert_allclose(metrics["penalty"], 2 * scores - errors, rtol=1e-10)
        slope = jax.grad(lambda d: 2 * score(d, images).mean())(params.discriminator)
        chex.assert_trees_all_close(
            field.discriminator, jax.tree.map(jnp.add, without.discriminator, slope), rtol=1e-9
        )


def test_patches_are_split_at_random_without_one_in_both():
    shown, hidden = jax.device_get(split_patches(KEY, 600, 8, shown_share=0.25))
    assert shown.shape == (600, 2)
    assert (np.sort(np.concatenate([shown, hidden], 1), 1) == np.arange(8)).all()
    rates = (shown[..., None] == np.arange(8)).any(1).mean(0)
    assert np.abs(rates - 0.25).max() < 4.5 * np.sqrt(0.25 * 0.75 / 600)
    for share, expected in ((0.01, 1), (0.99, 7)):
        assert split_patches(KEY, 2, 8, shown_share=share)[0].shape == (2, expected)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_masked_autoencoder_is_judged_by_hidden_patches_alone(normalise):
    images = jax.random.normal(KEY, (4, 4, 4, 1)) * 3 + 1

    def to_patches(images):
        return images.reshape(4, 4, 4)

    def reconstruct(params, images, shown):
        """Nonsense for what is shown, which must not count."""
        drawn = jnp.broadcast_to(params, (4, 4, 4))
        return drawn.at[jnp.arange(4)[:, None], shown].set(1e6)

    loss_fn = masked_autoencoder_loss(reconstruct, to_patches, shown_share=0.5, normalise=normalise)
    loss, _ = loss_fn(jnp.array(0.0), images, KEY)
    _, hidden = split_patches(KEY, 4, 4, shown_share=0.5)
    patches = np.asarray(to_patches(images), np.float64)
    if normalise:
        np.testing.assert_allclose(loss, 1, rtol=1e-5)
        patches = (patches - patches.mean(-1, keepdims=True)) / patches.std(-1, keepdims=True)
    taken = np.take_along_axis(patches, np.asarray(hidden)[..., None], 1)
    loss, _ = loss_fn(jnp.array(0.5), images, KEY)
    np.testing.assert_allclose(loss, np.square(taken - 0.5).mean(), rtol=1e-4)


def test_flat_patches_and_bad_settings(ill_typed):
    """A patch of one value has no deviation to divide by."""
    images = jnp.ones((2, 4, 4, 1))

    def loss(params):
        return masked_autoencoder_loss(
            lambda p, x, shown: jnp.broadcast_to(p, (2, 4, 4)), lambda x: x.reshape(2, 4, 4)
        )(params, images, KEY)[0]

    chex.assert_tree_all_finite(jax.value_and_grad(loss)(jnp.array(0.5)))
    with pytest.raises(UserError, match="shown_share is 1"):
        masked_autoencoder_loss(fill, lambda x: x, shown_share=1)
    for weight in (-0.1, 1.1):
        with pytest.raises(UserError, match=r"adversarial_weight is .*; give 0 to 1"):
            inpainting_gradients(
                fill, score, hide, losses=NON_SATURATING, adversarial_weight=weight
            )
    params, images = example(jnp.float32)
    with pytest.raises(UserError, match=r"filled pictures have shape \(8, 4, 5, 3\)"):
        inpainting_loss(lambda p, x: x, hide)(params.generator, images, KEY)
