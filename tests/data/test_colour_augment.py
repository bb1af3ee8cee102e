"""Changes of colour against Python's `colorsys` and values worked by hand."""

import colorsys
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.data.colour_augment import adjust_colours, colour_jitter, grey, random_grey

KEY = jax.random.key(0)


def picture(dtype=np.float32):
    image = np.random.default_rng(0).uniform(size=(5, 6, 3)).astype(np.float32)
    image[0] = image[0, :, :1]  # Greys have no hue.
    image[1, :2], image[1, 2:4, 1] = 0, 1  # Black; two equal channels at the top.
    return image if dtype == np.float32 else np.round(255 * image).astype(dtype)


@pytest.mark.parametrize("hue", [0.0, 0.1, -0.37, 1.0])
def test_hues_turn_as_in_colorsys(hue):
    def turned(pixel):
        h, s, v = colorsys.rgb_to_hsv(*map(float, pixel))
        return colorsys.hsv_to_rgb((h + hue) % 1, s, v)

    image = picture()
    expected = np.apply_along_axis(turned, -1, image.astype(np.float64))
    actual = adjust_colours(jnp.asarray(image), hue=hue)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_third_of_a_turn_makes_red_green():
    red = jnp.array([[[255, 0, 0]]], jnp.uint8)
    np.testing.assert_array_equal(adjust_colours(red, hue=1 / 3), [[[0, 255, 0]]])


def test_brightness_contrast_and_saturation_by_hand():
    image = jnp.array([[[0.2, 0.4, 0.6], [0.8, 0.0, 0.4]]])
    np.testing.assert_allclose(
        adjust_colours(image, brightness=1.5), [[[0.3, 0.6, 0.9], [1.0, 0.0, 0.6]]], atol=1e-6
    )
    greys = np.array([0.2 * 0.299 + 0.4 * 0.587 + 0.6 * 0.114, 0.8 * 0.299 + 0.4 * 0.114])
    np.testing.assert_allclose(grey(image)[0, :, 0], greys, rtol=1e-6)
    np.testing.assert_allclose(
        adjust_colours(image, contrast=0.5), 0.5 * image + 0.5 * greys.mean(), atol=1e-6
    )
    without = np.broadcast_to(greys[None, :, None], (1, 2, 3))
    np.testing.assert_allclose(adjust_colours(image, saturation=0.0), without, atol=1e-6)
    np.testing.assert_allclose(
        adjust_colours(image, contrast=0.0), np.full((1, 2, 3), greys.mean()), atol=1e-6
    )


def test_jitter_is_within_its_limits_and_as_often_as_asked():
    """Brightness, contrast, saturation are read off pictures on which only they act."""
    keys = jax.random.split(KEY, 500)
    one_grey = jnp.full((2, 2, 3), 0.5)
    jitter = functools.partial(colour_jitter, strength=0.5)
    values = np.asarray(jax.vmap(jitter, in_axes=(0, None))(keys, one_grey))[:, 0, 0, 0] / 0.5
    changed = np.abs(values - 1) > 1e-4
    assert abs(changed.mean() - 0.8) < 4 * np.sqrt(0.16 / 500)
    assert values.min() > 0.6 - 1e-5
    assert values.max() < 1.4 + 1e-5
    assert values.min() < 0.62
    assert values.max() > 1.38
    always = functools.partial(colour_jitter, strength=0.5, probability=1.0)
    # Dull, dark and of no contrast: the order of the channels tells the hue's direction and limit.
    dull = jnp.broadcast_to(jnp.array([0.32, 0.30, 0.30]), (2, 2, 3))
    pixels = np.asarray(jax.vmap(always, in_axes=(0, None))(keys, dull))[:, 0, 0]
    hues = np.array([colorsys.rgb_to_hsv(*map(float, pixel))[0] for pixel in pixels])
    hues = (hues + 0.5) % 1 - 0.5
    assert np.abs(hues).max() < 0.1 + 1e-3
    assert hues.max() > 0.095
    assert hues.min() < -0.095


def test_pictures_are_grey_as_often_as_asked():
    image = jnp.asarray(picture(np.uint8))
    results = np.asarray(
        jax.vmap(random_grey, in_axes=(0, None))(jax.random.split(KEY, 500), image)
    )
    assert results.dtype == np.uint8
    is_grey = (results == results[..., :1]).all((1, 2, 3))
    assert abs(is_grey.mean() - 0.2) < 4 * np.sqrt(0.16 / 500)
    np.testing.assert_array_equal(results[~is_grey][0], image)
    luma = np.round(picture(np.uint8) @ np.array([0.299, 0.587, 0.114]))
    np.testing.assert_allclose(results[is_grey][0, ..., 0], luma, atol=1)


@pytest.mark.slow
@pytest.mark.parametrize("augment", [colour_jitter, random_grey])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_jit_and_vmap_give_the_same_and_the_kind_stays(augment, dtype):
    images = jnp.stack([jnp.asarray(picture(dtype)), jnp.asarray(picture(dtype))[::-1]])
    augment = functools.partial(augment, probability=0.9)
    keys = jax.random.split(KEY, 2)
    one_by_one = jnp.stack([augment(key, image) for key, image in zip(keys, images, strict=True)])
    assert one_by_one.dtype == dtype
    tolerance = 1e-5 if dtype == np.float32 else 1
    together = jax.vmap(augment)(keys, images)
    as_floats = [np.asarray(x, np.float32) for x in (together, one_by_one)]
    chex.assert_trees_all_close(*as_floats, atol=tolerance)
    assert (np.asarray(one_by_one[0]) != np.asarray(images[0])).any()
