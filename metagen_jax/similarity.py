"""Directions of vectors, of which cosines are the products."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def unit_rows(x: Float[Array, "n features"]) -> Float[Array, "n features"]:
    """Rows of length 1; a row of zeros stays as it is, with a finite derivative."""
    # The direction does not depend on the scale, by which squares would overflow or vanish.
    scale = jax.lax.stop_gradient(jnp.abs(x).max(-1, keepdims=True))
    x = x / jnp.where(scale > 0, scale, 1)
    squares = jnp.square(x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1))
