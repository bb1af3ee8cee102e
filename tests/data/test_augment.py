"""Augmentations against SciPy, NumPy and values worked by hand."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from metagen_jax.data.augment import (
    affine,
    blur,
    cutout,
    drop_pixels,
    elastic,
    random_affine,
    random_blur,
    random_flip,
    random_resized_crop,
    resized_crop,
)
from metagen_jax.errors import UserError

KEY = jax.random.key(0)
AMOUNTS = {
    "max_rotation": 0.3,
    "max_shear": 0.2,
    "max_log_scale": 0.2,
    "max_shift": 2.0,
    "background": 0.5,
}


def picture(height=7, width=9, channels=2, dtype=np.float32):
    return np.random.default_rng(0).uniform(size=(height, width, channels)).astype(dtype)


def bilinear(image, source, background):
    """The value of one channel at a position, its neighbours outside being background."""
    corner = np.floor(source).astype(int)
    value = 0.0
    for offset in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        at = corner + offset
        inside = (at >= 0).all() and (at < image.shape).all()
        weight = np.prod(1 - np.abs(source - at))
        value += weight * (image[tuple(at)] if inside else background)
    return value


def affine_in_numpy(image, *, rotation, shear, scale, shift, background):
    """Pixel by pixel, with the matrix and its inverse written out."""
    cos, sin = math.cos(rotation), math.sin(rotation)
    turn = np.array([[cos, -sin], [sin, cos]])
    matrix = turn @ np.array([[1, 0], [shear, 1]]) @ np.diag(scale)
    centre = (np.array(image.shape[:2]) - 1) / 2
    result = np.empty(image.shape)
    for index in np.ndindex(*image.shape):
        p = np.array(index[:2]) - centre - shift
        source = np.linalg.solve(matrix, p) + centre
        result[index] = bilinear(image[..., index[2]], source, background)
    return result


@pytest.mark.parametrize("background", [0.0, 0.7])
def test_affine_equals_bilinear_sampling_pixel_by_pixel(background):
    options = {"rotation": 0.4, "shear": -0.3, "scale": (1.2, 0.7), "shift": (1.3, -0.6)}
    with jax.enable_x64(True):
        image = picture(dtype=np.float64)
        actual = affine(jnp.asarray(image), **options, background=background)
        expected = affine_in_numpy(image, **options, background=background)
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def test_affine_without_amounts_gives_the_picture_back():
    image = picture()
    np.testing.assert_array_equal(affine(jnp.asarray(image)), image)


def test_a_shift_moves_a_pixel_down_and_across():
    image = jnp.zeros((4, 5, 1)).at[1, 1].set(1)
    moved = affine(image, shift=(1.0, 2.0))
    np.testing.assert_allclose(moved, jnp.zeros((4, 5, 1)).at[2, 3].set(1), atol=1e-6)
    between = affine(image, shift=(0.0, 0.25))
    np.testing.assert_allclose(between[1, :, 0], [0, 0.75, 0.25, 0, 0], atol=1e-6)


def test_a_quarter_turn_is_counter_clockwise():
    image = picture(6, 6)
    turned = affine(jnp.asarray(image), rotation=math.pi / 2, background=9.0)
    np.testing.assert_allclose(turned[1:-1, 1:-1], np.rot90(image)[1:-1, 1:-1], atol=1e-5)


def test_a_scale_of_two_doubles_a_square_and_a_shear_slants_a_column():
    image = jnp.zeros((9, 9, 1)).at[3:6, 3:6].set(1)
    doubled = affine(image, scale=(2.0, 2.0))
    assert doubled[4, 2:7, 0].min() == 1
    assert float(doubled.sum()) == pytest.approx(4 * 9, rel=0.01)
    column = jnp.zeros((5, 5, 1)).at[:, 2].set(1)
    slanted = affine(column, shear=1.0)
    np.testing.assert_allclose(slanted[..., 0], np.eye(5), atol=1e-6)


def test_bytes_stay_bytes_and_outside_is_the_paper():
    image = jnp.full((5, 5, 1), 100, jnp.uint8).at[2, 2].set(10)
    moved = affine(image, shift=(0.0, 0.5), background=255.0)
    assert moved.dtype == jnp.uint8
    np.testing.assert_array_equal(moved[2, :, 0], [178, 100, 55, 55, 100])  # 177.5 rounds to even


def test_affine_is_differentiable_in_picture_and_amounts():
    with jax.enable_x64(True):
        image = jnp.asarray(picture(5, 5, 1, np.float64))
        amounts = (jnp.array(0.2), jnp.array([1.1, 0.9]), jnp.array([0.3, -0.4]))

        def total(image, amounts):
            rotation, scale, shift = amounts
            weights = jnp.arange(25.0).reshape(5, 5, 1)
            return (weights * affine(image, rotation=rotation, scale=scale, shift=shift)).sum()

        jax.test_util.check_grads(
            jax.jit(total), (image, amounts), order=1, modes=["rev"], eps=1e-6
        )


def test_random_affine_is_affine_with_amounts_inside_their_limits():
    """Recovers the amounts of a key from pictures that are coordinates, and draws many keys."""
    coordinates = jnp.stack(
        jnp.meshgrid(jnp.arange(-20.0, 21), jnp.arange(-20.0, 21), indexing="ij"), -1
    )

    def sources(key):
        image = random_affine(key, coordinates, **(AMOUNTS | {"max_shift": 0.0}))
        return image[21, 20], image[20, 21]  # columns of M^-1

    columns = np.asarray(jax.vmap(sources)(jax.random.split(KEY, 500)))
    inverses = columns.transpose(1, 2, 0)
    matrices = np.linalg.inv(inverses)
    # M (0, 1) = scale_across (-sin, cos), det M = scale_down scale_across.
    rotations = np.arctan2(-matrices[:, 0, 1], matrices[:, 1, 1])
    across = np.hypot(matrices[:, 0, 1], matrices[:, 1, 1])
    down = np.linalg.det(matrices) / across
    for values, limit in [(rotations, 0.3), (np.log(across), 0.2), (np.log(down), 0.2)]:
        assert np.abs(values).max() <= limit + 1e-4
        assert values.max() > 0.9 * limit
        assert values.min() < -0.9 * limit
    assert abs(np.corrcoef(np.log(across), np.log(down))[0, 1]) < 0.2

    shifts = jax.vmap(lambda key: random_affine(key, coordinates, max_shift=3.0)[20, 20])
    shifts = -np.asarray(shifts(jax.random.split(KEY, 500)))
    assert np.abs(shifts).max() <= 3 + 1e-4
    assert shifts.min(0).max() < -2.7
    assert shifts.max(0).min() > 2.7


def test_pixels_are_dropped_at_their_rate_with_all_channels():
    image = jnp.full((100, 100, 3), 200, jnp.uint8)
    dropped = drop_pixels(KEY, image, rate=0.3, background=255.0)
    assert dropped.dtype == jnp.uint8
    assert set(np.unique(dropped).tolist()) == {200, 255}
    fraction = (np.asarray(dropped) == 255).mean((0, 1))
    np.testing.assert_array_equal(fraction, fraction[0])
    assert abs(fraction[0] - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 1e4)
    np.testing.assert_array_equal(drop_pixels(KEY, image, rate=0.0), image)
    assert not np.asarray(drop_pixels(KEY, image, rate=1.0)).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "augment",
    [
        functools.partial(random_affine, **AMOUNTS),
        functools.partial(drop_pixels, rate=0.5, background=0.5),
        random_resized_crop,
        functools.partial(cutout, size=3, background=0.5),
        functools.partial(elastic, displacement=1.0, smoothness=2.0),
        functools.partial(random_blur, probability=0.9),
    ],
)
def test_jit_and_vmap_give_the_same(augment):
    images = jnp.stack([jnp.asarray(picture()), jnp.asarray(picture())[::-1]])
    keys = jax.random.split(KEY, 2)
    one_by_one = jnp.stack([augment(key, image) for key, image in zip(keys, images, strict=True)])
    chex.assert_trees_all_close(jax.vmap(augment)(keys, images), one_by_one, atol=1e-5)
    chex.assert_trees_all_close(jax.jit(augment)(keys[0], images[0]), one_by_one[0], atol=1e-5)
    assert np.abs(one_by_one[0] - augment(keys[1], images[0])).max() > 0.1


def coordinates(height, width):
    """A picture whose channels are the row and the column of a pixel."""
    grid = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return jnp.asarray(np.stack(grid, -1), jnp.float32)


@pytest.mark.slow
def test_a_resized_crop_equals_pillows():
    image = picture(9, 12)
    for corner, sides in (((0.0, 0.0), (9.0, 12.0)), ((1.25, 2.5), (4.5, 7.0))):
        top, left = corner
        box = (left, top, left + sides[1], top + sides[0])
        expected = [
            Image.fromarray(image[..., c]).resize((12, 9), Image.Resampling.BILINEAR, box=box)
            for c in range(2)
        ]
        actual = resized_crop(jnp.asarray(image), corner=corner, sides=sides)
        np.testing.assert_allclose(actual, np.stack(expected, -1), atol=1e-5)
    expected = [
        Image.fromarray(image[..., c]).resize((5, 5), Image.Resampling.BILINEAR, box=box)
        for c in range(2)
    ]
    smaller = resized_crop(jnp.asarray(image), corner=corner, sides=sides, size=5)
    np.testing.assert_allclose(smaller, np.stack(expected, -1), atol=1e-5)
    whole = resized_crop(jnp.asarray(image), corner=(0.0, 0.0), sides=(9.0, 12.0))
    np.testing.assert_allclose(whole, image, atol=1e-6)


def test_boxes_have_sizes_shapes_and_places_within_their_limits():
    """The box is read off the middle of pictures of coordinates, where nothing is cut."""
    height, width = 40, 60
    crop = functools.partial(random_resized_crop, min_area=0.2)
    images = jax.jit(jax.vmap(crop, in_axes=(0, None)))(
        jax.random.split(KEY, 800), coordinates(height, width)
    )
    middle = np.asarray(images[:, 20, 30]), np.asarray(images[:, 21, 31])
    sides = (middle[1] - middle[0]) * [height, width]
    corners = middle[0] + 0.5 - np.array([20.5, 30.5]) / [height, width] * sides
    shares = sides / [height, width]
    assert (corners > -0.01).all()
    assert (corners + sides < [height + 0.01, width + 0.01]).all()
    inside = (shares < 0.999).all(1)
    area, aspect = shares.prod(1), np.log(shares[:, 0] / shares[:, 1])
    assert area.min() > 0.2 - 1e-3
    assert area.min() < 0.21
    assert area[inside].max() > 0.9
    assert np.abs(aspect).max() < np.log(4 / 3) + 1e-3
    for limit in (aspect.max(), -aspect.min()):
        assert limit > 0.95 * np.log(4 / 3)
    small = inside & (area < 0.5)  # Of which none is cut: uniform in [0.2, 0.5].
    assert abs(area[small].mean() - 0.35) < 4 * 0.3 / np.sqrt(12 * small.sum())
    assert abs(small.mean() - 0.3 / 0.8) < 4 * np.sqrt(0.25 / 800)
    place = (corners / np.maximum([height, width] - sides, 1e-3))[inside]
    assert np.abs(place.mean(0) - 0.5).max() < 4 / np.sqrt(12 * inside.sum())
    with pytest.raises(UserError, match="min_area is 0"):
        random_resized_crop(KEY, coordinates(4, 4), min_area=0)


def test_every_second_picture_is_flipped():
    image = jnp.asarray(picture())
    flipped = np.asarray(
        jax.vmap(random_flip, in_axes=(0, None))(jax.random.split(KEY, 400), image)
    )
    is_flipped = (flipped == np.asarray(image)[:, ::-1]).all((1, 2, 3))
    assert (is_flipped | (flipped == np.asarray(image)).all((1, 2, 3))).all()
    assert abs(is_flipped.mean() - 0.5) < 4 * 0.5 / 20


@pytest.mark.parametrize("size", [3, 4])
def test_cutout_covers_a_square_around_any_pixel(size):
    image = jnp.full((6, 8, 2), 200, jnp.uint8)
    covered = functools.partial(cutout, size=size, background=255.0)
    results = np.asarray(jax.vmap(covered, in_axes=(0, None))(jax.random.split(KEY, 2000), image))
    assert results.dtype == np.uint8
    np.testing.assert_array_equal(results[..., 0], results[..., 1])
    masks = results[..., 0] == 255
    expected = set()
    for y, x in np.ndindex(6, 8):
        mask = np.zeros((6, 8), bool)
        top, left = y - size // 2, x - size // 2
        mask[max(top, 0) : top + size, max(left, 0) : left + size] = True
        expected.add(mask.tobytes())
    counts = [sum(m.tobytes() == e for m in masks) for e in expected]
    assert len(expected) == 48
    assert sum(counts) == 2000
    assert np.abs(np.array(counts) - 2000 / 48).max() < 4.5 * np.sqrt(2000 / 48)


def test_elastic_moves_are_as_large_and_as_smooth_as_asked():
    moved = functools.partial(elastic, displacement=1.5, smoothness=3.0)
    start = coordinates(40, 40)
    results = jax.jit(jax.vmap(moved, in_axes=(0, None)))(jax.random.split(KEY, 100), start)
    moves = np.asarray(results - start)[:, 12:28, 12:28]
    assert abs(moves.std() - 1.5) < 0.1
    neighbours = (moves[:, 1:] * moves[:, :-1]).mean() / np.square(moves).mean()
    # White noise smoothed by a Gaussian correlates as a Gaussian of twice the variance.
    assert abs(neighbours - np.exp(-1 / (4 * 3.0**2))) < 0.005
    assert abs((moves[..., 0] * moves[..., 1]).mean()) < 0.2
    np.testing.assert_allclose(
        elastic(KEY, start, displacement=0.0, smoothness=3.0), start, atol=1e-5
    )


@pytest.mark.parametrize("sigma", [0.1, 0.8, 5.0])
def test_blur_equals_scipys_cut_at_the_edges(sigma):
    image = picture()

    def smooth(x):
        sigmas = (sigma, sigma, 0)
        return scipy.ndimage.gaussian_filter(x, sigmas, mode="constant", truncate=20)

    # SciPy divides by the sum of an untruncated window: the weights that are outside are missing.
    expected = smooth(image.astype(np.float64)) / smooth(np.ones_like(image, np.float64))
    np.testing.assert_allclose(blur(jnp.asarray(image), sigma=sigma), expected, atol=1e-5)


def test_pictures_are_blurred_with_their_probability():
    image = (255 * picture()).astype(np.uint8)
    for probability in (0.0, 0.3, 1.0):
        results = jax.vmap(
            functools.partial(random_blur, min_sigma=1.0, probability=probability),
            in_axes=(0, None),
        )(jax.random.split(KEY, 300), jnp.asarray(image))
        assert results.dtype == jnp.uint8
        changed = (np.asarray(results) != image).any((1, 2, 3)).mean()
        assert abs(changed - probability) <= 4 * np.sqrt(probability * (1 - probability) / 300)
