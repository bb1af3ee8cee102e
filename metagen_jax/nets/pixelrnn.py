"""PixelRNN: the distribution of each pixel given those before it, by LSTMs that run over an image.

Van den Oord, Kalchbrenner, Kavukcuoglu: Pixel Recurrent Neural Networks, 2016.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Real

from metagen_jax.errors import UserError
from metagen_jax.nets.causal import before, scale_levels
from metagen_jax.nets.convolution import Conv
from metagen_jax.types import AnyArray

Recurrence = Literal["row", "diagonal"]


class RowLSTM(nn.Module):
    """An LSTM over rows, all pixels of a row at once: section 3.1 of van den Oord et al. 2016.

    `o, f, i, g = sigma, sigma, sigma, tanh(K_ss * h_{r-1} + K_is * x_r)`,
    `c_r = f c_{r-1} + i g`, `h_r = o tanh(c_r)` (equation 3), with convolutions along the row, of
    which K_is sees no pixel to the right. A state depends on a triangle of pixels above, which each
    row widens by half a kernel.

    Attributes:
      features: of the state.
      kernel_size: of both convolutions, odd.
    """

    features: int
    kernel_size: int = 3

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w c"], condition: Float[Array, "*batch d"] | None = None
    ) -> Float[Array, "*batch h w f"]:
        """States `(*batch, h, w, features)` of inputs that have not seen their pixel."""
        reach = self.kernel_size // 2
        to_gates = Conv(4 * self.features, (1, reach + 1), padding="VALID", name="input_to_state")
        gates = to_gates(before(x, axis=-2, reach=reach, current=True))
        gates = _conditioned(gates, condition)
        shape = (self.kernel_size, self.features, 4 * self.features)
        kernel = self.param("state_to_state", nn.initializers.lecun_normal(), shape, jnp.float32)
        kernel = kernel.reshape(-1, 4 * self.features)
        padding = [(0, 0)] * (x.ndim - 3) + [(reach, reach), (0, 0)]

        def step(state: tuple[Array, Array], gates: Array):
            hidden, cell = state
            width = hidden.shape[-2]
            padded = jnp.pad(hidden, padding)
            shifted = [padded[..., i : i + width, :] for i in range(self.kernel_size)]
            hidden, cell = lstm_step(gates + jnp.concatenate(shifted, axis=-1) @ kernel, cell)
            return (hidden, cell), hidden

        rows = jnp.moveaxis(gates, -3, 0)
        zero = jnp.zeros_like(rows[0, ..., : self.features])
        _, hidden = jax.lax.scan(step, (zero, zero), rows)
        return jnp.moveaxis(hidden, 0, -3)


class DiagonalBiLSTM(nn.Module):
    """Two LSTMs over diagonals, which together see all that is before a pixel.

    Section 3.2 of van den Oord et al. 2016: the states of a diagonal depend on those of the one
    before, at the pixel above and at the one to the left. The other LSTM sees the image mirrored;
    its states count one row further down, so that they tell nothing of pixels to the right.

    Attributes:
      features: of each direction's state.
    """

    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w c"], condition: Float[Array, "*batch d"] | None = None
    ) -> Float[Array, "*batch h w f"]:
        """The sum of both directions' states, `(*batch, h, w, features)`."""
        size = 4 * self.features
        gates = _conditioned(nn.Dense(2 * size, name="input_to_state")(x), condition)
        # Zero gates outside of the image, from zero states: the states there stay zero.
        rightward, leftward = skew(gates[..., :size]), skew(gates[..., ::-1, size:])
        shape = (2, 2 * self.features, size)
        init = nn.initializers.lecun_normal(batch_axis=0)
        kernels = self.param("state_to_state", init, shape, jnp.float32)

        def step(states: list[tuple[Array, Array]], diagonal: list[Array]):
            new = []
            for (hidden, cell), gates, kernel in zip(states, diagonal, kernels, strict=True):
                above = before(hidden, axis=-2, reach=1, current=False)
                neighbours = jnp.concatenate([above, hidden], axis=-1)
                new.append(lstm_step(gates + neighbours @ kernel, cell))
            return new, [hidden for hidden, _ in new]

        diagonals = [jnp.moveaxis(gates, -2, 0) for gates in (rightward, leftward)]
        zero = jnp.zeros_like(diagonals[0][0, ..., : self.features])
        _, hidden = jax.lax.scan(step, [(zero, zero), (zero, zero)], diagonals)
        rightward, leftward = (unskew(jnp.moveaxis(h, 0, -2)) for h in hidden)
        return rightward + before(leftward[..., ::-1, :], axis=-3, reach=1, current=False)


