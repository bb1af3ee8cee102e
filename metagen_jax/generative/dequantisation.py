"""From densities of continuous data to the log-probability of discrete data, in nats.

A density on [0, 1]^D says how probable levels 0..L-1 are, `P(x) = int p((x + u) / L) du / L^D` over
the unit cube, but not in closed form. Averaged over noise `u` it gives a lower bound on `log P(x)`,
which bits per dimension are taken of: never of the log-density itself, which grows without limit
as the density gathers at the levels, and is another number for every scaling of the data.

Theis, van den Oord, Bethge: A note on the evaluation of generative models, 2016.
Ho, Chen, Srinivas, Duan, Abbeel: Flow++, 2019.
Hoogeboom, Cohen, Tomczak: Learning Discrete Distributions by Dequantization, 2020.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, logsumexp
from jaxtyping import Array, Float, Int, Real

from metagen_jax.errors import UserError
from metagen_jax.generative.likelihoods import as_levels
from metagen_jax.gradients import task_keys
from metagen_jax.types import AnyArray, PRNGKey

LogDensity = Callable[[Array], Array]
"""`log_density(y) -> scalar`, in nats, of one example `y` in [0, 1], summed over its numbers."""

Noise = Callable[[PRNGKey, Array], tuple[Array, Array]]
"""`noise(key, levels) -> (u, log q(u | levels))`: u in [0, 1], of the shape of `levels`, which are
floats, and the log-density that it was drawn with, summed."""


def uniform_noise(
    key: PRNGKey, levels: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, ""]]:
    """Noise that is uniform in [0, 1) whatever the levels: section 3.1 of Theis et al. 2016."""
    return jax.random.uniform(key, levels.shape, levels.dtype), jnp.zeros((), levels.dtype)


def sigmoid_noise(sample: Noise) -> Noise:
    """Noise `u = sigma(z)` of any distribution of `z`: variational dequantisation.

    `log q(u | x) = log q(z | x) - sum_i log(sigma(z_i) sigma(-z_i))`: section 3.1 of Ho et al.
    2019, where `z` comes from a flow conditioned on `x`.

    Args:
      sample: `(key, levels) -> (z, log q(z | levels))`, z of the shape of `levels`, its log-density
        summed. Gradients reach its parameters if z is reparameterised, as of `sample_gaussian`.
    """

    def noise(key: PRNGKey, levels: Array) -> tuple[Array, Array]:
        z, log_density = sample(key, levels)
        return jax.nn.sigmoid(z), log_density - (log_sigmoid(z) + log_sigmoid(-z)).sum()

    return noise


def dequantized_log_prob(
    key: PRNGKey,
    value: Real[AnyArray, "*shape"],
    log_density: LogDensity,
    *,
    noise: Noise = uniform_noise,
    num_samples: int = 1,
    num_levels: int = 256,
) -> Float[Array, ""]:
    """A lower bound, in expectation, on the log-probability of ONE example of discrete data.

    `log 1/S sum_s p((x + u_s) / L) / q(u_s | x) - D log L`, `u_s ~ q(. | x)`. One sample gives the
    bound of Theis et al. 2016, or with noise that is learned that of Ho et al. 2019; more samples
    raise it towards `log P(x)`: Hoogeboom et al. 2020. With `q(u | x)` in proportion to
    `p((x + u) / L)` it is exact for any number.

    Args:
      key: sample `s` has `fold_in(key, s)`.
      value: levels 0..num_levels-1.
      log_density: of `y = (x + u) / num_levels` in [0, 1], per unit of `y`. `logit_density` gives
        one from a density on all numbers.
      noise: `uniform_noise`, or one from `sigmoid_noise`.
      num_samples: S; all are computed at once.
      num_levels: L, 256 for 8 bits.

    Returns:
      In nats of the original data, a scalar: ready for `bits_per_dim`. `-inf` if a value is no
      level.

    Raises:
      UserError: for fewer than one sample, a log-density that is not a scalar, such as one that is
        not summed, or noise of another shape than `value`.
    """
    if num_samples < 1:
        raise UserError(f"num_samples is {num_samples}; give a positive number")
    levels, supported = as_levels(value, num_levels, jnp.result_type(float))

    def log_weight(key: PRNGKey) -> Array:
        u, log_noise = noise(key, levels)
        if jnp.shape(u) != levels.shape:
            raise UserError(
                f"the noise has shape {jnp.shape(u)} for values of shape {levels.shape}; "
                "give one number for each"
            )
        log_prob = log_density((levels + u) / num_levels)
        for name, given in (("the data", log_prob), ("the noise", log_noise)):
            if jnp.shape(given) != ():
                raise UserError(
                    f"the log-density of {name} has shape {jnp.shape(given)}; give one number, "
                    "summed over the example"
                )
        return log_prob - log_noise

    log_weights = jax.vmap(log_weight)(task_keys(key, num_samples))
    log_prob = logsumexp(log_weights) - math.log(num_samples) - levels.size * math.log(num_levels)
    return jnp.where(supported.all(), log_prob, -jnp.inf)


def quantize(y: Float[Array, "*shape"], *, num_levels: int = 256) -> Int[Array, "*shape"]:
    """The level in whose bin `y` is, `floor(num_levels y)`, int32; outside [0, 1] the nearest.

    Takes samples of a density on [0, 1] to samples of the data.
    """
    return jnp.clip(jnp.floor(num_levels * y), 0, num_levels - 1).astype(jnp.int32)


def logit_transform(
    y: Float[Array, "*shape"], *, alpha: float
) -> tuple[Float[Array, "*shape"], Float[Array, ""]]:
    """Takes [0, 1] to all numbers: `z = logit(t)`, `t = alpha + (1 - 2 alpha) y`.

    `log |dz/dy| = sum_i log(1 - 2 alpha) - log t_i - log(1 - t_i)`: Dinh et al. 2017 (RealNVP),
    section 4.1, in the form of Papamakarios et al. 2017, which treats both ends alike.

    Args:
      y: in [0, 1], both ends included.
      alpha: how far both ends are kept from infinity, in (0, 1/2): 0.05 for natural images, 1e-6
        for MNIST in those papers.

    Returns:
      `z` and the logarithm of the determinant of its Jacobian.

    Raises:
      UserError: if alpha is not between 0 and 1/2.
    """
    _check_alpha(alpha)
    log_t = jnp.log(alpha + (1 - 2 * alpha) * y)
    # Not 1 - t, which has lost all but a few digits of a small alpha.
    log_rest = jnp.log(alpha + (1 - 2 * alpha) * (1 - y))
    return log_t - log_rest, (math.log1p(-2 * alpha) - log_t - log_rest).sum()


def inverse_logit_transform(z: Float[Array, "*shape"], *, alpha: float) -> Float[Array, "*shape"]:
    """`y = (sigma(z) - alpha) / (1 - 2 alpha)`: the inverse of `logit_transform`.

    It leaves [0, 1], by at most `alpha / (1 - 2 alpha)`, for `z` that no `y` is taken to.

    Raises:
      UserError: if alpha is not between 0 and 1/2.
    """
    _check_alpha(alpha)
    return (jax.nn.sigmoid(z) - alpha) / (1 - 2 * alpha)


def logit_density(log_density: LogDensity, *, alpha: float) -> LogDensity:
    """The log-density on [0, 1] of data whose `logit_transform` has the given one.

    `log p(y) = log p(z) + log |dz/dy|`. What `p(z)` holds outside of logit(alpha)..logit(1 - alpha)
    is lost: the bound on discrete data stays one.

    Raises:
      UserError: if alpha is not between 0 and 1/2.
    """
    _check_alpha(alpha)

    def log_density_of_unit(y: Array) -> Array:
        z, log_det = logit_transform(y, alpha=alpha)
        return log_density(z) + log_det

    return log_density_of_unit


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 0.5:
        raise UserError(f"alpha is {alpha}; give a number between 0 and 0.5, such as 0.05")
