"""Log-probabilities of ONE example, in nats, with samplers, and bits per dimension.

The same for all of them:

- Nothing is summed. The log-probability of each element is returned, in the shape of `value` (of
  each pixel for the RGB mixture, whose event has three channels); their sum is the example's.
- Parameters have the shape of `value`; classes or components of one element are a last axis more.
- Discrete values are whole numbers of any dtype, as they are stored: 0 and 1, classes, levels
  0..255. Anything else, such as a pixel scaled to [0, 1], is outside the support: its
  log-probability is `-inf`, and it passes no gradient.
- Means and scales of logistics are in units in which the levels reach from -1 to 1: level `v` is at
  `2 v / (num_levels - 1) - 1`.
- Samplers take the key first and give one example. Discrete samples are int32.

All are exact to rounding, and finite in value and derivatives, in float32 for means up to 1e4 in
size and log-scales from -20 to 10; nothing is clipped. Cast half-precision parameters first.

Salimans, Karpathy, Chen, Kingma: PixelCNN++, 2017.
"""

import math

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, log_softmax, logsumexp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from metagen_jax.errors import UserError
from metagen_jax.types import AnyArray, PRNGKey


def bits_per_dim(
    log_prob: Float[AnyArray, "*shape"] | float, *, num_dims: int
) -> Float[AnyArray, "*shape"] | float:
    """`-log_prob / (num_dims ln 2)`, the unit in which likelihoods of images are compared.

    Args:
      log_prob: of the original data, such as levels 0..255, in nats, summed over an example. The
        log-density of data that were scaled is none; see `metagen_jax.generative.dequantisation`.
      num_dims: how many numbers an example has, every channel of every pixel: 3072 for CIFAR-10.

    Raises:
      UserError: if `num_dims` is not positive.
    """
    if num_dims < 1:
        raise UserError(f"num_dims is {num_dims}; give how many numbers an example has")
    return -log_prob / (num_dims * math.log(2))


def bernoulli_log_prob(
    value: Real[AnyArray, "*shape"] | Bool[AnyArray, "*shape"],
    logits: Float[Array, "*#shape"] | float,
) -> Float[Array, "*shape"]:
    """`log P(1) = log sigma(logits)` and `log P(0) = log sigma(-logits)`.

    Args:
      value: 0 or 1, or booleans. A grey value between them is outside the support: what is often
        called its Bernoulli likelihood is a cross-entropy, not the log-probability of anything.
      logits: of the shape of `value`, or one that broadcasts to it.

    Returns:
      In nats, of the shape of `value`.

    Raises:
      UserError: for logits that would broadcast `value`.
    """
    _check_broadcasts(value, logits=logits)
    one = jnp.asarray(value) == 1
    log_probs = log_sigmoid(jnp.where(one, logits, -logits))
    return jnp.where(one | (jnp.asarray(value) == 0), log_probs, -jnp.inf)


