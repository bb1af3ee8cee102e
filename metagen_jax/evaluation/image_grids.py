"""Pictures of many images in rows and columns: samples, reconstructions, interpolations, edits."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from metagen_jax.errors import UserError
from metagen_jax.evaluation.figures import QUIET, File, new_figure, save, write

# In inches.
_CELL, _GAP, _MARGIN, _TOP, _NOTE = 0.6, 0.04, 0.15, 0.55, 0.3
_LETTER = 0.075


def plot_image_grid(
    images: Float[np.ndarray, "rows columns h w c"],
    path: File,
    *,
    title: str,
    row_labels: Sequence[str] | None = None,
    note: str = "",
) -> None:
    """Images in rows and columns, one channel in grey.

    Args:
      images: in [0, 1], with 1 or 3 channels; what is outside is shown as the nearest.
      path: the picture to write; its suffix is the format.
      title: of the picture.
      row_labels: what each row shows, at its left.
      note: a line below.

    Raises:
      UserError: if there is not one label for each row.
    """
    rows, columns, height, width, _ = images.shape
    if row_labels is not None and len(row_labels) != rows:
        raise UserError(f"there are {len(row_labels)} row_labels for {rows} rows; give one each")
    labels = row_labels or []
    left = _MARGIN + (max(map(len, labels)) + 1) * _LETTER if labels else _MARGIN
    cell_height = _CELL * height / width
    needed = max(_LETTER * 1.4 * len(title), _LETTER * len(note)) + 2 * _MARGIN
    figure_width = max(left + columns * _CELL + _MARGIN, needed)
    figure_height = _TOP + rows * cell_height + (_NOTE if note else _MARGIN)
    figure = new_figure(figure_width, figure_height)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, figure_width), ylim=(figure_height, 0))
    axes.axis("off")
    axes.autoscale(False)
    write(axes, _MARGIN, 0.28, title, size=12, weight="bold")
    shown = np.clip(images, 0, 1)
    if shown.shape[-1] == 1:
        shown = np.repeat(shown, 3, axis=-1)
    for row in range(rows):
        top = _TOP + row * cell_height
        for column in range(columns):
            start = left + column * _CELL
            box = (start, start + _CELL - _GAP, top + cell_height - _GAP, top)
            axes.imshow(shown[row, column], extent=box, aspect="auto", interpolation="nearest")
        if labels:
            write(axes, _MARGIN, top + cell_height / 2, labels[row], color=QUIET)
    write(axes, _MARGIN, figure_height - 0.15, note, color=QUIET)
    save(figure, path)
