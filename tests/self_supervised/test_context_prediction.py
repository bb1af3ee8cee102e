"""Patches, their places and colours; the losses of direction and content by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.errors import UserError
from metagen_jax.gradients import gradients
from metagen_jax.parallel import data_parallel
from metagen_jax.self_supervised.adjacent_patch import (
    adjacent_features_loss,
    adjacent_pixels_loss,
)
from metagen_jax.self_supervised.context_prediction import (
    DIRECTIONS,
    context_prediction_loss,
    drop_colours,
    sample_patch_pair,
    sample_patch_pairs,
)

KEY = jax.random.key(0)
SIZES = {"patch_size": 3, "gap": 2, "jitter": 1}


def coordinates(height, width):
    grid = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return jnp.asarray(np.stack(grid, -1), jnp.float32)


@functools.cache
def many_pairs():
    """2000 pairs cut from a picture whose channels are row and column."""
    sample = functools.partial(sample_patch_pair, **SIZES)
    keys = jax.random.split(KEY, 2000)
    return jax.device_get(jax.jit(jax.vmap(sample, (0, None)))(keys, coordinates(16, 18)))


def test_patches_are_cut_whole_and_keep_gap_and_jitter():
    pairs = many_pairs()
    inside = np.asarray(coordinates(3, 3))
    corners = [patches[:, 0, 0] for patches in (pairs.centre, pairs.neighbour)]
    for patches, corner in zip(pairs[:2], corners, strict=True):
        np.testing.assert_array_equal(patches - corner[:, None, None], [inside] * 2000)
        assert (corner >= 0).all()
        assert (corner + 3 <= [16, 18]).all()
    moved = corners[1] - corners[0] - 5 * DIRECTIONS[pairs.direction]
    assert set(np.unique(moved)) == {-1, 0, 1}
    assert corners[1].min(0).tolist() == [0, 0], "the outermost pixels are seen too"
    assert (corners[1].max(0) + 3).tolist() == [16, 18]


def test_directions_places_and_jitter_are_uniform_and_independent():
    """Chi-squared statistics, each at most five deviations above its mean."""
    pairs = many_pairs()
    moved = pairs.neighbour[:, 0, 0] - pairs.centre[:, 0, 0] - 5 * DIRECTIONS[pairs.direction]
    places = pairs.centre[:, 0, 0].astype(int) - 6
    assert places.max(0).tolist() == [1, 3]
    cells = {
        "direction": (pairs.direction, 8),
        "jitter": ((moved + 1) @ [3, 1], 9),
        "place": (places @ [4, 1], 8),
        "direction and place": (8 * pairs.direction + places @ [4, 1], 64),
    }
    for name, (cell, count) in cells.items():
        counts = np.bincount(np.asarray(cell, int), minlength=count)
        assert len(counts) == count, name
        statistic = (np.square(counts - 2000 / count) / (2000 / count)).sum()
        assert statistic < count - 1 + 5 * np.sqrt(2 * (count - 1)), name


@pytest.mark.slow
def test_one_channel_of_a_patch_is_left_and_the_others_are_faint_noise():
    patch = 5 * jax.random.normal(KEY, (20, 20, 3))
    dropped = jax.vmap(drop_colours, (0, None))(jax.random.split(KEY, 600), patch)
    kept = (dropped == patch).all((1, 2))
    assert (kept.sum(1) == 1).all()
    assert np.abs(kept.mean(0) - 1 / 3).max() < 4 * np.sqrt(2 / 9 / 600)
    others = dropped[0][..., ~kept[0]]
    np.testing.assert_allclose(others.std(), 0.05, rtol=0.15)
    sometimes = functools.partial(drop_colours, probability=0.3)
    seen = jax.vmap(sometimes, (0, None))(jax.random.split(KEY, 600), patch)
    whole = (seen == patch).all((1, 2, 3)).mean()
    assert np.abs(whole - 0.7) < 4 * np.sqrt(0.3 * 0.7 / 600)


@pytest.mark.slow
def test_the_loss_of_a_classifier_that_knows_and_of_one_that_does_not():
    images = jnp.tile(coordinates(16, 18)[None], (32, 1, 1, 1))

    def embed(params, patches):
        return patches[:, 0, 0]

    def classify(params, pairs):
        towards = (pairs[:, 2:] - pairs[:, :2]) / 5
        return -params * jnp.square(towards[:, None] - jnp.asarray(DIRECTIONS)).sum(-1)

    loss_fn = context_prediction_loss(embed, classify, **SIZES, augment=None)
    loss, metrics = loss_fn(jnp.array(100.0), images, KEY)
    assert loss < 1e-3
    assert metrics["accuracy"] == 1
    np.testing.assert_allclose(loss_fn(jnp.array(0.0), images, KEY)[0], np.log(8), rtol=1e-6)


def linear(params, x):
    return jnp.tanh(x.reshape(len(x), -1) @ params)


def adjacent_example(dtype=jnp.float32):
    images = jax.random.normal(KEY, (16, 16, 18, 1), dtype)
    shapes = {"embed": (9, 5), "features": (13, 5), "pixels": (13, 9)}
    keys = jax.random.split(jax.random.key(1), 3)
    params = {
        name: jax.random.normal(key, shape, dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return params, images


def embed(params, patches):
    return linear(params["embed"], patches)


@pytest.mark.slow
def test_losses_of_content_equal_loops():
    params, images = adjacent_example()
    pair = sample_patch_pairs(KEY, images, **SIZES)
    centres, neighbours = (np.asarray(embed(params, p)) for p in pair[:2])
    inputs = np.concatenate([centres, np.eye(8)[pair.direction]], 1)

    loss_fn = adjacent_pixels_loss(embed, lambda p, x: linear(p["pixels"], x), **SIZES)
    drawn = np.tanh(inputs @ np.asarray(params["pixels"]))
    expected = np.square(drawn - np.asarray(pair.neighbour).reshape(16, -1)).mean()
    np.testing.assert_allclose(loss_fn(params, images, KEY)[0], expected, rtol=1e-4)

    loss_fn = adjacent_features_loss(
        embed, lambda p, x: linear(p["features"], x), temperature=0.2, **SIZES
    )
    predictions = np.tanh(inputs @ np.asarray(params["features"]))
    scores = [
        [q @ c / np.linalg.norm(q) / np.linalg.norm(c) / 0.2 for c in neighbours]
        for q in predictions
    ]
    expected = np.mean([np.logaddexp.reduce(row) - row[i] for i, row in enumerate(scores)])
    np.testing.assert_allclose(loss_fn(params, images, KEY)[0], expected, rtol=1e-4)


@pytest.mark.slow
def test_neighbours_of_all_devices_are_candidates():
    with jax.enable_x64(True):
        params, images = adjacent_example(jnp.float64)
        loss = functools.partial(
            adjacent_features_loss,
            embed,
            lambda p, x: linear(p["features"], x),
            temperature=0.2,
            **SIZES,
        )
        expected = jax.jit(gradients(loss()))(params, images, KEY)
        many = data_parallel(gradients(loss(axis_name="tasks")), devices=jax.devices("cpu")[:8])
        chex.assert_trees_all_close(many(params, images, KEY), expected, atol=1e-12)


def test_what_can_not_be_done_is_refused(ill_typed):
    params, images = adjacent_example()
    with pytest.raises(UserError, match=r"16x18 pixels; patches of 5 .* need 19 a side"):
        sample_patch_pair(KEY, images[0], patch_size=5, gap=1, jitter=1)
    for changes in ({"gap": -1}, {"jitter": -1}, {"patch_size": 0}):
        with pytest.raises(UserError, match="no negative gap or jitter"):
            sample_patch_pair(KEY, images[0], **{**SIZES, **changes})
    with pytest.raises(UserError, match="one number for each pixel"):
        adjacent_pixels_loss(embed, lambda p, x: x, **SIZES)(params, images, KEY)
