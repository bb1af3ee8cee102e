"""Films of moving digits: where they are by hand and by loops, edges, what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.data.moving_digits import bounce, sample_film
from metagen_jax.errors import UserError

KEY = jax.random.key(0)
SPOT = jnp.full((1, 2, 3, 1), 255, jnp.uint8)


def place_of(frame):
    """The top left corner of what is bright."""
    rows, columns = np.nonzero(np.asarray(frame)[..., 0])
    return rows.min(), columns.min()


def test_a_way_between_walls_goes_there_and_back():
    way = jnp.arange(-3.0, 10.0)
    expected = [3, 2, 1, 0, 1, 2, 3, 4, 3, 2, 1, 0, 1]
    np.testing.assert_allclose(bounce(way, 4.0), expected)


@pytest.mark.parametrize("seed", range(3))
def test_a_digit_moves_straight_on_is_whole_and_bounces(seed):
    film = jax.jit(lambda key: sample_film(key, SPOT, num_frames=30, size=16, num_digits=1))(
        jax.random.key(seed)
    )
    assert film.shape == (30, 16, 16, 1)
    np.testing.assert_allclose(film.sum((1, 2, 3)), 6, rtol=1e-6)
    places = np.array([place_of(frame) for frame in film])
    steps = np.abs(np.diff(places, axis=0))
    assert steps.max() <= 6
    # The speed shows in every step that meets no wall: within a pixel of the most frequent one.
    for axis in (0, 1):
        assert (np.abs(steps[:, axis] - np.median(steps[:, axis])) <= 1).mean() > 0.5
    assert (places >= 0).all()
    assert (places <= (14, 13)).all()
    assert (places.max(0) > 10).any()


@pytest.mark.slow
def test_of_two_digits_the_brighter_is_seen_and_all_are_drawn():
    images = jnp.stack([jnp.full((2, 2, 1), level, jnp.uint8) for level in (51, 255)])
    films = jax.vmap(lambda key: sample_film(key, images, num_frames=5, size=6))(
        jax.random.split(KEY, 200)
    )
    levels = np.unique(np.round(np.asarray(films), 5))
    np.testing.assert_allclose(levels, [0, 0.2, 1], atol=1e-5)
    bright = (np.asarray(films[:, 0]) > 0.5).any((1, 2, 3)).mean()
    assert abs(bright - 3 / 4) < 4 * np.sqrt(3 / 16 / 200)


@pytest.mark.usefixtures("ill_typed")
def test_a_film_no_larger_than_its_pictures_is_refused():
    for settings in ({"size": 3}, {"num_frames": 0}, {"num_digits": 0}):
        options = {"num_frames": 5, "size": 9, "num_digits": 1} | settings
        with pytest.raises(UserError, match="give a film larger than its pictures"):
            sample_film(KEY, SPOT, **options)
