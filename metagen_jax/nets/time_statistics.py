"""One vector of a sequence, whatever its length."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from metagen_jax.types import AnyArray


def time_statistics(
    frames: Float[AnyArray, "n t f"], valid: Bool[AnyArray, "n t"]
) -> Float[Array, "n three_f"]:
    """Mean, deviation and maximum over time of each feature of the frames that there are.

    Args:
      frames: `(n, t, f)`.
      valid: `(n, t)`, which frames there are; the others count nowhere. A sequence without any
        gives zeros.

    Returns:
      `(n, 3 f)`.
    """
    frames, there = jnp.asarray(frames), jnp.asarray(valid)[..., None]
    count = jnp.maximum(there.sum(1), 1)
    mean = jnp.where(there, frames, 0).sum(1) / count
    squares = jnp.where(there, jnp.square(frames - mean[:, None]), 0).sum(1)
    # The root of zero, of one frame, has no derivative.
    deviation = jnp.sqrt(squares / count + 1e-12)
    largest = jnp.where(there, frames, -jnp.inf).max(1)
    any_there = there.any(1)
    parts = (jnp.where(any_there, part, 0) for part in (mean, deviation, largest))
    return jnp.concatenate(list(parts), axis=-1)
