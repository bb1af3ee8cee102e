"""Strided convolutions over time: the encoder of a sound or a series, frame by frame."""

import math

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from metagen_jax.errors import UserError
from metagen_jax.nets.convolution import Conv
from metagen_jax.types import AnyArray


class StridedConv(nn.Module):
    """Frames of a sequence, each from the entries under its own window and no others.

    Layers of convolutions without padding, each normalised over the features of a frame and
    followed by a ReLU; the last is linear. A frame begins `stride` entries after the one before and
    sees `window` entries. Nothing is normalised over time, by which a frame would know of later
    ones.

    Van den Oord, Li, Vinyals 2018, section 3.1: five layers for sound of 16,000 samples a second,
    one frame each 160 samples; without their padding.

    Attributes:
      features: of every layer.
      windows: entries that each layer sees at once; published: (10, 8, 4, 4, 4).
      strides: steps of each layer; published: (5, 4, 2, 2, 2).
    """

    features: int
    windows: tuple[int, ...] = (10, 8, 4, 4)
    strides: tuple[int, ...] = (5, 4, 2, 2)

    @property
    def stride(self) -> int:
        """Entries from one frame to the next."""
        return math.prod(self.strides)

    @property
    def window(self) -> int:
        """Entries that a frame sees."""
        size, step = 1, 1
        for window, stride in zip(self.windows, self.strides, strict=True):
            size, step = size + (window - 1) * step, step * stride
        return size

    def num_frames(self, lengths: Int[AnyArray, "*shape"]) -> Int[Array, "*shape"]:
        """How many frames fit into sequences of so many entries, 0 into those that are too short.

        Of a sequence that is padded at its end they are the first ones, and the same.
        """
        return jnp.maximum((jnp.asarray(lengths) - self.window) // self.stride + 1, 0)

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*batch t c"]) -> Float[Array, "*batch frames features"]:
        """Frames `(*batch, num_frames(t), features)` of sequences `(*batch, t, c)`.

        Raises:
          UserError: a window or a stride is missing or below 1, or the sequences are shorter than a
            frame's window.
        """
        if len(self.windows) != len(self.strides) or min(*self.windows, *self.strides) < 1:
            raise UserError(
                f"windows are {self.windows} and strides {self.strides}; give one of each, 1 or "
                "more, for every layer"
            )
        x = jnp.asarray(x)
        if x.shape[-2] < self.window:
            raise UserError(
                f"the sequences have {x.shape[-2]} entries and a frame sees {self.window}; give "
                "longer ones, or smaller windows"
            )
        # As pictures of one row, for the convolution that stays fast under vmap over weights.
        x = x[..., None, :, :]
        last = len(self.windows) - 1
        for i, (window, stride) in enumerate(zip(self.windows, self.strides, strict=True)):
            conv = Conv(self.features, (1, window), (1, stride), padding="VALID", name=f"conv{i}")
            x = conv(x)
            if i < last:
                x = nn.relu(nn.LayerNorm(name=f"norm{i}")(x))
        return x[..., 0, :, :]
