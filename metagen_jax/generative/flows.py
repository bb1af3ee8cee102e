"""Normalizing flows: a standard normal behind a bijector, and the best known bijectors.

Builders take no sizes of the data, which `init` sees: one `flow.init(key, batch)` makes the
parameters, from real data. Flows of vectors condition on a vector wherever one is given; so do
those of images.

Rezende, Mohamed: Variational Inference with Normalizing Flows, 2015.
Kingma et al.: Improved Variational Inference with Inverse Autoregressive Flow, 2016.
Dinh, Sohl-Dickstein, Bengio: Density estimation using Real NVP, 2017.
Papamakarios, Pavlakou, Murray: Masked Autoregressive Flow for Density Estimation, 2017.
Kingma, Dhariwal: Glow: Generative Flow with Invertible 1x1 Convolutions, 2018.
Durkan, Bekasov, Murray, Papamakarios: Neural Spline Flows, 2019.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from metagen_jax.errors import UserError
from metagen_jax.generative.bijectors import (
    Bijector,
    activation_norm,
    chain,
    inverted,
    invertible_linear,
    multi_scale,
    repeat,
    squeeze,
)
from metagen_jax.generative.couplings import (
    Transform,
    affine_transform,
    autoregressive,
    checkerboard,
    coupling,
    halves,
    spline_transform,
)
from metagen_jax.generative.likelihoods import gaussian_log_prob
from metagen_jax.generative.maximum_likelihood import LogProb
from metagen_jax.nets.made import MADE
from metagen_jax.nets.mlp import MLP
from metagen_jax.nets.residual_conv import ResidualConv
from metagen_jax.types import Params, PRNGKey


def flow_log_prob(bijector: Bijector, *, conditional: bool = False) -> LogProb:
    """`log p(x) = log N(z; 0, 1) + log |det dz/dx|`: equation 3 of Dinh et al. 2017.

    Args:
      bijector: data to noise; z any pytree of arrays.
      conditional: whether an example is a pair `(x, condition)`, the condition a vector.

    Returns:
      `(params, example, key) -> log-density` of ONE example, in nats per unit of x; it makes no use
      of the key. Ready for `negative_log_likelihood_loss`, and of images, within
      `dequantized_log_prob`, for bits per dimension.
    """

    def log_prob(params: Params, example: Any, key: PRNGKey) -> Array:
        x, condition = example if conditional else (example, None)
        z, log_det = bijector.forward(params, x, condition)
        return log_det + sum(gaussian_log_prob(part, 0, 0).sum() for part in jax.tree.leaves(z))

    return log_prob


def flow_sample(bijector: Bijector, shape: Sequence[int]) -> Callable[..., Array]:
    """Draws from the density of `flow_log_prob`, differentiable in the parameters.

    Args:
      bijector: data to noise.
      shape: that of ONE example.

    Returns:
      `sample(key, params, condition=None) -> x`, one example.
    """
    example = jax.ShapeDtypeStruct(tuple(shape), jnp.result_type(float))

    def sample(key: PRNGKey, params: Params, condition: Array | None = None) -> Array:
        z, _ = jax.eval_shape(bijector.forward, params, example, condition)
        parts, treedef = jax.tree.flatten(z)
        keys = jax.random.split(key, len(parts))
        noise = [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, parts, strict=True)]
        return bijector.inverse(params, jax.tree.unflatten(treedef, noise), condition)[0]

    return sample


def realnvp(*, num_layers: int = 8, hidden_sizes: Sequence[int] = (64, 64)) -> Bijector:
    """Affine couplings of vectors, that keep one half and the other in turn.

    An activation norm comes before each, in place of the batch norm of Dinh et al. 2017.

    Args:
      num_layers: couplings.
      hidden_sizes: of the perceptron of each.
    """
    layers = []
    for i in range(_positive(num_layers, "num_layers")):
        layers += [activation_norm(), _vector_coupling(hidden_sizes, affine_transform(), i)]
    return chain(*layers)


def glow(*, num_layers: int = 8, hidden_sizes: Sequence[int] = (64, 64)) -> Bijector:
    """Steps of activation norm, learned linear map and affine coupling of vectors.

    Section 3 of Kingma and Dhariwal 2018. The steps are one scan.

    Args:
      num_layers: steps.
      hidden_sizes: of the perceptron of each.
    """
    return repeat(_linear_step(_vector_coupling(hidden_sizes, affine_transform(), 0)), num_layers)


def spline_flow(
    *,
    num_layers: int = 5,
    hidden_sizes: Sequence[int] = (64, 64),
    num_bins: int = 8,
    bound: float = 3.0,
) -> Bijector:
    """Steps of activation norm, learned linear map and rational-quadratic coupling of vectors.

    RQ-NSF (C) of Durkan et al. 2019, with an activation norm that keeps the data within the bound.
    The steps are one scan.

    Args:
      num_layers: steps.
      hidden_sizes: of the perceptron of each.
      num_bins: bins of each spline.
      bound: half the length of the interval that splines change.
    """
    transform = spline_transform(num_bins=num_bins, bound=bound)
    return repeat(_linear_step(_vector_coupling(hidden_sizes, transform, 0)), num_layers)


def maf(
    *,
    num_layers: int = 5,
    hidden_sizes: Sequence[int] = (64, 64),
    transform: Transform | None = None,
) -> Bijector:
    """Autoregressive layers of vectors, in natural and reversed order in turn.

    Papamakarios et al. 2017, with activation norms in place of batch norms; with splines as
    `transform` RQ-NSF (AR) of Durkan et al. 2019. Sampling takes `num_layers` passes for each
    number of the vector.

    Args:
      num_layers: autoregressive layers.
      hidden_sizes: of the masked net of each.
      transform: what is done to each number; None is `affine_transform()`.
    """
    transform = affine_transform() if transform is None else transform
    layers = []
    for i in range(_positive(num_layers, "num_layers")):
        net = _alternating_net(i, hidden_sizes, transform)
        layers += [activation_norm(), autoregressive(net, transform)]
    return chain(*layers)


def iaf(*, num_layers: int = 4, hidden_sizes: Sequence[int] = (64, 64)) -> Bijector:
    """Inverse autoregressive layers of vectors, in natural and reversed order in turn.

    `x_i = (z_i - m_i(z_<i)) exp(-s_i(z_<i))` from noise to data, by one pass of each layer's net,
    with the density of what is drawn; the density of other data takes a pass for each number.
    Algorithm 1 of Kingma et al. 2016 with affine layers that start as the identity for its gates.
    As a posterior (`flow` of `metagen_jax.generative.vae.gaussian_inference`) it is `inverse`,
    given what the encoder says of the example as condition. It sets no scales by data.

    Args:
      num_layers: autoregressive layers.
      hidden_sizes: of the masked net of each.
    """
    transform = affine_transform()
    return chain(
        *(
            inverted(autoregressive(_alternating_net(i, hidden_sizes, transform), transform))
            for i in range(_positive(num_layers, "num_layers"))
        )
    )


def realnvp_images(*, num_levels: int = 3, num_filters: int = 32, num_blocks: int = 2) -> Bijector:
    """RealNVP of images `(h, w, c)`, multi-scale: section 3.6 of Dinh et al. 2017.

    Each level has three couplings of checkerboards, a squeeze, and three of channels, then half of
    the channels leaves; the last has four of checkerboards alone. z is a tuple, one array a level.

    Args:
      num_levels: levels; the height and the width must be divisible by `2 ** (num_levels - 1)`.
      num_filters: of the residual convolutions of each coupling.
      num_blocks: residual blocks of each.
    """
    net = functools.partial(_image_net, num_filters, num_blocks)

    def couplings(*partitions) -> list[Bijector]:
        pairs = (
            (activation_norm(), coupling(net, affine_transform(), partition=partition))
            for partition in partitions
        )
        return [bijector for pair in pairs for bijector in pair]

    even, odd = checkerboard("even"), checkerboard("odd")
    first, second = halves("first"), halves("second")
    level = chain(*couplings(even, odd, even), squeeze(), *couplings(first, second, first))
    last = chain(*couplings(even, odd, even, odd))
    return multi_scale(*[level] * (_positive(num_levels, "num_levels") - 1), last)


def glow_images(
    *, num_levels: int = 2, num_steps: int = 8, num_filters: int = 64, num_blocks: int = 1
) -> Bijector:
    """Glow of images `(h, w, c)`: section 3 and figure 2 of Kingma and Dhariwal 2018.

    Each level squeezes, takes its steps of activation norm, 1x1 convolution and affine coupling of
    channels, as one scan, then half of the channels leaves. What leaves is first normalised given
    what goes on, by one coupling more: the learned prior of the authors' code. z is a tuple, one
    array a level.

    Args:
      num_levels: levels; the height and the width must be divisible by `2 ** num_levels`.
      num_steps: of each level.
      num_filters: of the residual convolutions of each coupling.
      num_blocks: residual blocks of each.
    """
    net = functools.partial(_image_net, num_filters, num_blocks)
    keep_first = coupling(net, affine_transform(), partition=halves("first"))
    steps = repeat(_linear_step(keep_first), num_steps)
    level = chain(squeeze(), steps, keep_first)
    last = chain(squeeze(), steps)
    return multi_scale(*[level] * (_positive(num_levels, "num_levels") - 1), last)


def _alternating_net(index: int, hidden_sizes: Sequence[int], transform: Transform) -> MADE:
    return MADE(
        hidden_sizes,
        num_params=transform.num_params,
        order="reversed" if index % 2 else "natural",
        head_init=nn.initializers.zeros_init(),
    )


def _linear_step(last: Bijector) -> Bijector:
    return chain(activation_norm(), invertible_linear(), last)


def _vector_coupling(hidden_sizes: Sequence[int], transform: Transform, index: int) -> Bijector:
    net = functools.partial(_vector_net, hidden_sizes)
    return coupling(net, transform, partition=halves("second" if index % 2 else "first"))


def _vector_net(hidden_sizes: Sequence[int], num_outputs: int) -> nn.Module:
    return MLP(hidden_sizes, num_outputs, head_init=nn.initializers.zeros_init())


def _image_net(num_filters: int, num_blocks: int, num_outputs: int) -> nn.Module:
    return ResidualConv(num_filters, num_outputs, num_blocks)


def _positive(count: int, name: str) -> int:
    if count < 1:
        raise UserError(f"{name} is {count}; give a positive number")
    return count
