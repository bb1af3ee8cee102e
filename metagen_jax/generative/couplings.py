"""Bijectors whose parameters a net gives: coupling layers and autoregressive layers.

Each is a monotone function of single numbers, affine or a spline, applied to some numbers of an
example with parameters that depend on others.

Dinh, Sohl-Dickstein, Bengio: Density estimation using Real NVP, 2017.
Kingma et al.: Improved Variational Inference with Inverse Autoregressive Flow, 2016.
Papamakarios, Pavlakou, Murray: Masked Autoregressive Flow for Density Estimation, 2017.
Durkan, Bekasov, Murray, Papamakarios: Neural Spline Flows, 2019.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from metagen_jax.errors import UserError
from metagen_jax.generative.bijectors import Bijector
from metagen_jax.generative.splines import (
    inverse_rational_quadratic_spline,
    rational_quadratic_spline,
)
from metagen_jax.nets.made import MADE
from metagen_jax.types import Params, PRNGKey


class Transform(NamedTuple):
    """A monotone function of one number, applied to arrays, each number with its own parameters."""

    num_params: int
    """How many parameters a number has."""

    forward: Callable[[Array, Array], tuple[Array, Array]]
    """`(x, parameters) -> (z, log dz/dx)`, x of any shape, parameters `(num_params, *shape)`."""

    inverse: Callable[[Array, Array], tuple[Array, Array]]
    """`(z, parameters) -> (x, log dx/dz)`."""


def affine_transform(*, max_log_scale: float = 3.0) -> Transform:
    """`z = (x - shift) exp(-log_scale)`, `log_scale = m tanh(s / m)`: it can't overflow.

    Args:
      max_log_scale: m, what log-scales stay below in size.

    Raises:
      UserError: if it is not positive.
    """
    if not max_log_scale > 0:
        raise UserError(f"max_log_scale is {max_log_scale}; give a positive number, such as 3")

    def forward(x: Array, parameters: Array) -> tuple[Array, Array]:
        shift, log_scale = parameters[0], bounded(parameters[1])
        return (x - shift) * jnp.exp(-log_scale), -log_scale

    def inverse(z: Array, parameters: Array) -> tuple[Array, Array]:
        shift, log_scale = parameters[0], bounded(parameters[1])
        return z * jnp.exp(log_scale) + shift, log_scale

    def bounded(raw: Array) -> Array:
        return max_log_scale * jnp.tanh(raw / max_log_scale)

    return Transform(2, forward, inverse)


def spline_transform(*, num_bins: int = 8, bound: float = 3.0) -> Transform:
    """`metagen_jax.generative.splines.rational_quadratic_spline`, the identity outside of `bound`.

    Args:
      num_bins: K, which makes 3 K - 1 parameters.
      bound: half the length of the interval; keep most of the data in it, as by `activation_norm`.

    Raises:
      UserError: for fewer than one bin. The bijector raises one for a bound that is not positive.
    """
    if num_bins < 1:
        raise UserError(f"num_bins is {num_bins}; give a positive number, such as 8")

    def apply(function: Callable, x: Array, parameters: Array) -> tuple[Array, Array]:
        widths, heights = parameters[:num_bins], parameters[num_bins : 2 * num_bins]
        return function(x, widths, heights, parameters[2 * num_bins :], bound=bound)

    return Transform(
        3 * num_bins - 1,
        lambda x, parameters: apply(rational_quadratic_spline, x, parameters),
        lambda z, parameters: apply(inverse_rational_quadratic_spline, z, parameters),
    )


class Partition(NamedTuple):
    """How a coupling parts an example in what stays and what changes."""

    split: Callable[[Array], tuple[Array, Array]]
    """`x -> (kept, changed)`."""

    merge: Callable[[Array, Array], Array]
    """`(kept, changed) -> x`."""


def halves(keep: Literal["first", "second"]) -> Partition:
    """The channels, the last axis, in two halves; of an odd number the second is the larger."""
    if keep not in ("first", "second"):
        raise UserError(f'keep is {keep!r}; give "first" or "second"')

    def split(x: Array) -> tuple[Array, Array]:
        half = x.shape[-1] // 2
        if half == 0:
            raise UserError(
                f"an example of shape {x.shape} can't be parted in two halves; give two or more "
                "channels (numbers of a vector)"
            )
        first, second = x[..., :half], x[..., half:]
        return (first, second) if keep == "first" else (second, first)

    def merge(kept: Array, changed: Array) -> Array:
        parts = [kept, changed] if keep == "first" else [changed, kept]
        return jnp.concatenate(parts, axis=-1)

    return Partition(split, merge)


def checkerboard(keep: Literal["even", "odd"]) -> Partition:
    """The pixels of an image `(h, w, c)` whose row and column have an even or an odd sum.

    Both parts are whole images, with zeros where the other's pixels are, as section 3.4 of Dinh et
    al. 2017 has it.
    """
    if keep not in ("even", "odd"):
        raise UserError(f'keep is {keep!r}; give "even" or "odd"')

    def kept_pixels(x: Array) -> np.ndarray:
        rows, columns = np.indices(x.shape[:2])
        return ((rows + columns) % 2 == (keep == "odd"))[:, :, None]

    def split(x: Float[Array, "h w c"]) -> tuple[Array, Array]:
        return jnp.where(kept_pixels(x), x, 0), jnp.where(kept_pixels(x), 0, x)

    def merge(kept: Float[Array, "h w c"], changed: Float[Array, "h w c"]) -> Array:
        return jnp.where(kept_pixels(kept), kept, changed)

    return Partition(split, merge)


def coupling(
    net: Callable[[int], nn.Module], transform: Transform, *, partition: Partition
) -> Bijector:
    """One part stays; the other is transformed with parameters that a net makes of the first.

    `z_kept = x_kept`, `z_changed = f(x_changed; net(x_kept))`: section 3.2 of Dinh et al. 2017.

    Args:
      net: makes a flax module from its number of outputs, the last axis; it maps a batch of the
        part that stays to a batch of the other's parameters. `functools.partial(MLP, (64, 64))`
        is one for vectors, `functools.partial(ResidualConv, 64)` one for images. A condition comes
        as channels more, the same at each position.
      transform: what is done to each number.
      partition: `halves` or `checkerboard`.

    Returns:
      A bijector of the net's parameters.
    """

    def module(changed: Array) -> nn.Module:
        return net(transform.num_params * changed.shape[-1])

    def inputs(kept: Array, condition: Array | None) -> Array:
        if condition is None:
            return kept[None]
        everywhere = jnp.broadcast_to(condition, (*kept.shape[:-1], len(condition)))
        return jnp.concatenate([kept, everywhere], axis=-1)[None]

    def init(key: PRNGKey, batch: Array, condition: Array | None = None) -> Params:
        kept, changed = partition.split(batch[0])
        return module(changed).init(key, inputs(kept, None if condition is None else condition[0]))

    def apply(function: Callable, params: Params, x: Array, condition: Array | None):
        kept, changed = partition.split(x)
        outputs = module(changed).apply(params, inputs(kept, condition))[0]
        outputs = outputs.reshape(*changed.shape[:-1], transform.num_params, changed.shape[-1])
        changed, log_slope = function(changed, jnp.moveaxis(outputs, -2, 0))
        return partition.merge(kept, changed), partition.merge(
            jnp.zeros_like(kept), log_slope
        ).sum()

    def forward(params: Params, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        return apply(transform.forward, params, x, condition)

    def inverse(params: Params, z: Array, condition: Array | None = None) -> tuple[Array, Array]:
        return apply(transform.inverse, params, z, condition)

    return Bijector(init, forward, inverse)


def autoregressive(net: MADE, transform: Transform) -> Bijector:
    """Each number of a vector is transformed with parameters that depend on those before it.

    `z_i = f(x_i; net(x_<i)_i)`; affine, that is the masked autoregressive flow of Papamakarios et
    al. 2017, equation 4. The inverse takes one pass of the net for each number, in the net's order;
    `metagen_jax.generative.bijectors.inverted` makes that the forward direction, for an inverse
    autoregressive flow (Kingma et al. 2016).

    Args:
      net: of `num_params` outputs an input, in one order.
      transform: what is done to each number.

    Returns:
      A bijector of the net's parameters, for vectors.

    Raises:
      UserError: if the net has another number of outputs than the transform has parameters, or
        several orders.
    """
    if net.num_params != transform.num_params or net.num_masks != 1:
        raise UserError(
            f"the net has {net.num_params} outputs an input and num_masks {net.num_masks}; give "
            f"num_params={transform.num_params}, as the transform has, and num_masks=1"
        )

    def init(key: PRNGKey, batch: Array, condition: Array | None = None) -> Params:
        return net.init(key, batch[0], None if condition is None else condition[0])

    def parameters(params: Params, x: Array, condition: Array | None) -> Array:
        return jnp.asarray(net.apply(params, x, condition))

    def forward(params: Params, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        z, log_slope = transform.forward(x, parameters(params, x, condition))
        return z, log_slope.sum()

    def inverse(params: Params, z: Array, condition: Array | None = None) -> tuple[Array, Array]:
        # What is not known yet is zero, not a guess: guesses can grow from pass to pass to
        # infinity, and a masked weight times infinity is NaN.
        def step(x: Array, i: Array) -> tuple[Array, Array]:
            x_i, log_slope = transform.inverse(z[i], parameters(params, x, condition)[:, i])
            return x.at[i].set(x_i), log_slope

        order = jnp.asarray(np.argsort(net.ranks(len(z))[0]))
        start = jnp.zeros(z.shape, jnp.result_type(z, *jax.tree.leaves(params)))
        x, log_slopes = jax.lax.scan(step, start, order)
        return x, log_slopes.sum()

    return Bijector(init, forward, inverse)
