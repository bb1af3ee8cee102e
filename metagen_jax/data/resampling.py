"""How pictures are made smaller: grey by a filter, or still of two values, as strokes are.

Drawings of 105 pixels a side become pictures of 28 or 26 in more than one way, and likelihoods
differ with it: a filter's grey edges have to be made binary afterwards, where "corner" and
"darkest" leave black and white as they are.
"""

from typing import TYPE_CHECKING, Literal

import numpy as np

from metagen_jax.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

Resampling = Literal["lanczos", "corner", "darkest"]
"""See `resize`."""


def resize(picture: "Image.Image", size: int, how: Resampling = "lanczos") -> np.ndarray:
    """A picture of `size` pixels a side.

    Args:
      picture: of any mode.
      size: height and width of the result.
      how: "lanczos" is Pillow's filter. "corner" takes the pixel in the upper left corner of each
        cell, `picture[floor(i h / size), floor(j w / size)]`: so were made the pictures of
        Omniglot on which Bartunov and Vetrov 2018 (Generative Matching Networks) report, whose
        file this reproduces bit by bit. "darkest" takes the lowest value of each block of
        `h // size` by `w // size` pixels, what is left over at the right and below being dropped:
        of Omniglot's 105 pixels, blocks of 4 for a size of 26.

    Raises:
      UserError: "darkest" of a picture smaller than `size`, or an unknown way.
    """
    from PIL import Image

    if how == "lanczos":
        return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS))
    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    if how == "corner":
        steps = np.arange(size)
        return pixels[np.ix_(steps * height // size, steps * width // size)]
    if how != "darkest":
        raise UserError(f'resampling is {how!r}; give "lanczos", "corner" or "darkest"')
    block = height // size, width // size
    if 0 in block:
        raise UserError(
            f"a picture has {height}x{width} pixels and size is {size}; give a smaller size, as "
            '"darkest" makes pictures only smaller, or resampling="lanczos"'
        )
    kept = pixels[: size * block[0], : size * block[1]]
    return kept.reshape(size, block[0], size, block[1], *pixels.shape[2:]).min((1, 3))
