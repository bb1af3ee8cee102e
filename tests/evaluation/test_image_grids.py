"""Grids of images: every image is drawn, in its place and at its brightness."""

import numpy as np
import pytest
from PIL import Image

from metagen_jax.errors import UserError
from metagen_jax.evaluation.image_grids import plot_image_grid


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labels", [None, ["original", "again"]])
def test_each_image_is_drawn_in_its_row_and_column(channels, labels, tmp_path):
    images = np.full((2, 3, 4, 4, channels), 0.2)
    images[1, 2] = 2.0  # As the brightest there is.
    images[0, 0] = -1.0
    plot_image_grid(images, tmp_path / "grid.png", title="Grid", row_labels=labels, note="Note")
    drawn = np.asarray(Image.open(tmp_path / "grid.png").convert("L"), float)
    # Cells are 0.6 inches of 150 dots apart, below a title of 0.55 inches.
    left = next(x for x in range(drawn.shape[1]) if drawn[100, x] < 5)

    def at(row, column):
        return drawn[int(150 * (0.55 + 0.6 * row + 0.28)), left + int(150 * (0.6 * column + 0.28))]

    assert at(0, 0) == 0
    assert at(1, 2) == 255
    for place in ((0, 1), (0, 2), (1, 0), (1, 1)):
        assert at(*place) == pytest.approx(51, abs=1)


def test_labels_must_be_one_for_each_row(tmp_path):
    with pytest.raises(UserError, match="1 row_labels for 2 rows"):
        plot_image_grid(
            np.zeros((2, 3, 4, 4, 1)), tmp_path / "grid.png", title="Grid", row_labels=["one"]
        )
