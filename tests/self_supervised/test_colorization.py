"""CIELAB against published values, classes of colour, weights and decoding by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.errors import UserError
from metagen_jax.self_supervised.colorization import (
    ab_grid,
    annealed_mean,
    class_weights,
    colorization_loss,
    colour_frequencies,
    lab_to_rgb,
    rgb_to_lab,
    soft_encode,
)

GRID = ab_grid()
SMALL = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [50.0, 50.0]], np.float32)


def test_lab_of_the_corners_of_srgb_as_published():
    """Values for D65, such as in Lindbloom's tables."""
    published = {
        (0, 0, 0): (0, 0, 0),
        (1, 1, 1): (100, 0, 0),
        (1, 0, 0): (53.24, 80.09, 67.20),
        (0, 1, 0): (87.73, -86.18, 83.18),
        (0, 0, 1): (32.30, 79.19, -107.86),
        (1, 1, 0): (97.14, -21.55, 94.48),
    }
    with jax.enable_x64(True):
        lab = rgb_to_lab(np.array(list(published), np.float64))
    np.testing.assert_allclose(lab, list(published.values()), atol=0.01)


@pytest.mark.slow
def test_lab_and_back_and_finite_derivatives_at_black():
    rgb = jax.random.uniform(jax.random.key(0), (500, 3)).at[0].set(0).at[1].set(1)
    rgb = rgb.at[2:50].multiply(0.01)
    np.testing.assert_allclose(lab_to_rgb(rgb_to_lab(rgb)), rgb, atol=1e-4)
    chex.assert_tree_all_finite(jax.jacobian(rgb_to_lab)(jnp.zeros(3)))
    outside = lab_to_rgb(jnp.array([[50.0, 200, 0], [100, 0, 100], [0, 0, -100]]))
    assert ((outside >= 0) & (outside <= 1)).all()


def test_the_grid_holds_the_colours_of_screens():
    assert len(GRID) == 260
    assert len(np.unique(GRID, axis=0)) == 260
    np.testing.assert_array_equal(GRID % 10, 0)
    corners = rgb_to_lab(np.array(list(np.ndindex(2, 2, 2)), np.float32))[:, 1:]
    colours = rgb_to_lab(np.random.default_rng(0).uniform(size=(500, 3)).astype(np.float32))[:, 1:]
    for ab in (corners, colours):
        apart = np.abs(np.asarray(ab)[:, None] - GRID).max(-1).min(1)
        assert apart.max() < 5.5, "half of the spacing, and what 52 levels miss at the edge"
    assert np.abs(GRID).max(0).tolist() == [100, 110]
    assert 60 < len(ab_grid(spacing=20)) < 90


def test_soft_encoding_by_hand():
    target = soft_encode(jnp.array([2.0, 1.0]), SMALL, num_neighbours=3, sigma=5.0)
    weights = np.exp(-np.array([4 + 1, 64 + 1, 4 + 81]) / 50)
    np.testing.assert_allclose(target, [*weights / weights.sum(), 0], rtol=1e-5)
    with pytest.raises(UserError, match="num_neighbours is 5 of 4 colours; give 1 to 4"):
        soft_encode(jnp.array([2.0, 1.0]), SMALL)
    everywhere = soft_encode(jnp.asarray(GRID), GRID)
    np.testing.assert_allclose(everywhere.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(everywhere.argmax(-1), np.arange(len(GRID)))
    assert ((everywhere > 0).sum(-1) <= 5).all()


def test_frequencies_are_counts_of_the_nearest():
    red = np.array([1.0, 0, 0], np.float32)
    images = np.tile(red, (2, 2, 2, 1))
    images[0, 0] = 0.5
    frequencies = np.asarray(colour_frequencies(images, GRID))
    grey = np.flatnonzero((GRID == 0).all(1))[0]
    near_red = np.flatnonzero((GRID == [80, 70]).all(1))[0]
    np.testing.assert_allclose(frequencies[[grey, near_red]], [0.25, 0.75], rtol=1e-6)
    # The first picture's only square of 2 is half grey, half red; the second's is red.
    ab = np.asarray(rgb_to_lab(np.stack([red, np.full(3, 0.5, np.float32)])))[:, 1:].mean(0)
    between = np.square(GRID - ab).sum(1).argmin()
    frequencies = np.asarray(colour_frequencies(images, GRID, square=2))
    np.testing.assert_allclose(frequencies[[between, near_red]], [0.5, 0.5], rtol=1e-6)


def test_weights_by_hand():
    frequencies = jnp.array([0.5, 0.3, 0.2, 0.0])
    raw = 1 / (0.5 * np.asarray(frequencies) + 0.125)
    expected = raw / (frequencies * raw).sum()
    weights = class_weights(frequencies)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    np.testing.assert_allclose((frequencies * weights).sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(class_weights(frequencies, mixing=1), 1, rtol=1e-6)
    with pytest.raises(UserError, match="mixing is 0"):
        class_weights(frequencies, mixing=0)


def test_decoding_goes_from_the_mean_to_the_mode():
    logits = jnp.log(jnp.array([0.6, 0.3, 0.1, 1e-30]))
    np.testing.assert_allclose(annealed_mean(logits, SMALL, temperature=1.0), [3, 1], rtol=1e-5)
    np.testing.assert_allclose(annealed_mean(logits, SMALL, temperature=0.01), [0, 0], atol=1e-5)
    powers = np.array([0.6, 0.3, 0.1]) ** (1 / 0.38)
    expected = (powers / powers.sum()) @ SMALL[:3]
    np.testing.assert_allclose(annealed_mean(logits, SMALL), expected, rtol=1e-4)


@pytest.mark.parametrize("step", [1, 2])
def test_the_loss_equals_a_loop_over_pixels(step):
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(2, 4, 6, 3)).astype(np.float32)
    logits = rng.normal(size=(2, 4 // step, 6 // step, len(GRID))).astype(np.float32)
    weights = rng.uniform(size=len(GRID)).astype(np.float32)
    seen = []

    def apply(params, lightness):
        seen.append(lightness)
        return params

    loss, _ = colorization_loss(apply, GRID, jnp.asarray(weights))(
        jnp.asarray(logits), images, jax.random.key(0)
    )
    lab = np.asarray(rgb_to_lab(images))
    np.testing.assert_allclose(seen[0], lab[..., :1] / 50 - 1, atol=1e-5)
    total = 0.0
    for n, i, j in np.ndindex(*logits.shape[:3]):
        square = lab[n, step * i : step * (i + 1), step * j : step * (j + 1), 1:]
        ab = square.reshape(-1, 2).mean(0)
        distances = np.square(GRID - ab).sum(1)
        nearest = np.argsort(distances)[:5]
        shares = np.exp(-distances[nearest] / 50)
        row = logits[n, i, j].astype(np.float64)
        log_probs = row - np.logaddexp.reduce(row)
        total -= weights[nearest[0]] * (shares / shares.sum()) @ log_probs[nearest]
    np.testing.assert_allclose(loss, total / np.prod(logits.shape[:3]), rtol=1e-4)


def test_logits_of_another_shape_are_refused(ill_typed):
    images = np.zeros((2, 4, 6, 3), np.float32)
    for shape in ((2, 4, 6, 3), (2, 3, 6, len(GRID)), (2, 4, 3, len(GRID))):
        with pytest.raises(UserError, match="give \\(n, h / s, w / s"):
            colorization_loss(lambda p, x: p, GRID, jnp.ones(len(GRID)))(
                jnp.zeros(shape), images, jax.random.key(0)
            )
