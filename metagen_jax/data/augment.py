"""Random changes of one picture, each a pure function of a key, on the device.

A batch is `jax.vmap` over keys and pictures. Bytes stay bytes: what is computed from them is
rounded. Changes of colour are in `metagen_jax.data.colour_augment`. dm-pix is not used: it lacks
half of these, and what it has is a few lines each here, exact for bytes.

DeVries, Taylor: Improved Regularization of Convolutional Neural Networks with Cutout, 2017.
Simard, Steinkraus, Platt: Best Practices for Convolutional Neural Networks Applied to Visual
Document Analysis, 2003.
Szegedy et al.: Going Deeper with Convolutions, 2015.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from metagen_jax.errors import UserError
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
    return _resample(image, sources, background)


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


def random_resized_crop(
    key: PRNGKey,
    image: Num[Array, "h w c"],
    *,
    min_area: float = 0.08,
    max_log_aspect: float = 0.2876820724517809,
    size: int | None = None,
) -> Num[Array, "h2 w2 c"]:
    """A box of random size, shape and place, as large as the picture.

    The share `a` of the area is uniform in `[min_area, 1]`, the logarithm of `r`, height by width,
    uniform in `[-max_log_aspect, max_log_aspect]`; sides of `sqrt(a r)` and `sqrt(a / r)`, at most
    1, of the picture's; the place is uniform among all inside it, fractions of pixels included.
    Section 6 of Szegedy et al. 2015, who draw again where a side is longer than the picture.
    Bilinear interpolation.

    Args:
      key: a typed key.
      image: `(h, w, c)`.
      min_area: of the box, as a share.
      max_log_aspect: by default `ln(4 / 3)`.
      size: height and width of what comes out, in pixels; None for those of the picture.

    Returns:
      `(h, w, c)` or `(size, size, c)`, of the dtype of `image`.

    Raises:
      UserError: for a `min_area` that is not in (0, 1].
    """
    if not 0 < min_area <= 1:
        raise UserError(f"min_area is {min_area}; give more than 0 and at most 1")
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    area = jax.random.uniform(area_key, minval=min_area, maxval=1.0)
    half_log = jax.random.uniform(aspect_key, minval=-max_log_aspect, maxval=max_log_aspect) / 2
    sides = jnp.sqrt(area) * jnp.exp(jnp.stack([half_log, -half_log]))
    sides = jnp.minimum(sides, 1) * jnp.array(image.shape[:2])
    corner = jax.random.uniform(place_key, (2,)) * (jnp.array(image.shape[:2]) - sides)
    return resized_crop(image, corner=corner, sides=sides, size=size)


def resized_crop(
    image: Num[Array, "h w c"],
    *,
    corner: Float[Array, "2"] | tuple[float, float],
    sides: Float[Array, "2"] | tuple[float, float],
    size: int | None = None,
) -> Num[Array, "h2 w2 c"]:
    """A box of the picture, as large as the picture, with bilinear interpolation.

    Args:
      image: `(h, w, c)`.
      corner: upper and left edge of the box, in pixels from the picture's.
      sides: its height and width in pixels, at most those of the picture.
      size: height and width of what comes out, in pixels; None for those of the picture.

    Returns:
      `(h, w, c)` or `(size, size, c)`, of the dtype of `image`.
    """
    shape = image.shape[:2] if size is None else (size, size)
    scale = jnp.array(shape) / jnp.asarray(sides)
    values = jax.image.scale_and_translate(
        image.astype(scale.dtype),
        (*shape, image.shape[2]),
        (0, 1),
        scale,
        -jnp.asarray(corner) * scale,
        method="linear",
    )
    return _as(values, image.dtype)


def random_flip(key: PRNGKey, image: Num[Array, "h w c"]) -> Num[Array, "h w c"]:
    """Swaps left and right in every second picture."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def cutout(
    key: PRNGKey, image: Num[Array, "h w c"], *, size: int, background: float = 0.0
) -> Num[Array, "h w c"]:
    """Covers a square, whose centre is any pixel, so that parts of it may lie outside.

    DeVries and Taylor 2017, section 3.2.

    Args:
      key: a typed key.
      image: `(h, w, c)`.
      size: side of the square, in pixels.
      background: what covers it; 255 for a black drawing on white paper, in bytes.

    Returns:
      `(h, w, c)`, of the dtype of `image`.
    """
    first = jax.random.randint(key, (2,), 0, jnp.array(image.shape[:2])) - size // 2
    rows, columns = (
        (jnp.arange(length) >= start) & (jnp.arange(length) < start + size)
        for length, start in zip(image.shape[:2], first, strict=True)
    )
    covered = (rows[:, None] & columns)[..., None]
    return jnp.where(covered, jnp.asarray(background, image.dtype), image)


