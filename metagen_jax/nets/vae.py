"""Encoders and decoders of variational autoencoders, for ONE example each.

Standard deviations stay between `e^-7` and `e^7`, so that no step of training can overflow them.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from metagen_jax.nets.convolution import Conv
from metagen_jax.nets.mlp import MLP
from metagen_jax.types import AnyArray, PRNGKey

_MAX_LOG_STD = 7.0


class Gaussian(NamedTuple):
    """A diagonal Gaussian."""

    mean: Float[Array, " latents"]
    log_std: Float[Array, " latents"]


class Level(NamedTuple):
    """One level of a hierarchy: the latents drawn, and the two Gaussians given those above it."""

    z: Float[Array, " latents"]
    posterior: Gaussian
    prior: Gaussian


class DenseVAE(nn.Module):
    """A multilayer perceptron to the latents and one back: the net of Burda et al. 2016.

    Attributes:
      shape: of an example.
      num_latents: how many latents.
      hidden_sizes: units of the encoder's hidden layers; the decoder has them in reverse.
      num_params: numbers that the decoder gives for each element of the example.
      num_context: numbers that the encoder gives besides, for a flow of the latents.
      activation: between layers.
    """

    shape: tuple[int, ...]
    num_latents: int = 50
    hidden_sizes: Sequence[int] = (200, 200)
    num_params: int = 1
    num_context: int = 0
    activation: Callable[[Array], Array] = nn.tanh

    def setup(self):
        sizes = tuple(self.hidden_sizes)
        num_outputs = math.prod(self.shape) * self.num_params
        self.encoder = MLP(sizes, 2 * self.num_latents + self.num_context, self.activation)
        self.decoder = MLP(sizes[::-1], num_outputs, self.activation)

    def encode(self, x: Float[AnyArray, "*shape"]) -> Gaussian:
        """Mean and log standard deviation of `q(z | x)`, or of what a flow makes the latents of."""
        return mean_and_log_std(self.encoder(jnp.ravel(x))[: 2 * self.num_latents])

    def encode_with_context(
        self, x: Float[AnyArray, "*shape"]
    ) -> tuple[Float[Array, " latents"], Float[Array, " latents"], Float[Array, " context"]]:
        """Mean, log standard deviation and context."""
        outputs = self.encoder(jnp.ravel(x))
        gaussian, context = jnp.split(outputs, [2 * self.num_latents])
        mean, log_std = mean_and_log_std(gaussian)
        return mean, log_std, context

    def decode(self, z: Float[AnyArray, " latents"]) -> Float[Array, "*shape params"]:
        """Parameters of `p(x | z)`, `(*shape, num_params)`."""
        return self.decoder(z).reshape(*self.shape, self.num_params)

    def __call__(self, x: Float[AnyArray, "*shape"]) -> Float[Array, "*shape params"]:
        """The reconstruction from the mean of `q(z | x)`."""
        return self.decode(self.encode(x)[0])


class ConvVAE(nn.Module):
    """Two strided convolutions to the latents, and the same way back by repetition.

    Attributes:
      shape: height, width and channels of an image.
      num_latents: how many latents.
      num_filters: channels of the first convolution; the second has twice as many.
      num_units: of the dense layer between the last convolution and the latents.
      num_params: numbers that the decoder gives for each element of the image.
      activation: between layers.
    """

    shape: tuple[int, int, int]
    num_latents: int = 50
    num_filters: int = 32
    num_units: int = 256
    num_params: int = 1
    activation: Callable[[Array], Array] = nn.elu

    def setup(self):
        height, width, channels = self.shape
        filters = (self.num_filters, 2 * self.num_filters)
        self.sizes = [(-(-height // s), -(-width // s)) for s in (4, 2, 1)]
        self.smallest = (*self.sizes[0], filters[1])
        self.down = [Conv(f, (5, 5), strides=(2, 2)) for f in filters]
        self.up = [Conv(filters[0], (5, 5)), Conv(channels * self.num_params, (5, 5))]
        self.to_latents = MLP((self.num_units,), 2 * self.num_latents, self.activation)
        self.from_latents = MLP((self.num_units,), math.prod(self.smallest), self.activation)

    def encode(self, x: Float[AnyArray, "h w c"]) -> Gaussian:
        """Mean and log standard deviation of `q(z | x)`."""
        x = x[None]
        for conv in self.down:
            x = self.activation(conv(x))
        return mean_and_log_std(self.to_latents(x.ravel()))

    def decode(self, z: Float[AnyArray, " latents"]) -> Float[Array, "*shape params"]:
        """Parameters of `p(x | z)`, `(*shape, num_params)`."""
        x = self.from_latents(z).reshape(1, *self.smallest)
        for conv, (height, width) in zip(self.up, self.sizes[1:], strict=True):
            x = self.activation(x).repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]
            x = conv(x)
        return x.reshape(*self.shape, self.num_params)

    def __call__(self, x: Float[AnyArray, "h w c"]) -> Float[Array, "*shape params"]:
        """The reconstruction from the mean of `q(z | x)`."""
        return self.decode(self.encode(x)[0])


class LadderVAE(nn.Module):
    """A hierarchy of latents, inferred from above and below together.

    `p(z) = N(z_L; 0, 1) prod_i p(z_i | z_{i+1})`. Each `q(z_i | x, z_{i+1})` is the product of
    `p(z_i | z_{i+1})` and of a Gaussian that the encoder gives on its way up, their means weighted
    by their precisions: equations 17 to 19 of Sonderby, Raiko, Maaloe, Sonderby, Winther: Ladder
    variational autoencoders, 2016.

    Attributes:
      shape: of an example.
      num_latents: of each level, the lowest first.
      hidden_sizes: units of the dense layer of each level, likewise.
      num_params: numbers that the decoder gives for each element of the example.
      activation: between layers.
    """

    shape: tuple[int, ...]
    num_latents: Sequence[int] = (64, 32)
    hidden_sizes: Sequence[int] = (512, 256)
    num_params: int = 1
    activation: Callable[[Array], Array] = nn.elu

    def setup(self):
        levels = list(zip(self.num_latents, self.hidden_sizes, strict=True))
        num_outputs = math.prod(self.shape) * self.num_params
        self.up = [MLP((units, units), None, self.activation) for _, units in levels]
        self.evidence = [nn.Dense(2 * latents) for latents, _ in levels]
        # From level i + 1 to level i, and from level 0 to the example.
        below = [num_outputs, *(2 * latents for latents, _ in levels[:-1])]
        self.down = [
            MLP((units, units), outputs, self.activation)
            for (_, units), outputs in zip(levels, below, strict=True)
        ]

    def __call__(
        self, x: Float[AnyArray, "*shape"], key: PRNGKey
    ) -> tuple[Float[Array, "*shape params"], list[Level]]:
        """Parameters of `p(x | z_1)` for latents drawn from `q(z | x)`, and these, top first."""
        evidence, hidden = [], jnp.ravel(x)
        for up, out in zip(self.up, self.evidence, strict=True):
            hidden = up(hidden)
            evidence.append(mean_and_log_std(out(hidden)))
        return self._descend(key, evidence)

    def sample(self, key: PRNGKey) -> Float[Array, "*shape params"]:
        """The parameters of `p(x | z_1)` for latents drawn from `p(z)`."""
        return self._descend(key, None)[0]

    def _descend(self, key: PRNGKey, evidence: list[Gaussian] | None) -> tuple[Array, list[Level]]:
        top = jnp.zeros(self.num_latents[-1])
        prior, levels, below = Gaussian(top, top), [], top
        for i in reversed(range(len(self.num_latents))):
            posterior = prior if evidence is None else _product(prior, evidence[i])
            noise = jax.random.normal(jax.random.fold_in(key, i), prior.mean.shape)
            z = posterior.mean + jnp.exp(posterior.log_std) * noise
            levels.append(Level(z, posterior, prior))
            below = self.down[i](z)
            if i:
                prior = mean_and_log_std(below)
        return below.reshape(*self.shape, self.num_params), levels


def mean_and_log_std(outputs: Float[Array, " twice"]) -> Gaussian:
    """A Gaussian from as many means and then logarithms, the latter kept within their bound."""
    mean, raw = jnp.split(outputs, 2)
    return Gaussian(mean, _MAX_LOG_STD * jnp.tanh(raw / _MAX_LOG_STD))


def _product(a: Gaussian, b: Gaussian) -> Gaussian:
    """The Gaussian in proportion to the product of two."""
    weight = jax.nn.sigmoid(2 * (b.log_std - a.log_std))
    log_precision = jnp.logaddexp(-2 * a.log_std, -2 * b.log_std)
    return Gaussian(weight * a.mean + (1 - weight) * b.mean, -0.5 * log_precision)