def sample_bernoulli(key: PRNGKey, logits: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """0 or 1 with the probabilities of `bernoulli_log_prob`, to the 2^-23 of a float32 draw."""
    return jax.random.bernoulli(key, jax.nn.sigmoid(logits)).astype(jnp.int32)


def categorical_log_prob(
    value: Real[AnyArray, "*shape"], logits: Float[Array, "*shape classes"]
) -> Float[Array, "*shape"]:
    """`log P(k) = log softmax(logits)[k]`.

    Args:
      value: classes 0..classes-1.
      logits: `(*shape, classes)`; a class of `-inf` has probability 0.

    Returns:
      In nats, of the shape of `value`.

    Raises:
      UserError: for logits of another shape.
    """
    _check_shape("logits", logits, value, (*value.shape, *logits.shape[-1:]))
    classes, supported = as_levels(value, logits.shape[-1], logits.dtype)
    index = classes.astype(jnp.int32)[..., None]
    log_probs = jnp.take_along_axis(log_softmax(logits), index, axis=-1)[..., 0]
    return jnp.where(supported, log_probs, -jnp.inf)


def sample_categorical(
    key: PRNGKey, logits: Float[Array, "*shape classes"]
) -> Int[Array, "*shape"]:
    """A class with the probabilities of `categorical_log_prob`."""
    return jax.random.categorical(key, logits).astype(jnp.int32)


def gaussian_log_prob(
    value: Float[AnyArray, "*shape"],
    mean: Float[Array, "*#shape"] | float,
    log_std: Float[Array, "*#shape"] | float,
) -> Float[Array, "*shape"]:
    """`-((x - mean) / std)^2 / 2 - log std - log(2 pi) / 2`, a density; diagonal when summed.

    Args:
      value: any numbers.
      mean: of the shape of `value`, or one that broadcasts to it.
      log_std: the natural logarithm of the standard deviation, likewise.

    Returns:
      In nats per unit of `value`, of its shape. It overflows where the square does, beyond 1.8e19
      standard deviations in float32.

    Raises:
      UserError: for parameters that would broadcast `value`.
    """
    _check_broadcasts(value, mean=mean, log_std=log_std)
    deviations = (value - mean) * jnp.exp(-log_std)
    return -0.5 * jnp.square(deviations) - log_std - 0.5 * math.log(2 * math.pi)


def sample_gaussian(
    key: PRNGKey, mean: Float[Array, "*shape"], log_std: Float[Array, "*#shape"] | float
) -> Float[Array, "*shape"]:
    """`mean + std * epsilon`, `epsilon ~ N(0, 1)`, differentiable in mean and `log_std`."""
    _check_broadcasts(mean, log_std=log_std)
    return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape, mean.dtype)


def discretized_logistic_log_prob(
    value: Real[AnyArray, "*shape"],
    mean: Float[Array, "*#shape"] | float,
    log_scale: Float[Array, "*#shape"] | float,
    *,
    num_levels: int = 256,
) -> Float[Array, "*shape"]:
    """The mass that a logistic distribution has nearer to a level than to any other.

    `P(v) = sigma((x + h - mean) / scale) - sigma((x - h - mean) / scale)`, level `v` at
    `x = 2 v / (num_levels - 1) - 1`, half a bin `h = 1 / (num_levels - 1)`; the first sigma is 1
    for the last level and the second 0 for level 0, so that the masses sum to 1: equation 2 of
    Salimans et al. 2017 with one component.

    Args:
      value: levels 0..num_levels-1.
      mean: of the shape of `value`, or one that broadcasts to it; -1 is at level 0, 1 at the last.
      log_scale: the natural logarithm of the scale, likewise. One of -7 or less puts next to all
        mass into one bin; how far it may go is the caller's to bound.
      num_levels: how many levels, 256 for 8 bits.

    Returns:
      In nats, of the shape of `value`.

    Raises:
      UserError: for parameters that would broadcast `value`, or fewer than two levels.
    """
    _check_broadcasts(value, mean=mean, log_scale=log_scale)
    levels, supported = as_levels(value, num_levels, jnp.result_type(float, mean, log_scale))
    return jnp.where(supported, _log_mass(levels, mean, log_scale, num_levels), -jnp.inf)


def sample_discretized_logistic(
    key: PRNGKey,
    mean: Float[Array, "*shape"],
    log_scale: Float[Array, "*#shape"] | float,
    *,
    num_levels: int = 256,
) -> Int[Array, "*shape"]:
    """The level nearest to a draw of the logistic: distributed as in its log-probability."""
    _check_broadcasts(mean, log_scale=log_scale)
    draw = mean + jnp.exp(log_scale) * jax.random.logistic(key, mean.shape, mean.dtype)
    level = (draw + 1) * ((num_levels - 1) / 2)
    return jnp.clip(jnp.round(level), 0, num_levels - 1).astype(jnp.int32)


def discretized_logistic_mixture_log_prob(
    value: Real[AnyArray, "*shape"],
    logits: Float[Array, "*shape components"],
    means: Float[Array, "*shape components"],
    log_scales: Float[Array, "*shape components"],
    *,
    num_levels: int = 256,
) -> Float[Array, "*shape"]:
    """`log sum_k softmax(logits)[k] P(v; means[k], log_scales[k])`: equation 2 of PixelCNN++.

    Args:
      value: levels 0..num_levels-1.
      logits, means, log_scales: `(*shape, components)`, as in `discretized_logistic_log_prob`.
      num_levels: how many levels, 256 for 8 bits.

    Returns:
      In nats, of the shape of `value`.

    Raises:
      UserError: for parameters of another shape, or fewer than two levels.
    """
    shape = (*value.shape, *logits.shape[-1:])
    for name, given in (("logits", logits), ("means", means), ("log_scales", log_scales)):
        _check_shape(name, given, value, shape)
    levels, supported = as_levels(value, num_levels, means.dtype)
    log_masses = _log_mass(levels[..., None], means, log_scales, num_levels)
    return jnp.where(supported, logsumexp(log_softmax(logits) + log_masses, axis=-1), -jnp.inf)


