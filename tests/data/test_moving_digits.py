"""Films: pictures that stay whole, move by the speed, bounce, and start everywhere."""

import functools

import jax
import numpy as np
import pytest

from metagen_jax.data.moving_digits import sample_moving_digits
from metagen_jax.errors import UserError

SIZES = {"num_frames": 40, "size": 12, "speed": 1.5}
PICTURES = np.array([[[3, 1], [0, 2], [0, 5]]], np.float32)


@functools.cache
def films():
    """200 films of one picture of 3x2 pixels."""
    sample = functools.partial(sample_moving_digits, pictures=PICTURES, num_digits=1, **SIZES)
    keys = jax.random.split(jax.random.key(0), 200)
    return np.asarray(jax.jit(jax.vmap(sample))(keys))[..., 0]


def corners():
    """Where the 3 of the picture is, `(films, frames, 2)`."""
    places = np.argwhere(films() == 3)
    assert len(places) == 200 * 40
    return places[:, 2:].reshape(200, 40, 2)


def test_the_picture_is_whole_in_every_frame():
    for film, path in zip(films()[:20], corners()[:20], strict=True):
        for frame, (y, x) in zip(film, path, strict=True):
            np.testing.assert_array_equal(frame[y : y + 3, x : x + 2], PICTURES[0])
            assert frame.sum() == PICTURES.sum()


def test_it_goes_straight_by_the_speed_and_bounces_off_all_edges():
    path = corners()
    assert path.min((0, 1)).tolist() == [0, 0]
    assert path.max((0, 1)).tolist() == [9, 10]
    steps = np.abs(np.diff(path, axis=1))
    assert steps.max() <= 2
    # Two pixels from every edge it is not turned back on the way to the next frame.
    inside = ((path >= 2) & (path <= [7, 8])).all(-1)
    straight = [
        np.linalg.norm(film[i + 3] - film[i]) / 3
        for film, within in zip(path, inside, strict=True)
        for i in range(36)
        if within[i : i + 4].all()
    ]
    assert len(straight) > 50
    np.testing.assert_allclose(straight, 1.5, atol=0.48)
    assert abs(np.mean(straight) - 1.5) < 0.05


def test_it_starts_anywhere():
    """Rounded, so that the edges have half of the share of the others."""
    counts = np.bincount(corners()[:, 0, 1], minlength=11)
    shares = np.array([0.5, *[1] * 9, 0.5]) / 10
    statistic = (np.square(counts - 200 * shares) / (200 * shares)).sum()
    assert statistic < 10 + 5 * np.sqrt(20)


def test_of_several_pictures_the_lighter_is_seen():
    """Two squares of one size, of which the lighter is always whole."""
    pictures = np.stack([np.full((8, 8), 1.0), np.full((8, 8), 2.0)]).astype(np.float32)
    sample = functools.partial(sample_moving_digits, pictures=pictures, num_digits=2, **SIZES)
    frames = np.asarray(jax.vmap(sample)(jax.random.split(jax.random.key(0), 20)))
    frames = frames.reshape(-1, 12, 12)
    counts = np.stack([(frames == level).sum((1, 2)) for level in (1, 2)], 1)
    of_both = frames[(counts > 0).all(1)]
    assert len(of_both) > 100
    assert ((of_both == 2).sum((1, 2)) == 64).all()


def test_pictures_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="pictures have 3x12 pixels and frames 12; give less"):
        sample_moving_digits(jax.random.key(0), np.zeros((1, 3, 12), np.float32), **SIZES)
