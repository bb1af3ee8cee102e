"""What PixelCNN and PixelRNN have in common: levels as numbers, and what comes before a pixel."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real

from metagen_jax.errors import UserError
from metagen_jax.types import AnyArray


def scale_levels(
    images: Real[AnyArray, "*shape"] | Bool[AnyArray, "*shape"], num_levels: int
) -> Float[Array, "*shape"]:
    """Levels 0..num_levels-1 as numbers from -1 to 1: `2 v / (num_levels - 1) - 1`.

    Raises:
      UserError: for fewer than two levels.
    """
    if num_levels < 2:
        raise UserError(f"num_levels is {num_levels}; give 2 or more, 256 for 8 bits")
    images = jnp.asarray(images)
    return 2 * images.astype(jnp.result_type(images, float)) / (num_levels - 1) - 1


def before(
    x: Float[Array, "*shape"], *, axis: int, reach: int, current: bool
) -> Float[Array, "*longer"]:
    """What comes before each entry along an axis, `reach` of them and zeros before the first.

    A "VALID" convolution over it with a window of `reach`, or of `reach + 1` where an entry may see
    itself (`current`), gives one output an entry, which depends on no later one: a masked
    convolution without the products that its mask sets to zero.
    """
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (reach, 0 if current else -1, 0)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)
