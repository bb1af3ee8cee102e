"""A net that summarises a grid of features row by row, from the top."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from metagen_jax.nets.causal import before
from metagen_jax.nets.convolution import Conv


class RowContext(nn.Module):
    """Residual convolutions of which each sees its own row and the one above, three columns wide.

    A stand-in for the PixelCNN of contrastive predictive coding on images: what a context sees is
    its own row and `num_layers` rows above, and never a row below.

    Attributes:
      features: of a context.
      num_layers: 1 or more.
    """

    features: int
    num_layers: int = 3

    @nn.compact
    def __call__(self, grid: Float[Array, "n rows columns f"]) -> Float[Array, "n rows columns c"]:
        """Contexts `(n, rows, columns, features)`."""
        x = nn.Dense(self.features, name="embed")(grid)
        for layer in range(self.num_layers):
            seen = before(nn.relu(x), axis=1, reach=1, current=True)
            seen = jnp.pad(seen, ((0, 0), (0, 0), (1, 1), (0, 0)))
            x = x + Conv(self.features, (2, 3), padding="VALID", name=f"conv{layer}")(seen)
        return x