def sample_discretized_logistic_mixture(
    key: PRNGKey,
    logits: Float[Array, "*shape components"],
    means: Float[Array, "*shape components"],
    log_scales: Float[Array, "*shape components"],
    *,
    num_levels: int = 256,
) -> Int[Array, "*shape"]:
    """A component, then a level of it: distributed as in the mixture's log-probability."""
    component_key, level_key = jax.random.split(key)
    component = jax.random.categorical(component_key, logits)[..., None]
    mean, log_scale = (
        jnp.take_along_axis(x, component, axis=-1)[..., 0] for x in (means, log_scales)
    )
    return sample_discretized_logistic(level_key, mean, log_scale, num_levels=num_levels)


def discretized_logistic_mixture_rgb_log_prob(
    value: Real[AnyArray, "*pixels 3"],
    logits: Float[Array, "*pixels components"],
    means: Float[Array, "*pixels 3 components"],
    log_scales: Float[Array, "*pixels 3 components"],
    coefficients: Float[Array, "*pixels 3 components"],
    *,
    num_levels: int = 256,
) -> Float[Array, "*pixels"]:
    """A mixture over whole pixels, each channel's mean linear in the channels before it.

    `log sum_k softmax(logits)[k] P_k(r) P_k(g | r) P_k(b | r, g)`, discretised logistics with means
    `m_r`, `m_g + alpha r` and `m_b + beta r + gamma g`, where `r` and `g` count from -1 to 1:
    section 2.2 of Salimans et al. 2017.

    Args:
      value: levels 0..num_levels-1 of red, green and blue, on the last axis.
      logits: `(*pixels, components)`; the channels of a pixel come from one component.
      means, log_scales: `(*pixels, 3, components)`, as in `discretized_logistic_log_prob`.
      coefficients: `(*pixels, 3, components)`, alpha, beta and gamma: of red on green, of red on
        blue, of green on blue. As they are: the authors' network bounds its own by tanh.
      num_levels: how many levels, 256 for 8 bits.

    Returns:
      In nats, one number a pixel, `(*pixels,)`.

    Raises:
      UserError: for other shapes, or fewer than two levels.
    """
    pixels, components = value.shape[:-1], logits.shape[-1:]
    _check_shape("value", value, value, (*pixels, 3))
    _check_shape("logits", logits, value, (*pixels, *components))
    of_channels = {"means": means, "log_scales": log_scales, "coefficients": coefficients}
    for name, given in of_channels.items():
        _check_shape(name, given, value, (*pixels, 3, *components))
    levels, supported = as_levels(value, num_levels, means.dtype)
    scaled = _between_minus_one_and_one(levels, num_levels)[..., None]
    red, green = scaled[..., 0, :], scaled[..., 1, :]
    alpha, beta, gamma = (coefficients[..., i, :] for i in range(3))
    shifts = jnp.stack([jnp.zeros_like(alpha), alpha * red, beta * red + gamma * green], axis=-2)
    log_masses = _log_mass(levels[..., None], means + shifts, log_scales, num_levels).sum(-2)
    log_probs = logsumexp(log_softmax(logits) + log_masses, axis=-1)
    return jnp.where(supported.all(-1), log_probs, -jnp.inf)


