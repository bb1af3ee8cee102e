"""Printed letters as an Omniglot-like set that needs no download.

The twelve DejaVu faces inside matplotlib have 1511 letters in common: Latin, Greek, Cyrillic,
Armenian, Georgian and phonetic ones. A class is a letter, an example a face with a little affine
jitter. Letters of one shape in any face (Latin A, Greek Alpha, Cyrillic A) are one class, which
leaves 1338; all accented forms of a letter are in the same split (`splits/README.md`).
"""

import math
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from metagen_jax.errors import UserError

if TYPE_CHECKING:
    from PIL import Image, ImageFont

FACES = (
    "DejaVuSans",
    "DejaVuSerif-Italic",
    "DejaVuSansMono-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSerif",
    "DejaVuSansMono-Oblique",
    "DejaVuSans-Bold",
    "DejaVuSerif-BoldItalic",
    "DejaVuSansMono",
    "DejaVuSans-Oblique",
    "DejaVuSerif-Bold",
    "DejaVuSansMono-BoldOblique",
)
EXAMPLES_PER_CLASS = 20

# Lengths are fractions of the picture's side.
_EM = 5 / 7
_MARGIN = 1 / 28
# Twice to jitter without jagged edges, and twice again for the drawing that is jittered.
_OVERSAMPLING = 2
_MAX_ROTATION = math.radians(10)
_MAX_LOG_SCALE = 0.1
_MAX_SHEAR = 0.15
_MAX_SHIFT = 1.5 / 28


def render_glyphs(
    class_names: Sequence[str],
    *,
    size: int = 28,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> UInt8[np.ndarray, "classes 20 {size} {size} 1"]:
    """Draws every letter 20 times: example `i` is face `i % 12` under a jitter of its own.

    Letters have one type size and are centred by their ink, then turned by up to 10 degrees, scaled
    by up to 10 %, sheared by up to 0.15, shifted by up to 1.5 / 28 of the side; the few that would
    touch an edge are shrunk. Ink is 0 and paper 255, as in Omniglot.

    Args:
      class_names: Unicode names, such as "GREEK SMALL LETTER BETA".
      size: side of the pictures in pixels.
      seed: of the jitter. The pictures depend on it and on the versions of Pillow and matplotlib.
      progress: called with (letters done, letters in all).

    Raises:
      ModuleNotFoundError: matplotlib, which carries the faces, is not installed.
      UserError: it is installed without them.
    """
    import matplotlib
    from PIL import Image, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    if absent := [face for face in FACES if not (folder / f"{face}.ttf").is_file()]:
        raise UserError(f"no font {absent[0]}.ttf in {folder}; install matplotlib from PyPI")
    em = round(size * _EM * _OVERSAMPLING**2)
    # Basic layout, as Pillow's other engine is not in every build and may space letters otherwise.
    fonts = [
        ImageFont.truetype(folder / f"{face}.ttf", em, layout_engine=ImageFont.Layout.BASIC)
        for face in FACES
    ]
    # RandomState, as its numbers are frozen; those of NumPy's newer generators may change.
    jitter = np.random.RandomState(seed).uniform(-1, 1, (len(class_names), EXAMPLES_PER_CLASS, 5))
    images = np.empty((len(class_names), EXAMPLES_PER_CLASS, size, size, 1), np.uint8)
    faces = np.arange(EXAMPLES_PER_CLASS) % len(FACES)
    side = size * _OVERSAMPLING
    for index, name in enumerate(class_names):
        letters = [draw_letter(unicodedata.lookup(name), font) for font in fonts]
        sizes = np.array([letter.size for letter in letters], float)[faces]
        matrices = _affine(jitter[index], sizes, _OVERSAMPLING, side)
        for example, (face, matrix) in enumerate(zip(faces, matrices, strict=True)):
            ink = letters[face].transform(
                (side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
            )
            images[index, example, :, :, 0] = np.asarray(ink.reduce(_OVERSAMPLING))
        if progress is not None:
            progress(index + 1, len(class_names))
    return 255 - images


def draw_letter(letter: str, font: "ImageFont.FreeTypeFont") -> "Image.Image":
    """A letter's ink, 255 on 0, with a pixel of paper around it."""
    from PIL import Image, ImageDraw, ImageOps

    left, top, right, bottom = map(round, font.getbbox(letter))
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), letter, fill=255, font=font)
    return ImageOps.expand(image.crop(image.getbbox()), 1)


def _affine(
    jitter: Float[np.ndarray, "n 5"], ink: Float[np.ndarray, "n 2"], scale: int, side: int
) -> list[tuple[float, ...]]:
    """Pillow's six numbers (from pixels of the result to pixels of the letter) of each example."""
    angle = _MAX_ROTATION * jitter[:, 0]
    grow = np.exp(_MAX_LOG_SCALE * jitter[:, 1]) / scale
    shear = _MAX_SHEAR * jitter[:, 2]
    cos, sin = grow * np.cos(angle), grow * np.sin(angle)
    forward = np.stack([cos, cos * shear - sin, sin, sin * shear + cos], -1).reshape(-1, 2, 2)
    extent = np.einsum("nij,nj->ni", np.abs(forward), ink)
    room = side * (1 - 2 * _MARGIN)
    shrink = np.minimum(1, room / extent.max(-1, keepdims=True))
    shift = jitter[:, 3:] * np.minimum((room - shrink * extent) / 2, _MAX_SHIFT * side)
    inverse = np.linalg.inv(forward * shrink[..., None])
    offset = ink / 2 - np.einsum("nij,nj->ni", inverse, side / 2 + shift)
    return [tuple(row) for row in np.concatenate([inverse, offset[..., None]], -1).reshape(-1, 6)]
