"""A transformer over the patches of a picture, some of them hidden: the masked autoencoder's net.

He, Chen, Xie, Li, Dollar, Girshick: Masked Autoencoders Are Scalable Vision Learners, 2022.
Dosovitskiy et al.: An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale,
2021.
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from metagen_jax.errors import UserError
from metagen_jax.nets.convolution import extract_patches
from metagen_jax.types import AnyArray


def to_patches(
    images: Float[AnyArray, "n h w c"], patch_size: int
) -> Float[Array, "n patches values"]:
    """Pictures as squares beside each other, in the order of reading.

    Args:
      images: `(n, h, w, c)`.
      patch_size: side of a patch, in pixels.

    Returns:
      `(n, patches, patch_size * patch_size * c)`.

    Raises:
      UserError: if the patches don't fill the picture.
    """
    num, height, width, _ = images.shape
    if height % patch_size or width % patch_size:
        raise UserError(
            f"patches of {patch_size} pixels don't fill a picture of {height}x{width}; give a "
            "patch_size that divides both"
        )
    size = (patch_size, patch_size)
    patches = extract_patches(jnp.asarray(images), size, size, "VALID")
    return patches.reshape(num, -1, patches.shape[-1])


def from_patches(
    patches: Float[Array, "n patches values"], shape: tuple[int, int, int]
) -> Float[Array, "n h w c"]:
    """The pictures `(h, w, c)` that `to_patches` has cut."""
    height, width, channels = shape
    size = round((patches.shape[-1] / channels) ** 0.5)
    grid = patches.reshape(-1, height // size, width // size, size, size, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


def sine_positions(rows: int, columns: int, num_features: int) -> Float[np.ndarray, "patches f"]:
    """Sines and cosines of the row, then of the column, of each patch, in the order of reading.

    A quarter of the features each; wavelengths from 2 pi to 2 pi 10000, geometrically.
    """
    if num_features % 4:
        raise UserError(f"the width is {num_features}; give a multiple of 4")
    rates = 10000.0 ** -(np.arange(num_features // 4) / (num_features // 4))
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = [np.outer(place, rates) for place in (row, column)]
    parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


class TransformerBlock(nn.Module):
    """Attention, then two dense layers, each normalised before and added to what came in.

    Attributes:
      num_heads: of the attention.
      expansion: hidden units of the dense layers, in widths.
    """

    num_heads: int
    expansion: int = 4

    @nn.compact
    def __call__(self, x: Float[Array, "n tokens width"]) -> Float[Array, "n tokens width"]:
        width = x.shape[-1]
        normed = nn.LayerNorm(name="attention_norm")(x)
        x = x + nn.MultiHeadDotProductAttention(self.num_heads, name="attention")(normed)
        y = nn.Dense(self.expansion * width, name="dense0")(nn.LayerNorm(name="dense_norm")(x))
        return x + nn.Dense(width, name="dense1")(nn.gelu(y))


class PatchTransformer(nn.Module):
    """An encoder of the patches that are shown, and a lighter decoder that draws all of them.

    Attributes:
      image_shape: height, width and channels.
      patch_size: side of a patch, in pixels; divides height and width.
      width: features of a token, a multiple of 4 and of the heads.
      depth: blocks of the encoder.
      num_heads: of every attention.
      decoder_width: features of a token in the decoder, likewise.
      decoder_depth: blocks of the decoder.
    """

    image_shape: tuple[int, int, int]
    patch_size: int = 4
    width: int = 128
    depth: int = 4
    num_heads: int = 4
    decoder_width: int = 64
    decoder_depth: int = 1

    def setup(self):
        height, width, channels = self.image_shape
        self.grid = height // self.patch_size, width // self.patch_size
        self.embed = nn.Dense(self.width)
        self.encoder = [TransformerBlock(self.num_heads) for _ in range(self.depth)]
        self.encoder_norm = nn.LayerNorm()
        self.to_decoder = nn.Dense(self.decoder_width)
        self.unseen = self.param(
            "unseen", nn.initializers.normal(0.02), (self.decoder_width,), jnp.float32
        )
        self.decoder = [TransformerBlock(self.num_heads) for _ in range(self.decoder_depth)]
        self.decoder_norm = nn.LayerNorm()
        self.draw = nn.Dense(self.patch_size**2 * channels)

    def __call__(
        self, images: Float[AnyArray, "n h w c"], shown: Int[Array, "n shown"]
    ) -> Float[Array, "n patches values"]:
        """All patches, drawn from those that are shown.

        Args:
          images: `(n, *image_shape)`.
          shown: `(n, shown)`, which patches of each image are seen, all different.

        Returns:
          `(n, patches, patch_size * patch_size * c)`; `from_patches` makes pictures of them.
        """
        tokens = self.to_decoder(self.encode(images, shown))
        num_patches = self.grid[0] * self.grid[1]
        x = jnp.broadcast_to(self.unseen, (len(tokens), num_patches, self.decoder_width))
        x = x.at[jnp.arange(len(tokens))[:, None], shown].set(tokens)
        x = x + sine_positions(*self.grid, self.decoder_width)
        for block in self.decoder:
            x = block(x)
        return self.draw(self.decoder_norm(x))

    def encode(
        self, images: Float[AnyArray, "n h w c"], shown: Int[Array, "n shown"]
    ) -> Float[Array, "n shown width"]:
        """A token for each patch that is shown, from these patches alone."""
        patches = to_patches(images, self.patch_size)
        seen = jnp.take_along_axis(patches, shown[..., None], axis=1)
        x = self.embed(seen) + jnp.asarray(sine_positions(*self.grid, self.width))[shown]
        for block in self.encoder:
            x = block(x)
        return self.encoder_norm(x)

    def features(self, images: Float[AnyArray, "n h w c"]) -> Float[Array, "n width"]:
        """The mean token of whole images."""
        everything = jnp.arange(self.grid[0] * self.grid[1])
        return self.encode(images, jnp.tile(everything, (len(images), 1))).mean(1)
