"""What `experiments.density` needs of a model, and the distribution of one value of an image."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from experiments.density_config import Config
from metagen_jax.generative.editing import Complete
from metagen_jax.generative.likelihoods import (
    bernoulli_log_prob,
    discretized_logistic_mixture_log_prob,
    discretized_logistic_mixture_rgb_log_prob,
    sample_bernoulli,
    sample_discretized_logistic_mixture,
    sample_discretized_logistic_mixture_rgb,
)
from metagen_jax.generative.maximum_likelihood import LogProb
from metagen_jax.types import GradFn, Params, PRNGKey

Shape = tuple[int, int, int]
"""Height, width and channels."""


class Model(NamedTuple):
    """What the experiment needs of a model. An example is one image of values, `(h, w, c)`.

    Attributes:
      init: `(key, images) -> params`.
      grad_fn: over batches of images.
      sample: `(params, key) -> grey values`, 0 to 1, of one image.
      log_prob: of one image, for validation; None if the last parameters are taken.
      test_log_prob: the same, as well as it can be said; None if it can't.
      kind: what `test_log_prob` is.
      reconstruct: `(params, image) -> grey values`; None if the model has no latents.
      interpolate: `(params, image, image, weight) -> grey values`, likewise.
      latents: `(params, image) -> vector`, likewise.
      decode_grey: `(params, vector) -> grey values`, likewise.
      complete: `(params, image, known, key) -> image`, drawn where `known` is false; None if the
        model can't.
      optimizer: moves the parameters; None is Adam.
      update_slow: moves what follows them; see `train_step`.
      samples_are: what the grey values of `sample` are, where they are no draws.
      loss_label: what the learning curve shows.
    """

    init: Callable[[PRNGKey, Array], Params]
    grad_fn: GradFn
    sample: Callable[[Params, PRNGKey], Array]
    log_prob: LogProb | None
    test_log_prob: LogProb | None
    kind: str
    reconstruct: Callable[[Params, Array], Array] | None = None
    interpolate: Callable[[Params, Array, Array, Array], Array] | None = None
    latents: Callable[[Params, Array], Array] | None = None
    decode_grey: Callable[[Params, Array], Array] | None = None
    complete: Complete | None = None
    optimizer: optax.GradientTransformation | None = None
    update_slow: Callable[[Params, Array, PRNGKey], Params] | None = None
    samples_are: str = ""
    loss_label: str = "Negative log-likelihood, or its bound (nats an image)"


def num_value_params(config: Config) -> int:
    """How many numbers a net gives for each value: a logit, or three for each logistic."""
    return 3 * config.num_components if config.values == "levels" else 1


def value_log_prob(
    config: Config, values: Int[Array, "*shape"], outputs: Float[Array, "*shape params"]
) -> Float[Array, "*shape"]:
    """The log-probability of each value: Bernoulli, or a mixture of discretised logistics."""
    if config.values == "levels":
        return discretized_logistic_mixture_log_prob(values, *_mixture(outputs))
    return bernoulli_log_prob(values, outputs[..., 0])


def draw_value(
    config: Config, key: PRNGKey, outputs: Float[Array, "*shape params"]
) -> Int[Array, "*shape"]:
    """A draw of each value."""
    if config.values == "levels":
        return sample_discretized_logistic_mixture(key, *_mixture(outputs))
    return sample_bernoulli(key, outputs[..., 0])


def num_pixel_params(config: Config, channels: int) -> int:
    """How many numbers a net gives for each pixel with all its channels."""
    if _in_colour(config, channels):
        return 10 * config.num_components
    return channels * num_value_params(config)


def pixel_log_prob(
    config: Config, pixels: Int[Array, "*shape c"], outputs: Float[Array, "*shape params"]
) -> Float[Array, "*shape"]:
    """The log-probability of each pixel. Red, green and blue levels are one mixture of pixels, as
    PixelCNN++ has it; other channels are independent given the pixels before.
    """
    if _in_colour(config, pixels.shape[-1]):
        return discretized_logistic_mixture_rgb_log_prob(pixels, *_rgb_mixture(outputs))
    return value_log_prob(config, pixels, outputs.reshape(*pixels.shape, -1)).sum(-1)


def draw_pixel(
    config: Config, key: PRNGKey, outputs: Float[Array, " params"], channels: int
) -> Int[Array, " c"]:
    """A draw of one pixel."""
    if _in_colour(config, channels):
        return sample_discretized_logistic_mixture_rgb(key, *_rgb_mixture(outputs))
    return draw_value(config, key, outputs.reshape(channels, -1))


def _in_colour(config: Config, channels: int) -> bool:
    return config.values == "levels" and channels == 3


def _rgb_mixture(outputs: Array) -> tuple[Array, Array, Array, Array]:
    """Logits, means, log-scales and coefficients of `discretized_logistic_mixture_rgb_log_prob`."""
    components = outputs.shape[-1] // 10
    logits, others = outputs[..., :components], outputs[..., components:]
    means, log_scales, coefficients = jnp.split(
        others.reshape(*outputs.shape[:-1], 9, components), 3, axis=-2
    )
    return logits, means, jnp.clip(log_scales - 2, -7, 3), jnp.tanh(coefficients)


def mean_value(config: Config, outputs: Float[Array, "*shape params"]) -> Float[Array, "*shape"]:
    """The mean of each value, as a grey value from 0 to 1."""
    if config.values == "levels":
        logits, means, _ = _mixture(outputs)
        return jnp.clip((jax.nn.softmax(logits) * means).sum(-1) / 2 + 0.5, 0, 1)
    return jax.nn.sigmoid(outputs[..., 0])


def _mixture(outputs: Array) -> tuple[Array, Array, Array]:
    """Logits, means and log-scales, which begin at an eighth of the range."""
    logits, means, log_scales = jnp.split(outputs, 3, axis=-1)
    return logits, means, jnp.clip(log_scales - 2, -7, 3)