def elastic(
    key: PRNGKey,
    image: Num[Array, "h w c"],
    *,
    displacement: float,
    smoothness: float,
    background: float = 0.0,
) -> Num[Array, "h w c"]:
    """Moves every pixel a little, neighbours alike, as a hand that draws the same again does.

    `y(p) = x(p + u(p))`, both components of `u` white noise, smoothed by a Gaussian. Section 2 of
    Simard et al. 2003, here with a scale that does not depend on the smoothness.

    Args:
      key: a typed key.
      image: `(h, w, c)`.
      displacement: standard deviation of each component of `u`, in pixels.
      smoothness: standard deviation of the Gaussian, in pixels.
      background: what comes in from outside the picture.

    Returns:
      `(h, w, c)`, of the dtype of `image`.
    """
    height, width, _ = image.shape
    noise = jax.random.normal(key, (height, width, 2))
    down, across = (_gaussian_weights(length, smoothness) for length in (height, width))
    # The root of the sum of squared weights is the deviation that is left of one.
    down, across = (w / jnp.linalg.norm(w, axis=1, keepdims=True) for w in (down, across))
    moves = displacement * _separable(noise, down, across)
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"))
    return _resample(image, grid + jnp.moveaxis(moves, -1, 0), background)


def blur(image: Num[Array, "h w c"], *, sigma: Scalar) -> Num[Array, "h w c"]:
    """The mean of each pixel's surroundings, weighted by a Gaussian, cut at the picture's edges.

    `y_p = sum_q w(p - q) x_q / sum_q w(p - q)`, `w(d) = exp(-|d|^2 / (2 sigma^2))`, q the pixels of
    the picture.

    Args:
      image: `(h, w, c)`.
      sigma: in pixels, positive.

    Returns:
      `(h, w, c)`, of the dtype of `image`.
    """
    height, width, _ = image.shape
    weights = _gaussian_weights(height, sigma), _gaussian_weights(width, sigma)
    return _as(_separable(image.astype(weights[0].dtype), *weights), image.dtype)


def random_blur(
    key: PRNGKey,
    image: Num[Array, "h w c"],
    *,
    min_sigma: float = 0.1,
    max_sigma: float = 2.0,
    probability: float = 0.5,
) -> Num[Array, "h w c"]:
    """`blur` with a probability, by a sigma that is uniform between two; defaults of SimCLR.

    Args:
      key: a typed key.
      image: `(h, w, c)`.
      min_sigma: in pixels.
      max_sigma: in pixels; published for pictures of 224 pixels, so that 2 is much for 32.
      probability: that the picture is blurred at all.

    Returns:
      `(h, w, c)`, of the dtype of `image`.
    """
    sigma_key, chosen_key = jax.random.split(key)
    sigma = jax.random.uniform(sigma_key, minval=min_sigma, maxval=max_sigma)
    chosen = jax.random.bernoulli(chosen_key, probability)
    return jnp.where(chosen, blur(image, sigma=sigma), image)


def _resample(
    image: Num[Array, "h w c"], sources: Float[Array, "2 h w"], background: Scalar
) -> Num[Array, "h w c"]:
    """The picture at other positions, in pixels, bilinear."""

    def resample(channel):
        return jax.scipy.ndimage.map_coordinates(
            channel, list(sources), order=1, mode="constant", cval=background
        )

    values = jax.vmap(resample, in_axes=-1, out_axes=-1)(image.astype(sources.dtype))
    return _as(values, image.dtype)


def _gaussian_weights(length: int, sigma: Scalar) -> Float[Array, "{length} {length}"]:
    """What each pixel of a line takes of each; rows sum to one."""
    apart = jnp.arange(length)[:, None] - jnp.arange(length)
    return jax.nn.softmax(-jnp.square(apart / sigma) / 2, axis=1)


def _separable(
    image: Float[Array, "h w c"], down: Float[Array, "h h"], across: Float[Array, "w w"]
) -> Float[Array, "h w c"]:
    return jnp.einsum("hi,wj,ijc->hwc", down, across, image, precision="highest")


def _as(values: Float[Array, "*shape"], dtype) -> Num[Array, "*shape"]:
    """Floats as what they stand for: rounded to integers, within their limits, if need be."""
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        values = jnp.clip(jnp.round(values), limits.min, limits.max)
    return values.astype(dtype)
