"""Pictures made smaller: by a filter, or still of two values."""

import numpy as np
import pytest
from PIL import Image

from metagen_jax.data import load_images
from metagen_jax.data.resampling import resize
from metagen_jax.errors import UserError


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize(("side", "size"), [(105, 28), (7, 3), (4, 4), (3, 5)])
def test_corner_takes_the_pixel_where_each_cell_begins(side, size):
    pixels = noise(side, side)
    expected = [
        [pixels[int(i * side / size), int(j * side / size)] for j in range(size)]
        for i in range(size)
    ]
    np.testing.assert_array_equal(resize(Image.fromarray(pixels), size, "corner"), expected)


@pytest.mark.parametrize("shape", [(105, 105), (9, 11, 3)])
def test_darkest_keeps_a_stroke_that_touches_a_block(shape):
    size, pixels = (26 if shape[0] > 20 else 4), noise(*shape)
    rows, columns = shape[0] // size, shape[1] // size
    expected = [
        [
            pixels[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].min((0, 1))
            for j in range(size)
        ]
        for i in range(size)
    ]
    np.testing.assert_array_equal(resize(Image.fromarray(pixels), size, "darkest"), expected)


def test_what_cannot_be_is_refused():
    picture = Image.fromarray(noise(5, 5))
    with pytest.raises(UserError, match="5x5 pixels and size is 6; give a smaller size"):
        resize(picture, 6, "darkest")


@pytest.mark.usefixtures("ill_typed")
def test_an_unknown_way_is_refused():
    with pytest.raises(UserError, match='resampling is \'area\'; give "lanczos", "corner"'):
        resize(Image.fromarray(noise(5, 5)), 3, "area")


@pytest.mark.slow
def test_omniglot_stays_black_and_white_and_caches_are_told_apart(data_dir, tmp_path):
    """The ink of the 20 test alphabets, as counted in the file of Bartunov and Vetrov."""
    places = {"data_dir": data_dir, "cache_dir": tmp_path}
    corner = load_images("omniglot", "lake/test", size=28, resampling="corner", **places).images
    assert set(np.unique(corner)) == {0, 255}
    assert (corner == 0).mean() == pytest.approx(0.08425596528444458, abs=1e-12)
    darkest = load_images("omniglot", "lake/test", size=26, resampling="darkest", **places).images
    assert set(np.unique(darkest)) == {0, 255}
    assert darkest.shape[1:] == (26, 26, 1)
    grey = load_images("omniglot", "lake/test", size=28, **places).images
    assert len(np.unique(grey)) > 100
