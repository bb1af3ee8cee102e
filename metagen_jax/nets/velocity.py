"""Velocity fields of ONE example, for `metagen_jax.generative.flow_matching`.

Their `apply(params, x, t, condition)` is the velocity.
"""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from metagen_jax.errors import UserError
from metagen_jax.nets.convolution import Conv
from metagen_jax.nets.mlp import MLP
from metagen_jax.types import AnyArray

_NUM_GROUPS = 8


def time_embedding(
    t: Float[AnyArray, ""] | float, *, num_features: int, max_frequency: float = 100.0
) -> Float[Array, " features"]:
    """`(sin(w_i t), cos(w_i t))`, frequencies w_i in geometric progression from 1 to the largest.

    The positional encoding of Vaswani et al. 2017, for a time in [0, 1].

    Args:
      t: the time.
      num_features: an even number, 4 or more.
      max_frequency: in radians a unit of time.

    Raises:
      UserError: if `num_features` is odd or less than 4.
    """
    if num_features < 4 or num_features % 2:
        raise UserError(f"num_features is {num_features}; give an even number of 4 or more")
    t = jnp.asarray(t)
    steps = jnp.arange(num_features // 2, dtype=t.dtype) / (num_features // 2 - 1)
    angles = t * jnp.exp(math.log(max_frequency) * steps)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


class VelocityMLP(nn.Module):
    """A multilayer perceptron of x, the embedded time and, if there is one, the condition.

    Attributes:
      hidden_sizes: units of each hidden layer.
      num_time_features: of the `time_embedding`.
      activation: smooth, as the trace of the velocity's Jacobian, and its gradient, need it.
    """

    hidden_sizes: Sequence[int] = (128, 128, 128)
    num_time_features: int = 32
    activation: Callable[[Array], Array] = nn.swish

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, " d"],
        t: Float[AnyArray, ""] | float,
        condition: Float[AnyArray, " condition"] | None = None,
    ) -> Float[Array, " d"]:
        """The velocity at `x (d,)` and time t; it starts at zero everywhere."""
        inputs = [jnp.asarray(x), time_embedding(t, num_features=self.num_time_features)]
        if condition is not None:
            inputs.append(jnp.asarray(condition))
        features = MLP(self.hidden_sizes, None, activation=self.activation, name="body")(
            jnp.concatenate(inputs)
        )
        return nn.Dense(x.shape[0], kernel_init=nn.initializers.zeros, name="head")(features)


class VelocityUNet(nn.Module):
    """A small U-Net: residual blocks at three resolutions down and up, told the time in each.

    A block is norm, swish, convolution, scale and shift by the time and the condition, norm, swish,
    convolution, and what came in (as in Dhariwal and Nichol 2021). Each resolution has one on the
    way down and one on the way up, which also sees what the former gave; the middle has one more.
    Strided convolutions halve, repetition enlarges.

    Attributes:
      num_filters: channels at the full resolution, a multiple of 8; twice as many below.
      num_time_features: of the `time_embedding`, and units of the layer above it.
    """

    num_filters: int = 32
    num_time_features: int = 64

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, "h w c"],
        t: Float[AnyArray, ""] | float,
        condition: Float[AnyArray, " condition"] | None = None,
    ) -> Float[Array, "h w c"]:
        """The velocity at an image `(h, w, c)` of any size and time t; it starts at zero.

        Raises:
          UserError: if the groups of the normalisation don't divide `num_filters`.
        """
        if self.num_filters % _NUM_GROUPS:
            raise UserError(
                f"num_filters is {self.num_filters}; give a multiple of {_NUM_GROUPS}, which the "
                "groups of the normalisation divide"
            )
        inputs = [time_embedding(t, num_features=self.num_time_features)]
        if condition is not None:
            inputs.append(jnp.asarray(condition))
        told = nn.swish(nn.Dense(self.num_time_features, name="told")(jnp.concatenate(inputs)))
        filters = [self.num_filters, 2 * self.num_filters, 2 * self.num_filters]
        h = Conv(filters[0], name="first")(jnp.asarray(x)[None])
        skips = []
        for level, num in enumerate(filters):
            if level:
                h = Conv(num, strides=(2, 2), name=f"halve{level}")(h)
            h = _Block(num, name=f"down{level}")(h, told)
            skips.append(h)
        h = _Block(filters[-1], name="middle")(h, told)
        for level, num in reversed(list(enumerate(filters))):
            skip = skips[level]
            if h.shape != skip.shape:
                h = h.repeat(2, axis=1).repeat(2, axis=2)[:, : skip.shape[1], : skip.shape[2]]
            h = _Block(num, name=f"up{level}")(jnp.concatenate([h, skip], axis=-1), told)
        h = nn.swish(nn.GroupNorm(_NUM_GROUPS, name="norm")(h))
        kernel = self.param("head", nn.initializers.zeros, (h.shape[-1], x.shape[-1]))
        return (h @ kernel)[0]


class _Block(nn.Module):
    num_filters: int

    @nn.compact
    def __call__(self, x: Float[Array, "1 h w c"], told: Float[Array, " told"]):
        h = Conv(self.num_filters, name="conv0")(nn.swish(nn.GroupNorm(_NUM_GROUPS)(x)))
        scale, shift = jnp.split(nn.Dense(2 * self.num_filters, name="film")(told), 2)
        h = nn.GroupNorm(_NUM_GROUPS)(h) * (1 + scale) + shift
        h = Conv(self.num_filters, name="conv1")(nn.swish(h))
        if x.shape[-1] != self.num_filters:
            x = nn.Dense(self.num_filters, use_bias=False, name="shortcut")(x)
        return x + h
