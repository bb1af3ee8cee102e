"""Conv4 with a context that scales and shifts its feature maps, for CAVIA."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from metagen_jax.errors import UserError
from metagen_jax.nets.conv4 import BatchNorm
from metagen_jax.nets.convolution import Conv, max_pool_2x2

MODULATED_BLOCK = 2


class FilmConv4(nn.Module):
    """`Conv4` with batch norm whose third block is modulated by context parameters.

    `h -> (1 + W c) h + V c` per channel, c the context, between the third block's normalisation
    (and pooling) and its ReLU: feature-wise linear modulation, where Zintgraf et al. 2019 put it.
    A context of zeros is exactly `Conv4`. There are no biases beside W and V, which would repeat
    the scale and bias of the normalisation.

    Attributes:
      num_outputs: outputs of the head.
      num_filters: channels of each block.
      strided: stride 2 in place of max-pooling; see `Conv4`.
    """

    num_outputs: int
    num_filters: int = 64
    strided: bool = True

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "n h w c"],
        context: Float[Array, " context"],
        num_reference: int | None = None,
    ) -> Float[Array, "n outputs"]:
        """Logits of images.

        Args:
          images: `(n, h, w, c)`, at least 16 pixels a side when max-pooled.
          context: `(num_context,)`, the same for all images.
          num_reference: take normalisation statistics from the first so many images only.

        Returns:
          `(n, num_outputs)`.

        Raises:
          UserError: for images too small for four max-pools.
        """
        height, width = images.shape[1:3]
        if not self.strided and min(height, width) < 16:
            raise UserError(
                f"images have {height}x{width} pixels; four max-pools need at least 16 a side, or "
                "give strided=True"
            )
        x = images
        for block in range(4):
            strides = (2, 2) if self.strided else (1, 1)
            x = Conv(self.num_filters, strides=strides, name=f"conv{block}")(x)
            x = BatchNorm(name=f"norm{block}")(x, num_reference)
            if not self.strided:
                x = max_pool_2x2(x)
            if block == MODULATED_BLOCK:
                modulation = nn.Dense(2 * self.num_filters, use_bias=False, name="film")(context)
                scale, shift = jnp.split(modulation, 2)
                x = (1 + scale) * x + shift
            x = nn.relu(x)
        x = x.mean((1, 2)) if self.strided else x.reshape(len(x), -1)
        return nn.Dense(self.num_outputs, name="head")(x)
