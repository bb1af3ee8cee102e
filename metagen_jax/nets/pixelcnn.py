"""The gated PixelCNN: the distribution of each pixel given those before it, all at once.

Van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves, Kavukcuoglu: Conditional Image Generation
with PixelCNN Decoders, 2016.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Real

from metagen_jax.errors import UserError
from metagen_jax.nets.causal import before, scale_levels
from metagen_jax.nets.convolution import Conv
from metagen_jax.types import AnyArray


class GatedLayer(nn.Module):
    """One layer of both stacks: figure 2 of van den Oord et al. 2016.

    The vertical stack sees rows above, the horizontal one the pixels to the left in the row and
    what the vertical one tells it: together all that is before a pixel, with no blind spot. A
    layer is two functions, so that a sampler may call them one row and one pixel at a time.

    Attributes:
      features: channels of each stack.
      kernel_size: of the whole kernel, odd; half of it is before a pixel.
      first: whether inputs are pixels, of which the current one must not be seen. Otherwise they
        are a layer's outputs, which have not seen it.
    """

    features: int
    kernel_size: int
    first: bool

    def setup(self):
        self.reach = self.kernel_size // 2
        window = self.reach + (not self.first)
        self.vertical = Conv(2 * self.features, (window, self.kernel_size), padding="VALID")
        self.horizontal = Conv(2 * self.features, (1, window), padding="VALID")
        self.vertical_condition = nn.Dense(2 * self.features, use_bias=False)
        self.horizontal_condition = nn.Dense(2 * self.features, use_bias=False)
        self.link = nn.Dense(2 * self.features, use_bias=False)
        self.residual = nn.Dense(self.features)
        self.skip = nn.Dense(self.features)

    def look_up(
        self,
        rows: Float[Array, "*batch seen w c"],
        condition: Float[Array, "*batch #h #w d"] | None,
    ) -> tuple[Float[Array, "*batch h w f"], Float[Array, "*batch h w g"]]:
        """The vertical stack's rows, and what they tell the horizontal one.

        Args:
          rows: its inputs, with as many rows before those asked as the kernel reaches up.
          condition: a vector of each pixel asked, or of all in a row or image; or None.
        """
        sides = [(0, 0)] * (rows.ndim - 2) + [(self.reach, self.reach), (0, 0)]
        inner = self.vertical(jnp.pad(rows, sides))
        if condition is not None:
            inner += self.vertical_condition(condition)
        told = self.link(inner)
        if condition is not None:
            told += self.horizontal_condition(condition)
        return gate(inner), told

    def look_left(
        self, pixels: Float[Array, "*batch h seen c"], told: Float[Array, "*batch h w g"]
    ) -> tuple[Float[Array, "*batch h w f"], Float[Array, "*batch h w f"]]:
        """The horizontal stack's pixels, and what the layer adds to the net's output.

        Args:
          pixels: its inputs, with as many pixels before those asked as the kernel reaches left.
          told: by the vertical stack.
        """
        outputs = self.residual(gate(self.horizontal(pixels) + told))
        if not self.first:
            outputs += pixels[..., self.reach :, :]
        return outputs, self.skip(outputs)


class PixelCNN(nn.Module):
    """A gated PixelCNN: `p(x) = prod_i p(x_i | x_1, ..., x_{i-1})` over pixels, row by row.

    `y = tanh(W_f * x + V_f c) sigma(W_g * x + V_g c)` in each layer and stack, with a condition c:
    equation 4 of van den Oord et al. 2016; or, of each pixel, their equation 5. Each layer of the
    horizontal stack adds to the one before and, through a matrix of its own, to what the head sees.

    The mask is over pixels alone: outputs don't see any channel of their own pixel. Several
    channels are either independent given the pixels before, or depend on one another through the
    likelihood, such as `discretized_logistic_mixture_rgb_log_prob`'s.

    Attributes:
      num_outputs: numbers for each pixel: 1 for Bernoulli logits, 256 for a softmax of levels, 3
        for each component of a mixture of logistics, 10 for each of one over RGB.
      features: channels of each stack.
      num_layers: 1 or more. A pixel sees `first_kernel_size // 2` pixels each way in the first
        layer and `kernel_size // 2` more in each other.
      num_levels: levels 0..num_levels-1 are scaled to -1..1.
      first_kernel_size, kernel_size: of the first and of the other layers, odd.
    """

    num_outputs: int
    features: int = 32
    num_layers: int = 7
    num_levels: int = 2
    first_kernel_size: int = 7
    kernel_size: int = 3

    def setup(self):
        self._check()
        self.layers = [
            GatedLayer(self.features, size, first=i == 0)
            for i, size in enumerate(self._kernel_sizes())
        ]
        self.hidden = nn.Dense(2 * self.features)
        self.head = nn.Dense(self.num_outputs)

    def _kernel_sizes(self) -> list[int]:
        return [self.first_kernel_size, *[self.kernel_size] * (self.num_layers - 1)]

    def _check(self) -> None:
        if self.num_layers < 1:
            raise UserError(f"num_layers is {self.num_layers}; give 1 or more")
        if any(size < 3 or size % 2 == 0 for size in (self.first_kernel_size, self.kernel_size)):
            raise UserError(
                f"first_kernel_size is {self.first_kernel_size} and kernel_size "
                f"{self.kernel_size}; give odd numbers from 3"
            )

    def __call__(
        self,
        images: Real[AnyArray, "*batch h w c"] | Bool[AnyArray, "*batch h w c"],
        condition: Float[AnyArray, "*batch d"] | Float[AnyArray, "*batch h w d"] | None = None,
    ) -> Float[Array, "*batch h w outputs"]:
        """What each pixel's distribution given those before it is made of.

        Args:
          images: `(*batch, h, w, c)`, levels as they are stored.
          condition: `(*batch, d)`, such as a one-hot class, or `(*batch, h, w, d)`, a vector for
            each pixel, such as its place; always or never.

        Returns:
          `(*batch, h, w, num_outputs)`.

        Raises:
          UserError: for no layers, kernels of even size or less than 3, fewer than two levels, or a
            condition of another batch than the images.
        """
        vertical = horizontal = scale_levels(images, self.num_levels)
        if condition is not None:
            condition = jnp.asarray(condition)
            if condition.shape[:-1] == vertical.shape[:-3]:
                condition = condition[..., None, None, :]
            elif condition.shape[:-1] != vertical.shape[:-1]:
                raise UserError(
                    f"condition has shape {condition.shape} for images of shape {vertical.shape}; "
                    "give (*batch, d), or (*batch, h, w, d) for a vector of each pixel"
                )
        skips = []
        for layer in self.layers:
            seen = {"reach": layer.kernel_size // 2, "current": not layer.first}
            vertical, told = layer.look_up(before(vertical, axis=-3, **seen), condition)
            horizontal, skip = layer.look_left(before(horizontal, axis=-2, **seen), told)
            skips.append(skip)
        return self.outputs(skips)

    def outputs(
        self, skips: list[Float[Array, "*positions f"]]
    ) -> Float[Array, "*positions outputs"]:
        """The head: what all layers add up to, through a hidden layer."""
        total = functools.reduce(jnp.add, skips)
        return self.head(nn.relu(self.hidden(nn.relu(total))))

    def blank_rows(self, width: int, channels: int, dtype: jnp.dtype) -> list[Array]:
        """What `next_row` takes for the first row: zeros, which stand outside of the image."""
        inputs = [channels, *[self.features] * (self.num_layers - 1)]
        return [
            jnp.zeros((size // 2, width, num_inputs), dtype)
            for size, num_inputs in zip(self._kernel_sizes(), inputs, strict=True)
        ]

    def next_row(
        self, above: list[Array], condition: Float[Array, "#w d"] | None
    ) -> tuple[list[Array], list[Float[Array, "w g"]]]:
        """The vertical stack's next row, for one image.

        Args:
          above: for each layer its inputs in the rows above, as many as its kernel reaches.
          condition: of each pixel of the row, or one of all; or None.

        Returns:
          The inputs in this row `(1, w, features)` of all layers but the first, whose inputs are
          the pixels; and what each layer tells the horizontal stack, `(w, 2 * features)`.
        """
        rows, told = [], []
        condition = None if condition is None else condition[None]
        for layer, seen in zip(self.layers, above, strict=True):
            row, for_pixels = layer.look_up(jnp.concatenate([seen, *rows[-1:]]), condition)
            rows.append(row)
            told.append(for_pixels[0])
        return rows[:-1], told

    def next_pixel(
        self, left: list[Array], told: list[Float[Array, " g"]]
    ) -> tuple[list[Array], Float[Array, " outputs"]]:
        """The horizontal stack's next pixel, for one image.

        Args:
          left: for each layer its inputs at the pixels to the left, as many as its kernel reaches.
          told: to each layer by the vertical stack, at this pixel.

        Returns:
          The inputs at this pixel `(1, features)` of all layers but the first, and the outputs.
        """
        pixels, skips = [], []
        for layer, seen, from_above in zip(self.layers, left, told, strict=True):
            seen = jnp.concatenate([seen, *pixels[-1:]])
            pixel, skip = layer.look_left(seen[None], from_above[None, None])
            pixels.append(pixel[0])
            skips.append(skip[0, 0])
        return pixels[:-1], self.outputs(skips)


def gate(x: Float[Array, "*positions g"]) -> Float[Array, "*positions f"]:
    """`tanh(a) sigma(b)` of the two halves of the channels."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.tanh(a) * jax.nn.sigmoid(b)