def sample_discretized_logistic_mixture_rgb(
    key: PRNGKey,
    logits: Float[Array, "*pixels components"],
    means: Float[Array, "*pixels 3 components"],
    log_scales: Float[Array, "*pixels 3 components"],
    coefficients: Float[Array, "*pixels 3 components"],
    *,
    num_levels: int = 256,
) -> Int[Array, "*pixels 3"]:
    """A component, then red, green and blue of it: distributed as in its log-probability.

    The means of green and blue follow the levels drawn, not the draws before rounding.
    """
    component_key, *channel_keys = jax.random.split(key, 4)
    component = jax.random.categorical(component_key, logits)[..., None, None]
    mean, log_scale, slope = (
        jnp.take_along_axis(x, component, axis=-1)[..., 0]
        for x in (means, log_scales, coefficients)
    )

    def draw(channel: int, shift: Array | float) -> tuple[Array, Array]:
        level = sample_discretized_logistic(
            channel_keys[channel],
            mean[..., channel] + shift,
            log_scale[..., channel],
            num_levels=num_levels,
        )
        return level, _between_minus_one_and_one(level.astype(mean.dtype), num_levels)

    red, scaled_red = draw(0, 0.0)
    green, scaled_green = draw(1, slope[..., 0] * scaled_red)
    blue, _ = draw(2, slope[..., 1] * scaled_red + slope[..., 2] * scaled_green)
    return jnp.stack([red, green, blue], axis=-1)


def as_levels(
    value: Real[AnyArray, "*shape"], num_levels: int, dtype: jnp.dtype
) -> tuple[Float[Array, "*shape"], Bool[Array, "*shape"]]:
    """Values as floats, 0 for those that are not among 0..num_levels-1, and whether each is."""
    # Before anything is computed: twice a byte does not fit into a byte.
    levels = jnp.asarray(value).astype(dtype)
    supported = (levels >= 0) & (levels < num_levels) & (levels == jnp.floor(levels))
    return jnp.where(supported, levels, 0), supported


def _log_mass(
    levels: Float[Array, "*#shape"],
    mean: Float[Array, "*#shape"] | float,
    log_scale: Float[Array, "*#shape"] | float,
    num_levels: int,
) -> Float[Array, "*shape"]:
    """The log-mass of the logistic's bins, by
    `sigma(b) - sigma(a) = sigma(b) sigma(-a) (1 - exp(a - b))`.

    A product, so that nothing cancels, however far from the mean and however wide the scale.
    """
    if num_levels < 2:
        raise UserError(f"num_levels is {num_levels}; give 2 or more, 256 for 8 bits")
    # In units of levels edges are half numbers, so that neighbouring bins share theirs to the last
    # bit, and mass is neither lost nor counted twice. Scaled to [-1, 1], or with the product in the
    # differences below, compilers that fuse multiplication and addition round the two apart.
    half = (num_levels - 1) / 2
    centre = half * mean + half
    precision = jnp.exp(-log_scale) / half
    upper = (levels + 0.5 - centre) * precision
    lower = (levels - 0.5 - centre) * precision
    first, last = levels == 0, levels == num_levels - 1
    # Not jax.nn.log1mexp, whose second derivative is NaN beyond 88, in scales below e^-9.
    width = jnp.log(-jnp.expm1(-precision))
    return (
        jnp.where(last, 0, log_sigmoid(upper))
        + jnp.where(first, 0, log_sigmoid(-lower))
        + jnp.where(first | last, 0, width)
    )


def _between_minus_one_and_one(
    levels: Float[Array, "*shape"], num_levels: int
) -> Float[Array, "*shape"]:
    return 2 * levels / (num_levels - 1) - 1


def _check_broadcasts(value: ArrayLike, **parameters: ArrayLike) -> None:
    """Raises a UserError for parameters that don't broadcast to the shape of `value`."""
    shape = jnp.shape(value)
    for name, parameter in parameters.items():
        given = jnp.shape(parameter)
        aligned = zip(given[::-1], shape[::-1], strict=False)
        if len(given) > len(shape) or any(size not in (1, wanted) for size, wanted in aligned):
            raise UserError(
                f"{name} has shape {given} for values of shape {shape}; give {shape}, or one that "
                "broadcasts to it"
            )


def _check_shape(name: str, given: ArrayLike, value: ArrayLike, needed: tuple[int, ...]) -> None:
    if jnp.shape(given) != needed:
        raise UserError(
            f"{name} has shape {jnp.shape(given)} for values of shape {jnp.shape(value)}; give "
            f"{needed}"
        )
