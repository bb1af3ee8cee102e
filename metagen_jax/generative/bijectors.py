"""Bijectors: pairs of pure functions, data to noise and back, with their log-determinants.

Here are those that couple nothing by a net, and what joins bijectors to one;
`metagen_jax.generative.couplings` has the others, `metagen_jax.generative.flows` what is made of
them.

Dinh, Sohl-Dickstein, Bengio: Density estimation using Real NVP, 2017.
Kingma, Dhariwal: Glow: Generative Flow with Invertible 1x1 Convolutions, 2018.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jax.scipy.linalg import lu, solve_triangular
from jaxtyping import Array, Float

from metagen_jax.errors import UserError
from metagen_jax.generative.dequantisation import inverse_logit_transform, logit_transform
from metagen_jax.types import Params, PRNGKey


class Bijector(NamedTuple):
    """Three pure functions. All work on ONE example; `init` sees a batch.

    Every function takes, last, a `condition`, a vector that the whole map depends on, or None. To
    each bijector of this library that makes no use of it it makes no difference.
    """

    init: Callable[..., Params]
    """`init(key, batch, condition=None) -> params`, from a batch of examples `(n, ...)`, of
    conditions `(n, ...)` if there are any. Activation norms take their statistics from it, so give
    it real data, the same on all devices: before replication."""

    forward: Callable[..., tuple[Any, Array]]
    """`forward(params, x, condition=None) -> (z, log |det dz/dx|)`: data to noise."""

    inverse: Callable[..., tuple[Any, Array]]
    """`inverse(params, z, condition=None) -> (x, log |det dx/dz|)`: noise to data."""


def forward_all(bijector: Bijector, params: Params, batch: Array, condition: Array | None) -> Any:
    """z of each example of a batch."""
    return jax.vmap(lambda x, c: bijector.forward(params, x, c)[0])(batch, condition)


def chain(*bijectors: Bijector) -> Bijector:
    """One after the other, from data to noise; log-determinants add up.

    Params are `{"layer0": ..., "layer1": ...}`. Each is initialised on what those before it make of
    the batch.

    Raises:
      UserError: for no bijectors.
    """
    if not bijectors:
        raise UserError("there are no bijectors to chain; give one or more")
    names = [f"layer{i}" for i in range(len(bijectors))]

    def init(key: PRNGKey, batch: Array, condition: Array | None = None) -> Params:
        params = {}
        keys = jax.random.split(key, len(bijectors))
        for i, (name, bijector) in enumerate(zip(names, bijectors, strict=True)):
            if i > 0:
                batch = forward_all(bijectors[i - 1], params[names[i - 1]], batch, condition)
            params[name] = bijector.init(keys[i], batch, condition)
        return params

    def forward(params: Params, x: Array, condition: Array | None = None) -> tuple[Any, Array]:
        log_dets = []
        for name, bijector in zip(names, bijectors, strict=True):
            x, log_det = bijector.forward(params[name], x, condition)
            log_dets.append(log_det)
        return x, sum(log_dets[1:], log_dets[0])

    def inverse(params: Params, z: Any, condition: Array | None = None) -> tuple[Any, Array]:
        log_dets = []
        for name, bijector in zip(names[::-1], bijectors[::-1], strict=True):
            z, log_det = bijector.inverse(params[name], z, condition)
            log_dets.append(log_det)
        return z, sum(log_dets[1:], log_dets[0])

    return Bijector(init, forward, inverse)


def repeat(bijector: Bijector, num_repeats: int) -> Bijector:
    """A chain of so many bijectors of one kind, each with its own parameters, as a scan.

    Compiled once, however many there are. Params are those of one with a leading axis more. Its z
    must have the shape and dtype of x.

    Raises:
      UserError: for fewer than one.
    """
    if num_repeats < 1:
        raise UserError(f"num_repeats is {num_repeats}; give a positive number")

    def init(key: PRNGKey, batch: Array, condition: Array | None = None) -> Params:
        def step(batch, key):
            params = bijector.init(key, batch, condition)
            return forward_all(bijector, params, batch, condition), params

        return jax.lax.scan(step, batch, jax.random.split(key, num_repeats))[1]

    def scan(function: Callable, params: Params, x: Array, condition, reverse: bool):
        x = jnp.asarray(x, jnp.result_type(x, *jax.tree.leaves(params)))

        def step(x, params):
            return function(params, x, condition)

        x, log_dets = jax.lax.scan(step, x, params, reverse=reverse)
        return x, log_dets.sum()

    def forward(params: Params, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        return scan(bijector.forward, params, x, condition, False)

    def inverse(params: Params, z: Array, condition: Array | None = None) -> tuple[Array, Array]:
        return scan(bijector.inverse, params, z, condition, True)

    return Bijector(init, forward, inverse)


def inverted(bijector: Bijector) -> Bijector:
    """The same pair with its directions exchanged.

    Of a masked autoregressive flow (fast densities, samples one number at a time) it makes an
    inverse autoregressive one (fast samples). An activation norm within would still be initialised
    for its own forward direction: put it outside.
    """
    return Bijector(bijector.init, bijector.inverse, bijector.forward)


def multi_scale(*levels: Bijector) -> Bijector:
    """Half of the channels leaves after each level but the last: section 3.6 of Dinh et al. 2017.

    The first half of what a level gives, of an odd number the larger, goes on to the next level,
    the other is done. z is a tuple, one array a level.

    Raises:
      UserError: for no levels; and where a level gives a single channel, which can't be halved.
    """
    if not levels:
        raise UserError("there are no levels; give one or more bijectors")
    names = [f"level{i}" for i in range(len(levels))]

    def init(key: PRNGKey, batch: Array, condition: Array | None = None) -> Params:
        params = {}
        keys = jax.random.split(key, len(levels))
        for i, (name, level) in enumerate(zip(names, levels, strict=True)):
            if i > 0:
                batch = forward_all(levels[i - 1], params[names[i - 1]], batch, condition)
                batch, _ = _halve(batch)
            params[name] = level.init(keys[i], batch, condition)
        return params

    def forward(params: Params, x: Array, condition: Array | None = None) -> tuple[Any, Array]:
        done, log_dets = [], []
        for name, level in zip(names, levels, strict=True):
            x, log_det = level.forward(params[name], x, condition)
            log_dets.append(log_det)
            if name != names[-1]:
                x, out = _halve(x)
                done.append(out)
        return (*done, x), sum(log_dets[1:], log_dets[0])

    def inverse(params: Params, z: tuple, condition: Array | None = None) -> tuple[Array, Array]:
        x, log_det = levels[-1].inverse(params[names[-1]], z[-1], condition)
        for name, level, out in zip(names[-2::-1], levels[-2::-1], z[-2::-1], strict=True):
            joined = jnp.concatenate([x, out], axis=-1)
            x, more = level.inverse(params[name], joined, condition)
            log_det = log_det + more
        return x, log_det

    return Bijector(init, forward, inverse)


def _halve(x: Array) -> tuple[Array, Array]:
    channels = x.shape[-1]
    if channels < 2:
        raise UserError("a single channel can't be halved; squeeze before, or give fewer levels")
    return x[..., : (channels + 1) // 2], x[..., (channels + 1) // 2 :]


def activation_norm() -> Bijector:
    """`z = (x - shift) exp(-log_scale)` with a shift and a scale for each channel, the last axis.

    They start as mean and standard deviation of the channel over the batch and all positions, so
    that z has mean 0 and variance 1 there: section 3.1 of Kingma and Dhariwal 2018. A channel that
    is constant there starts with scale 1.
    """

    def init(key: PRNGKey, batch: Array, condition: Array | None = None) -> Params:
        axes = tuple(range(batch.ndim - 1))
        std = batch.std(axes)
        return {
            "shift": batch.mean(axes),
            "log_scale": jnp.log(jnp.where(std > 1e-6, std, 1)),
        }

    def forward(params: Params, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        z = (x - params["shift"]) * jnp.exp(-params["log_scale"])
        return z, -_num_positions(x) * params["log_scale"].sum()

    def inverse(params: Params, z: Array, condition: Array | None = None) -> tuple[Array, Array]:
        x = z * jnp.exp(params["log_scale"]) + params["shift"]
        return x, _num_positions(z) * params["log_scale"].sum()

    return Bijector(init, forward, inverse)


def invertible_linear() -> Bijector:
    """`z = W x` over the channels, the last axis, the same at each position: a 1x1 convolution.

    `W = P L (U + diag(sign exp(log_scale)))`, P a permutation, L lower triangular with ones on its
    diagonal, U strictly upper triangular; `log |det W| = sum log_scale`, for each position:
    equations 10 and 11 of Kingma and Dhariwal 2018. It starts as a random rotation. P and the signs
    stay what they are: they are the order of `params["order"]` and the signs of `params["sign"]`,
    to which no gradient goes, and which weight decay or averaging does not change.
    """

    def init(key: PRNGKey, batch: Array, condition: Array | None = None) -> Params:
        size = batch.shape[-1]
        rotation = jax.random.orthogonal(key, size, dtype=batch.dtype)
        permutation, lower, upper = lu(rotation)
        diagonal = jnp.diagonal(upper)
        return {
            "lower": jnp.tril(lower, -1),
            "upper": jnp.triu(upper, 1),
            "log_scale": jnp.log(jnp.abs(diagonal)),
            "sign": jnp.sign(diagonal),
            # Sorted, it gives the row of L U that each row of W is.
            "order": 1 + permutation.argmax(0).astype(batch.dtype),
        }

    def factors(params: Params) -> tuple[Array, Array, Array]:
        fixed = jax.lax.stop_gradient((params["sign"], params["order"]))
        scale = jnp.sign(fixed[0]) * jnp.exp(params["log_scale"])
        lower = jnp.tril(params["lower"], -1) + jnp.eye(len(scale), dtype=scale.dtype)
        return lower, jnp.triu(params["upper"], 1) + jnp.diag(scale), jnp.argsort(fixed[1])

    def forward(params: Params, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        lower, upper, order = factors(params)
        z = x @ (lower @ upper)[order].T
        return z, _num_positions(x) * params["log_scale"].sum()

    def inverse(params: Params, z: Array, condition: Array | None = None) -> tuple[Array, Array]:
        lower, upper, order = factors(params)
        columns = z.reshape(-1, z.shape[-1])[:, jnp.argsort(order)].T
        columns = solve_triangular(lower, columns, lower=True, unit_diagonal=True)
        x = solve_triangular(upper, columns).T.reshape(z.shape)
        return x, -_num_positions(z) * params["log_scale"].sum()

    return Bijector(init, forward, inverse)


def _num_positions(x: Array) -> int:
    return x.size // x.shape[-1]


def _without_params(forward: Callable, inverse: Callable) -> Bijector:
    return Bijector(
        lambda key, batch, condition=None: {},
        lambda params, x, condition=None: forward(x),
        lambda params, z, condition=None: inverse(z),
    )


def permutation(order: Sequence[int]) -> Bijector:
    """`z[..., i] = x[..., order[i]]`: channels, the last axis, in another order.

    Raises:
      UserError: if `order` does not hold each of 0..n-1 once.
    """
    order = tuple(order)
    if sorted(order) != list(range(len(order))):
        raise UserError(f"order is {order}; give each of 0..{len(order) - 1} once")
    back = tuple(sorted(range(len(order)), key=order.__getitem__))

    def take(x: Array, order: tuple) -> tuple[Array, Array]:
        return x[..., jnp.array(order)], jnp.zeros((), x.dtype)

    return _without_params(lambda x: take(x, order), lambda z: take(z, back))


def reverse() -> Bijector:
    """Channels, the last axis, in reverse order."""

    def flip(x: Array) -> tuple[Array, Array]:
        return x[..., ::-1], jnp.zeros((), x.dtype)

    return _without_params(flip, flip)


def squeeze() -> Bijector:
    """Each 2x2 block of an image becomes one position: `(h, w, c)` to `(h/2, w/2, 4 c)`.

    The channels of the block's first pixel come first, then those of its right neighbour: section
    3.6 of Dinh et al. 2017. The forward direction raises a UserError for an odd height or width.
    """

    def forward(x: Float[Array, "h w c"]) -> tuple[Array, Array]:
        height, width, channels = x.shape
        if height % 2 or width % 2:
            raise UserError(
                f"an image of {height}x{width} can't be squeezed; give an even height and width, "
                "or fewer levels"
            )
        blocks = x.reshape(height // 2, 2, width // 2, 2, channels).swapaxes(1, 2)
        return blocks.reshape(height // 2, width // 2, 4 * channels), jnp.zeros((), x.dtype)

    def inverse(z: Float[Array, "h w c"]) -> tuple[Array, Array]:
        height, width, channels = z.shape
        blocks = z.reshape(height, width, 2, 2, channels // 4).swapaxes(1, 2)
        return blocks.reshape(2 * height, 2 * width, channels // 4), jnp.zeros((), z.dtype)

    return _without_params(forward, inverse)


def logit(alpha: float) -> Bijector:
    """From [0, 1] to all numbers: `metagen_jax.generative.dequantisation.logit_transform`.

    The log-density of a flow that begins with it is one on [0, 1], as `dequantized_log_prob` takes.
    """

    def inverse(z: Array) -> tuple[Array, Array]:
        log_slopes = log_sigmoid(z) + log_sigmoid(-z) - jnp.log1p(-2 * alpha)
        return inverse_logit_transform(z, alpha=alpha), log_slopes.sum()

    return _without_params(lambda x: logit_transform(x, alpha=alpha), inverse)
