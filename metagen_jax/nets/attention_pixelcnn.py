"""A gated PixelCNN of an image given others of its class, at which it looks while it draws.

Reed, Chen, Paine, van den Oord, Eslami, Rezende, Vinyals, de Freitas: Few-shot Autoregressive
Density Estimation: Towards Learning to Learn Distributions, 2018.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Real

from metagen_jax.errors import UserError
from metagen_jax.nets.causal import before, scale_levels
from metagen_jax.nets.convolution import Conv
from metagen_jax.nets.pixelcnn import GatedLayer
from metagen_jax.types import AnyArray


class Memory(NamedTuple):
    """What is kept of the images of a set, of each by itself.

    Attributes:
      maps: features of every pixel and its surroundings.
      keys: by which cells of `stride` by `stride` pixels are found.
      values: what is read there.
    """

    maps: Float[Array, "s h w f"]
    keys: Float[Array, "s cells k"]
    values: Float[Array, "s cells f"]


class AttentionPixelCNN(nn.Module):
    """`p(x | D) = prod_i p(x_i | x_1, ..., x_{i-1}, D)` over the pixels of one image, row by row.

    The set reaches every pixel in two ways, and both add to what the vertical stack tells the
    horizontal one. *Aligned*: the mean over the set of features of the same place, convolved once
    more. *By attention*, in some layers: what is drawn so far around the pixel, and where it is,
    are compared with all cells of all images, `softmax(q k / sqrt(k)) v`, as in section 3.1 of Reed
    et al. 2018, so that a stroke that stands elsewhere is found too. A learned pseudo-image is
    always in the mean, and a learned key with a value of zero in the softmax, so that the set may
    be empty (Bartunov and Vetrov 2018); the order of the set does not matter.

    Attributes:
      shape: height, width and channels of an image.
      num_outputs: numbers for each pixel; see `PixelCNN`.
      features: channels of each stack and of the memory.
      num_layers: 2 or more.
      attention_layers: those that read by attention, from 1: the first sees raw pixels.
      num_keys: numbers by which pixels and cells are compared.
      stride: side of a cell.
      num_levels: levels 0..num_levels-1 are scaled to -1..1.
      first_kernel_size, kernel_size: as in `PixelCNN`.
    """

    shape: tuple[int, int, int]
    num_outputs: int = 1
    features: int = 24
    num_layers: int = 6
    attention_layers: tuple[int, ...] = (2, 4)
    num_keys: int = 16
    stride: int = 4
    num_levels: int = 2
    first_kernel_size: int = 7
    kernel_size: int = 3

    def setup(self):
        if not all(1 <= layer < self.num_layers for layer in self.attention_layers):
            raise UserError(
                f"attention_layers is {self.attention_layers} of {self.num_layers} layers; give "
                f"numbers from 1 to {self.num_layers - 1}"
            )
        height, width, _ = self.shape
        sizes = [self.first_kernel_size, *[self.kernel_size] * (self.num_layers - 1)]
        self.layers = [
            GatedLayer(self.features, size, first=i == 0) for i, size in enumerate(sizes)
        ]
        # Of the set.
        self.stem = [Conv(self.features, (5, 5)), Conv(self.features, (3, 3))]
        window, stride = (self.stride + 1, self.stride + 1), (self.stride, self.stride)
        self.cells = Conv(self.features, window, strides=stride)
        self.key, self.value = nn.Dense(self.num_keys), nn.Dense(self.features)
        normal, num_cells = nn.initializers.normal(1.0), math.prod(self._grid())
        self.cell_places = self.param("cell_places", normal, (num_cells, self.num_keys))
        zeros = nn.initializers.zeros_init()
        self.pseudo = self.param("pseudo", zeros, (height, width, self.features))
        # Of what the image reads.
        self.align = Conv(self.features, (3, 3))
        self.aligned = [nn.Dense(2 * self.features, use_bias=False) for _ in self.layers]
        self.queries = [nn.Dense(self.num_keys) for _ in self.attention_layers]
        places = (height * width, self.num_keys)
        self.pixel_places = self.param("pixel_places", normal, places)
        self.nothing = self.param("nothing", zeros, (self.num_keys,))
        self.read = [nn.Dense(2 * self.features, use_bias=False) for _ in self.attention_layers]
        self.hidden = nn.Dense(2 * self.features)
        self.head = nn.Dense(self.num_outputs)

    def _grid(self) -> tuple[int, int]:
        return -(-self.shape[0] // self.stride), -(-self.shape[1] // self.stride)

    def encode(self, images: Real[AnyArray, "s h w c"]) -> Memory:
        """What there is to see in each image of a set, by itself; of an empty one, nothing.

        Args:
          images: `(s, h, w, c)`, levels as they are stored.
        """
        x = scale_levels(images, self.num_levels)
        for conv in self.stem:
            x = nn.elu(conv(x))
        cells = nn.elu(self.cells(x)).reshape(len(x), math.prod(self._grid()), self.features)
        return Memory(x, self.key(cells) + self.cell_places, self.value(cells))

    def __call__(
        self, image: Real[AnyArray, "h w c"], memory: Memory, present: Bool[AnyArray, " s"]
    ) -> Float[Array, "h w outputs"]:
        """What each pixel's distribution given those before it and the set is made of.

        Args:
          image: ONE image, levels as they are stored.
          memory: of the set, from `encode`.
          present: which of its images are given.

        Returns:
          `(h, w, num_outputs)`.

        Raises:
          UserError: for an `attention_layers` without sense; otherwise as `PixelCNN`.
        """
        present = jnp.asarray(present)
        context = self._aligned_context(memory, present)
        vertical = horizontal = scale_levels(image, self.num_levels)
        skips = []
        for i, layer in enumerate(self.layers):
            seen = {"reach": layer.kernel_size // 2, "current": not layer.first}
            vertical, told = layer.look_up(before(vertical, axis=-3, **seen), None)
            told += self.aligned[i](context)
            if i in self.attention_layers:
                told += self._attend(self.attention_layers.index(i), horizontal, memory, present)
            horizontal, skip = layer.look_left(before(horizontal, axis=-2, **seen), told)
            skips.append(skip)
        total = functools.reduce(jnp.add, skips)
        return self.head(nn.relu(self.hidden(nn.relu(total))))

    def _aligned_context(self, memory: Memory, present: Array) -> Float[Array, "h w f"]:
        weight = present.astype(memory.maps.dtype)
        mean = (self.pseudo + jnp.tensordot(weight, memory.maps, 1)) / (1 + weight.sum())
        return nn.elu(self.align(mean))

    def _attend(
        self, index: int, horizontal: Float[Array, "h w f"], memory: Memory, present: Array
    ) -> Float[Array, "h w g"]:
        """What every pixel reads in the set; its query depends on no pixel from it on."""
        height, width, _ = horizontal.shape
        queries = self.queries[index](horizontal).reshape(height * width, -1) + self.pixel_places
        queries /= math.sqrt(self.num_keys)
        logits = queries @ memory.keys.reshape(-1, self.num_keys).T
        visible = jnp.repeat(present, memory.keys.shape[1])
        logits = jnp.where(visible, logits, -jnp.inf)
        logits = jnp.concatenate([logits, (queries @ self.nothing)[:, None]], axis=1)
        weights = jax.nn.softmax(logits)[:, :-1]
        values = weights @ memory.values.reshape(-1, self.features)
        return self.read[index](values).reshape(height, width, -1)
