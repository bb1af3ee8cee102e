"""Random changes of one picture, each a pure function of a key, on the device.

A batch is `jax.vmap` over keys and pictures. Bytes stay bytes: what is computed from them is
rounded.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from metagen_jax.types import PRNGKey

Scalar = float | Float[Array, ""]


def affine(
    image: Num[Array, "h w c"],
    *,
    rotation: Scalar = 0.0,
    shear: Scalar = 0.0,
    scale: Float[Array, "2"] | tuple[float, float] = (1.0, 1.0),
    shift: Float[Array, "2"] | tuple[float, float] = (0.0, 0.0),
    background: Scalar = 0.0,
) -> Num[Array, "h w c"]:
    """Scales, shears, turns and shifts a picture about its centre, with bilinear interpolation.

    `y(p) = x(M^-1 (p - t))`, `M = R(rotation) [[1, 0], [shear, 1]] diag(scale)`, positions `p` in
    pixels (down, across) from the centre. Differentiable in the picture and in all numbers.

    Args:
      image: `(h, w, c)`; bytes are rounded to bytes.
      rotation: counter-clockwise, in radians.
      shear: how far a row moves across for each pixel down.
      scale: factors down and across, positive.
      shift: pixels down and across.
      background: what comes in from outside the picture.

    Returns:
      `(h, w, c)`, of the dtype of `image`.
    """
    height, width, _ = image.shape
    centre = jnp.array([height - 1, width - 1]) / 2
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"))
    down, across = grid - centre[:, None, None] - jnp.asarray(shift)[:, None, None]
    cos, sin = jnp.cos(rotation), jnp.sin(rotation)
    # Down is the first axis and points downwards: (0, 1) turned by a small angle is (-sin, cos).
    down, across = cos * down + sin * across, cos * across - sin * down
    down, across = down, across - shear * down
    sources = jnp.stack([down / scale[0], across / scale[1]]) + centre[:, None, None]

    def resample(channel):
        return jax.scipy.ndimage.map_coordinates(
            channel, list(sources), order=1, mode="constant", cval=background
        )

    values = jax.vmap(resample, in_axes=-1, out_axes=-1)(image.astype(sources.dtype))
    return _as(values, image.dtype)


def random_affine(
    key: PRNGKey,
    image: Num[Array, "h w c"],
    *,
    max_rotation: float = 0.0,
    max_shear: float = 0.0,
    max_log_scale: float = 0.0,
    max_shift: float = 0.0,
    background: float = 0.0,
) -> Num[Array, "h w c"]:
    """`affine` by amounts that are uniform in `[-max, max]`, independent of one another.

    Args:
      key: a typed key.
      image: `(h, w, c)`.
      max_rotation: in radians.
      max_shear: of a row, for each pixel down.
      max_log_scale: of the logarithms of the two scales.
      max_shift: in pixels, down and across.
      background: what comes in from outside; 255 for a black drawing on white paper, in bytes.

    Returns:
      `(h, w, c)`, of the dtype of `image`.
    """
    draws = jax.random.uniform(key, (6,), minval=-1.0, maxval=1.0)
    return affine(
        image,
        rotation=max_rotation * draws[0],
        shear=max_shear * draws[1],
        scale=jnp.exp(max_log_scale * draws[2:4]),
        shift=max_shift * draws[4:6],
        background=background,
    )


def drop_pixels(
    key: PRNGKey, image: Num[Array, "h w c"], *, rate: float, background: float = 0.0
) -> Num[Array, "h w c"]:
    """Replaces each pixel, all its channels, by the background with probability `rate`.

    Args:
      key: a typed key.
      image: `(h, w, c)`.
      rate: probability.
      background: the new value; 255 for a black drawing on white paper, in bytes.

    Returns:
      `(h, w, c)`, of the dtype of `image`.
    """
    dropped = jax.random.bernoulli(key, rate, image.shape[:2])[..., None]
    return jnp.where(dropped, jnp.asarray(background, image.dtype), image)


def _as(values: Float[Array, "*shape"], dtype) -> Num[Array, "*shape"]:
    """Floats as what they stand for: rounded to integers, within their limits, if need be."""
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        values = jnp.clip(jnp.round(values), limits.min, limits.max)
    return values.astype(dtype)
