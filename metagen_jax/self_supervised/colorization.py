"""Colour prediction: what colours a grey picture has, as classes of a grid of colours.

    grid = ab_grid()
    weights = class_weights(colour_frequencies(images, grid), mixing=0.5)
    loss_fn = colorization_loss(apply, grid, weights)
    ab = annealed_mean(apply(params, lightness), grid, temperature=0.38)

Colours are those of CIELAB, whose distances are near to those that are seen: lightness `L` from 0
to 100, `a` from green to red and `b` from blue to yellow, each about -110 to 110.

Zhang, Isola, Efros: Colorful Image Colorization, 2016.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from metagen_jax.errors import UserError
from metagen_jax.types import AnyArray, Batch, LossFn, Metrics, Params

Apply = Callable[[Params, Array], Any]
"""`apply(params, lightness (n, h, w, 1)) -> logits (n, h, w, colours)`."""

# sRGB (IEC 61966-2-1) under D65: to CIE XYZ, and the white that divides it.
_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
_WHITE = _TO_XYZ.sum(1)
_DELTA = 6 / 29


def rgb_to_lab(rgb: Float[AnyArray, "*shape 3"]) -> Float[Array, "*shape 3"]:
    """CIELAB of sRGB from 0 to 1.

    `L = 116 f(Y) - 16`, `a = 500 (f(X) - f(Y))`, `b = 200 (f(Y) - f(Z))`, X, Y, Z of linear light,
    as shares of white, and f the cube root, continued by a line below (6/29)^3.
    """
    rgb = jnp.asarray(rgb)
    linear = jnp.where(
        rgb <= 0.04045, rgb / 12.92, ((jnp.maximum(rgb, 0.04045) + 0.055) / 1.055) ** 2.4
    )
    matrix = jnp.asarray((_TO_XYZ / _WHITE[:, None]).T, rgb.dtype)
    xyz = jnp.matmul(linear, matrix, precision="highest")
    root = jnp.cbrt(jnp.maximum(xyz, _DELTA**3))
    f = jnp.where(xyz > _DELTA**3, root, xyz / (3 * _DELTA**2) + 4 / 29)
    x, y, z = jnp.moveaxis(f, -1, 0)
    return jnp.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def lab_to_rgb(lab: Float[AnyArray, "*shape 3"]) -> Float[Array, "*shape 3"]:
    """The inverse of `rgb_to_lab`, cut to 0..1 where no screen has the colour."""
    lightness, a, b = jnp.moveaxis(jnp.asarray(lab), -1, 0)
    y = (lightness + 16) / 116
    f = jnp.stack([y + a / 500, y, y - b / 200], axis=-1)
    xyz = jnp.where(f > _DELTA, f**3, 3 * _DELTA**2 * (f - 4 / 29))
    inverse = jnp.asarray((np.linalg.inv(_TO_XYZ) * _WHITE).T, f.dtype)
    linear = jnp.matmul(xyz, inverse, precision="highest")
    curved = 1.055 * jnp.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055
    return jnp.clip(jnp.where(linear <= 0.0031308, 12.92 * linear, curved), 0, 1)


def ab_grid(*, spacing: float = 10.0) -> Float[np.ndarray, "colours 2"]:
    """The points `(a, b)` of a square grid that are the nearest to some colour of sRGB.

    Section 2.1 of Zhang et al. 2016, who count 313 at a spacing of 10; sRGB under D65 has 260.

    Args:
      spacing: of the grid.
    """
    levels = np.arange(0, 256, 5, dtype=np.float32) / 255
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    ab = np.asarray(rgb_to_lab(colours))[:, 1:]
    return (spacing * np.unique(np.round(ab / spacing), axis=0)).astype(np.float32)


def soft_encode(
    ab: Float[Array, "*shape 2"],
    grid: Float[AnyArray, "colours 2"],
    *,
    num_neighbours: int = 5,
    sigma: float = 5.0,
) -> Float[Array, "*shape colours"]:
    """A colour as probabilities of the nearest colours of the grid, by a Gaussian of the distance.

    Section 2.1 of Zhang et al. 2016.

    Args:
      ab: `(..., 2)`.
      grid: from `ab_grid`.
      num_neighbours: of the colours that get any.
      sigma: of the Gaussian.

    Raises:
      UserError: there are fewer colours than neighbours.
    """
    shares, indices = _nearest_colours(ab, grid, num_neighbours, sigma)
    nothing = jnp.zeros((*shares.shape[:-1], len(grid)), shares.dtype)
    return jnp.put_along_axis(nothing, indices, shares, axis=-1, inplace=False)


def _nearest_colours(
    ab: Float[Array, "*shape 2"],
    grid: Float[AnyArray, "colours 2"],
    num_neighbours: int = 5,
    sigma: float = 5.0,
) -> tuple[Float[Array, "*shape {num_neighbours}"], Int[Array, "*shape {num_neighbours}"]]:
    """The probabilities of the nearest colours, the nearest first, and which these are."""
    if not 1 <= num_neighbours <= len(grid):
        raise UserError(
            f"num_neighbours is {num_neighbours} of {len(grid)} colours; give 1 to {len(grid)}"
        )
    distances = jnp.square(ab[..., None, :] - jnp.asarray(grid)).sum(-1)
    nearest, indices = jax.lax.top_k(-distances, num_neighbours)
    return jax.nn.softmax(nearest / (2 * sigma**2), axis=-1), indices


def colour_frequencies(
    images: Float[AnyArray, "n h w 3"], grid: Float[AnyArray, "colours 2"], *, square: int = 1
) -> Float[Array, " colours"]:
    """How often each colour of the grid is the nearest one.

    Args:
      images: `(n, h, w, 3)`, from 0 to 1.
      grid: from `ab_grid`.
      square: side of the squares whose mean colours are counted, in pixels; as large as those of
        the logits to be weighted.
    """

    def count(image: Array) -> Array:
        ab = _mean_ab(rgb_to_lab(image), square).reshape(-1, 2)
        nearest = jnp.square(ab[:, None] - jnp.asarray(grid)).sum(-1).argmin(-1)
        return jnp.zeros(len(grid)).at[nearest].add(1)

    counts = jax.lax.map(count, jnp.asarray(images)).sum(0)
    return counts / counts.sum()


def class_weights(
    frequencies: Float[Array, " colours"], *, mixing: float = 0.5
) -> Float[Array, " colours"]:
    """Weights by which rare colours count more: `w ~ 1 / ((1 - m) p + m / Q)`, `sum p w = 1`.

    Equation 4 of Zhang et al. 2016, who smooth p over the grid before.

    Args:
      frequencies: p, of all Q colours.
      mixing: m, of p with the uniform distribution; 1 gives all colours the weight 1.

    Raises:
      UserError: for a mixing that is not in (0, 1].
    """
    if not 0 < mixing <= 1:
        raise UserError(f"mixing is {mixing}; give more than 0 and at most 1")
    weights = 1 / ((1 - mixing) * frequencies + mixing / len(frequencies))
    return weights / (frequencies * weights).sum()


def annealed_mean(
    logits: Float[Array, "*shape colours"],
    grid: Float[AnyArray, "colours 2"],
    *,
    temperature: float = 0.38,
) -> Float[Array, "*shape 2"]:
    """The mean colour under `softmax(logits / T)`: equation 5 of Zhang et al. 2016.

    Args:
      logits: of the colours.
      grid: from `ab_grid`.
      temperature: T; 1 gives the mean, which is dull, towards 0 the likeliest colour.
    """
    shares = jax.nn.softmax(logits / temperature, axis=-1)
    return jnp.matmul(shares, jnp.asarray(grid, shares.dtype), precision="highest")


def colorization_loss(
    apply: Apply, grid: Float[AnyArray, "colours 2"], weights: Float[Array, " colours"]
) -> LossFn:
    """The mean over pixels of `-w(q*) sum_q z_q log softmax(logits)_q`, in nats.

    `z` is `soft_encode` of the pixel's colour and `q*` its likeliest class: equations 2 and 3 of
    Zhang et al. 2016.

    Args:
      apply: predicts colours from lightness, scaled from -1 to 1; at the images' size or, where it
        gives `(n, h / s, w / s, colours)`, for means over squares of `s` pixels.
      grid: from `ab_grid`.
      weights: from `class_weights`; ones count all alike.

    Returns:
      A loss over batches of images `(n, h, w, 3)` from 0 to 1. It raises a UserError for logits of
      another shape.
    """

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        del key
        lab = rgb_to_lab(batch)
        logits = apply(params, lab[..., :1] / 50 - 1)
        step = lab.shape[1] // max(1, logits.shape[1])
        rows, columns = lab.shape[1] // step, lab.shape[2] // step
        if logits.shape != (len(lab), rows, columns, len(grid)) or lab.shape[1:3] != (
            step * rows,
            step * columns,
        ):
            raise UserError(
                f"logits have shape {logits.shape} for images of shape {batch.shape}; give "
                f"(n, h / s, w / s, {len(grid)}) for an s that divides both"
            )
        shares, indices = _nearest_colours(_mean_ab(lab, step), grid)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), indices, axis=-1)
        losses = -(shares * log_probs).sum(-1)
        return (jnp.asarray(weights)[indices[..., 0]] * losses).mean(), {}

    return loss_fn


def _mean_ab(lab: Float[Array, "*n h w 3"], square: int) -> Float[Array, "*n rows columns 2"]:
    """Mean `a` and `b` of squares beside each other."""
    *num, height, width, _ = lab.shape
    rows, columns = height // square, width // square
    return lab[..., 1:].reshape(*num, rows, square, columns, square, 2).mean((-4, -2))