class PixelRNN(nn.Module):
    """A PixelRNN: `p(x) = prod_i p(x_i | x_1, ..., x_{i-1})` over pixels, row by row.

    A convolution over the pixels before, layers of LSTMs with residual connections, each upsampled
    to twice its state's features, and two linear layers behind ReLUs: table 1 of van den Oord et
    al. 2016. As in `PixelCNN` the mask is over pixels alone, not over a pixel's channels.

    Attributes:
      num_outputs: numbers for each pixel, as of `PixelCNN`.
      recurrence: "row" for the Row LSTM, faster, which misses pixels far to the right in the rows
        above; "diagonal" for the Diagonal BiLSTM, which sees all that is before a pixel.
      features: of the states, half of those between layers.
      num_layers: of LSTMs, 1 or more.
      num_levels: levels 0..num_levels-1 are scaled to -1..1.
      first_kernel_size: of the convolution, odd.
    """

    num_outputs: int
    recurrence: Recurrence
    features: int = 16
    num_layers: int = 7
    num_levels: int = 2
    first_kernel_size: int = 7

    @nn.compact
    def __call__(
        self,
        images: Real[AnyArray, "*batch h w c"] | Bool[AnyArray, "*batch h w c"],
        condition: Float[AnyArray, "*batch d"] | None = None,
    ) -> Float[Array, "*batch h w outputs"]:
        """What each pixel's distribution given those before it is made of.

        Args:
          images: `(*batch, h, w, c)`, levels as they are stored.
          condition: `(*batch, d)`, such as a one-hot class, added to all gates; always or never.

        Returns:
          `(*batch, h, w, num_outputs)`.

        Raises:
          UserError: for an unknown recurrence, no layers, a convolution of even size or less than
            3, or fewer than two levels.
        """
        self._check()
        layer = RowLSTM if self.recurrence == "row" else DiagonalBiLSTM
        condition = None if condition is None else jnp.asarray(condition)
        pixels = scale_levels(images, self.num_levels)
        width = pixels.shape[-2]
        if self.recurrence == "diagonal":
            # A place behind each row, where its last pixel has been seen: the mirrored LSTM, a row
            # further down, hears of that pixel nowhere else.
            pixels = jnp.pad(pixels, [(0, 0)] * (pixels.ndim - 2) + [(0, 1), (0, 0)])
        x = self._see_pixels_before(pixels)
        for i in range(self.num_layers):
            states = layer(self.features, name=f"lstm{i}")(x, condition)
            x += nn.Dense(2 * self.features, name=f"upsample{i}")(states)
        x = nn.Dense(2 * self.features, name="hidden")(nn.relu(x[..., :width, :]))
        return nn.Dense(self.num_outputs, name="head")(nn.relu(x))

    def _check(self) -> None:
        if self.recurrence not in get_args(Recurrence):
            raise UserError(f'recurrence is {self.recurrence!r}; give "row" or "diagonal"')
        if self.num_layers < 1:
            raise UserError(f"num_layers is {self.num_layers}; give 1 or more")
        if self.first_kernel_size < 3 or self.first_kernel_size % 2 == 0:
            raise UserError(
                f"first_kernel_size is {self.first_kernel_size}; give an odd number from 3"
            )

    def _see_pixels_before(self, pixels: Array) -> Array:
        """The first convolution, of kernel mask A, as one over rows above and one to the left."""
        size, reach = self.first_kernel_size, self.first_kernel_size // 2
        sides = [(0, 0)] * (pixels.ndim - 2) + [(reach, reach), (0, 0)]
        above = before(jnp.pad(pixels, sides), axis=-3, reach=reach, current=False)
        left = before(pixels, axis=-2, reach=reach, current=False)
        features = 2 * self.features
        from_above = Conv(features, (reach, size), padding="VALID", name="above")(above)
        return from_above + Conv(
            features, (1, reach), padding="VALID", use_bias=False, name="left"
        )(left)


def _conditioned(gates: Array, condition: Array | None) -> Array:
    """Gates moved by a linear map of the condition, the same for all pixels."""
    if condition is None:
        return gates
    move = nn.Dense(gates.shape[-1], use_bias=False, name="condition")(condition)
    return gates + move[..., None, None, :]


def lstm_step(
    gates: Float[Array, "*positions g"], cell: Float[Array, "*positions f"]
) -> tuple[Float[Array, "*positions f"], Float[Array, "*positions f"]]:
    """The next state and cell, of gates in the order output, forget, input, content."""
    output, forget, let_in, content = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(let_in) * jnp.tanh(content)
    return jax.nn.sigmoid(output) * jnp.tanh(cell), cell


def skew(x: Float[Array, "*batch h w c"]) -> Float[Array, "*batch h diagonals c"]:
    """Moves row `r` by `r` to the right, so that diagonals are columns; zeros elsewhere.

    Pixel `(r, j)` gets to column `r + j` of `h + w - 1`.
    """
    *batch, height, width, channels = x.shape
    padding = [(0, 0)] * (x.ndim - 2) + [(0, height), (0, 0)]
    # Rows of h + w, read as rows of one less, lag by one more each.
    flat = jnp.pad(x, padding).reshape(*batch, -1, channels)
    flat = flat[..., : height * (height + width - 1), :]
    return flat.reshape(*batch, height, height + width - 1, channels)


def unskew(x: Float[Array, "*batch h diagonals c"]) -> Float[Array, "*batch h w c"]:
    """The inverse of `skew`."""
    *batch, height, diagonals, channels = x.shape
    padding = [(0, 0)] * (x.ndim - 3) + [(0, height), (0, 0)]
    flat = jnp.pad(x.reshape(*batch, height * diagonals, channels), padding)
    rows = flat.reshape(*batch, height, diagonals + 1, channels)
    return rows[..., : diagonals + 1 - height, :]
