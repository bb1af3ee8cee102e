"""WaveNet: the distribution of each sample of a sound given those before it, all at once.

Van den Oord, Dieleman, Zen, Simonyan, Vinyals, Graves, Kalchbrenner, Senior, Kavukcuoglu: WaveNet:
A Generative Model for Raw Audio, 2016. Le Paine, Khorrami, Chang, Zhang, Ramachandran,
Hasegawa-Johnson, Huang: Fast WaveNet Generation Algorithm, 2016.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Real

from metagen_jax.errors import UserError
from metagen_jax.nets.causal import before, scale_levels
from metagen_jax.nets.pixelcnn import gate
from metagen_jax.types import AnyArray

Cache = list[Array]
"""Of one sequence: what each layer has seen last, `(as many as it looks back, channels)`, the entry
of time `i` in row `i` modulo their number."""


class DilatedLayer(nn.Module):
    """A gated layer, from the entries that its taps see to what it hands on and adds to the output.

    Attributes:
      features: channels handed from layer to layer.
      skip_features: channels added to the output.
    """

    features: int
    skip_features: int

    def setup(self):
        self.taps = nn.Dense(2 * self.features)
        self.condition = nn.Dense(2 * self.features, use_bias=False)
        self.residual = nn.Dense(self.features)
        self.skip = nn.Dense(self.skip_features)

    def __call__(
        self, seen: Float[Array, "*positions taps"], condition: Float[Array, "*#positions d"] | None
    ) -> tuple[Float[Array, "*positions f"], Float[Array, "*positions s"]]:
        inner = self.taps(seen)
        if condition is not None:
            inner += self.condition(condition)
        hidden = gate(inner)
        return seen[..., -self.features :] + self.residual(hidden), self.skip(hidden)


class WaveNet(nn.Module):
    """A WaveNet: `p(x | c) = prod_t p(x_t | x_1, ..., x_{t-1}, c)`.

    `z = tanh(W_f * x + V_f c) sigma(W_g * x + V_g c)` in each layer, `*` a convolution over the
    entries at `t, t - d, ..., t - (kernel_size - 1) d` with the layer's dilation d: equations 2 and
    3 of van den Oord et al. 2016. Each layer hands `x + W z` on, and adds another product of z to
    what the head sees. The first layer sees the `first_kernel_size` samples before as numbers; a
    recording begins after silence, which is zeros.

    Attributes:
      num_outputs: numbers for each sample: 256 for a softmax of codes, 3 for each component of a
        mixture of logistics.
      features: channels handed from layer to layer.
      skip_features: channels of the head.
      dilations: of the layers, each 1 or more.
      kernel_size: taps of a layer, 2 or more.
      first_kernel_size: samples that the first layer sees, 1 or more.
      num_levels: codes 0..num_levels-1 are scaled to -1..1.
    """

    num_outputs: int
    features: int = 32
    skip_features: int = 64
    dilations: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    kernel_size: int = 2
    first_kernel_size: int = 16
    num_levels: int = 256

    @property
    def receptive_field(self) -> int:
        """How many samples before it one can depend on."""
        return self.first_kernel_size + (self.kernel_size - 1) * sum(self.dilations)

    def setup(self):
        self._check()
        self.first = nn.Dense(self.features)
        self.layers = [DilatedLayer(self.features, self.skip_features) for _ in self.dilations]
        self.hidden = nn.Dense(self.skip_features)
        self.head = nn.Dense(self.num_outputs)

    def _check(self) -> None:
        if min(self.dilations, default=0) < 1:
            raise UserError(f"dilations is {self.dilations}; give 1 or more for each layer")
        if self.kernel_size < 2 or self.first_kernel_size < 1:
            raise UserError(
                f"kernel_size is {self.kernel_size} and first_kernel_size "
                f"{self.first_kernel_size}; give at least 2 and 1"
            )

    def __call__(
        self,
        codes: Real[AnyArray, "*batch t"],
        condition: Float[AnyArray, "*batch d"] | None = None,
    ) -> Float[Array, "*batch t outputs"]:
        """What each sample's distribution given those before it is made of.

        Args:
          codes: `(*batch, t)`, levels as they are stored.
          condition: `(*batch, d)`, such as one-hot word and speaker; always or never.

        Returns:
          `(*batch, t, num_outputs)`.

        Raises:
          UserError: for a dilation or a kernel that is too small, or fewer than two levels.
        """
        values = scale_levels(codes, self.num_levels)[..., None]
        length = values.shape[-2]
        spread = None if condition is None else jnp.asarray(condition)[..., None, :]
        reach = self.first_kernel_size
        past = before(values, axis=-2, reach=reach, current=False)
        x = self.first(_side_by_side(past, range(reach), length))
        skips = []
        for layer, dilation in zip(self.layers, self.dilations, strict=True):
            reach = (self.kernel_size - 1) * dilation
            past = before(x, axis=-2, reach=reach, current=True)
            seen = _side_by_side(past, range(0, reach + 1, dilation), length)
            x, skip = layer(seen, spread)
            skips.append(skip)
        return self._outputs(skips)

    def _outputs(self, skips: list[Float[Array, "*positions s"]]) -> Array:
        total = functools.reduce(jnp.add, skips)
        return self.head(nn.relu(self.hidden(nn.relu(total))))

    def blank_cache(self, dtype: jnp.dtype) -> Cache:
        """What `next_sample` takes for the first one: silence."""
        return [
            jnp.zeros((self.first_kernel_size, 1), dtype),
            *(
                jnp.zeros(((self.kernel_size - 1) * dilation, self.features), dtype)
                for dilation in self.dilations
            ),
        ]

    def next_sample(
        self,
        cache: Cache,
        index: Int[Array, ""],
        previous: Real[Array, ""],
        condition: Float[AnyArray, " d"] | None = None,
    ) -> tuple[Cache, Float[Array, " outputs"]]:
        """The outputs of a call for sample `index`, from what the layers have seen: Fast WaveNet.

        Args:
          cache: after the sample before, or `blank_cache`.
          index: 0, 1, 2, ... in turn.
          previous: the code at `index - 1`; for the first anything.
          condition: as in a call.

        Returns:
          The cache for the next one, and the outputs.
        """
        first, *others = cache
        value = scale_levels(previous, self.num_levels).astype(first.dtype)[None]
        first = _put(first, index - 1, jnp.where(index > 0, value, 0))
        x = self.first(jnp.concatenate(list(_last(first, index, 1))))
        condition = None if condition is None else jnp.asarray(condition)
        kept, skips = [first], []
        for layer, buffer, dilation in zip(self.layers, others, self.dilations, strict=True):
            seen = jnp.concatenate([*_last(buffer, index, dilation), x])
            kept.append(_put(buffer, index, x))
            x, skip = layer(seen, condition)
            skips.append(skip)
        return kept, self._outputs(skips)


def _side_by_side(
    past: Float[Array, "*batch longer c"], offsets: range, length: int
) -> Float[Array, "*batch t taps"]:
    """The entries at several distances beside each other, the latest last."""
    taps = [past[..., offset : offset + length, :] for offset in offsets]
    return jnp.concatenate(taps, axis=-1)


def _last(buffer: Float[Array, "n c"], index: Array, dilation: int) -> Iterator[Array]:
    """The entries of times `index - n, ..., index - 2 d, index - d`."""
    for distance in range(len(buffer), 0, -dilation):
        yield jax.lax.dynamic_index_in_dim(buffer, (index - distance) % len(buffer), keepdims=False)


def _put(buffer: Float[Array, "n c"], index: Array, entry: Float[Array, " c"]) -> Array:
    return jax.lax.dynamic_update_index_in_dim(buffer, entry, index % len(buffer), axis=0)
