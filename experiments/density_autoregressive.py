"""The autoregressive models of `experiments.density`: exact, and sampled pixel by pixel."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.density_config import Config
from experiments.density_data import to_floats, to_grey
from experiments.density_model import (
    Model,
    Shape,
    draw_pixel,
    draw_value,
    num_pixel_params,
    num_value_params,
    pixel_log_prob,
    value_log_prob,
)
from metagen_jax.generative.autoregressive import (
    autoregressive_log_prob,
    sample_fixed_point,
    sample_pixelcnn,
)
from metagen_jax.generative.editing import Complete
from metagen_jax.generative.maximum_likelihood import LogProb, negative_log_likelihood_loss
from metagen_jax.gradients import gradients
from metagen_jax.nets.made import MADE
from metagen_jax.nets.pixelcnn import PixelCNN
from metagen_jax.nets.pixelrnn import PixelRNN
from metagen_jax.types import Metrics, Params, PRNGKey


def made(config: Config, shape: Shape) -> Model:
    """MADE over the values of an image in the order of reading.

    Each step of training takes one of the sets of masks; otherwise a value's probability is the
    mean over all of them, a distribution as well.
    """
    num_params = num_value_params(config)
    net = MADE(config.hidden_sizes, num_params, num_masks=config.num_masks, direct=True)

    def of_mask(params: Params, image: Array, index: Array | int) -> Array:
        apply: Callable[..., Any] = net.apply
        by_param = apply(params, to_floats(config, image).ravel(), mask_index=index)
        return by_param.T.reshape(*image.shape, num_params)

    def outputs(params: Params, image: Array) -> Array:
        if config.num_masks == 1:
            return of_mask(params, image, 0)
        indices = jnp.arange(config.num_masks)
        logits = jax.lax.map(lambda index: of_mask(params, image, index), indices)
        # The log-odds of the mean probability.
        set_, unset = (jax.nn.logsumexp(jax.nn.log_sigmoid(x), axis=0) for x in (logits, -logits))
        return set_ - unset

    def loss_fn(params: Params, images: Array, key: Array) -> tuple[Array, Metrics]:
        index_key = key if key.ndim == 0 else key[0]
        index = jax.random.randint(index_key, (), 0, config.num_masks)
        log_prob = log_prob_by(lambda params, image: of_mask(params, image, index))
        return negative_log_likelihood_loss(log_prob)(params, images, key)

    def complete(params: Params, image: Array, known: Array, key: PRNGKey) -> Array:
        predict = functools.partial(outputs, params)
        draw = functools.partial(draw_value, config)
        return sample_fixed_point(key, predict, draw, image, known).sample

    def init(key: PRNGKey, images: Array) -> Params:
        params: Any = net.init(key, to_floats(config, images[0]).ravel())
        if config.values == "levels":
            return params
        # At the log-odds of the mean image: of a pixel that is hardly ever set the net would learn
        # late that it isn't, and samples have specks till then.
        ones, number = images.reshape(len(images), -1).sum(0), len(images)
        head = params["params"]["head"] | {"bias": jnp.log((ones + 0.5) / (number - ones + 0.5))}
        return {"params": params["params"] | {"head": head}}

    def log_prob_by(apply: Callable[[Params, Array], Array]) -> LogProb:
        return autoregressive_log_prob(apply, functools.partial(value_log_prob, config))

    model = _model(config, shape, init, log_prob_by(outputs), complete)
    return model._replace(grad_fn=gradients(loss_fn))


def pixelcnn(config: Config, shape: Shape) -> Model:
    """The gated PixelCNN, told the place of each pixel: few layers see few rows."""
    net = PixelCNN(
        num_outputs=num_pixel_params(config, shape[2]),
        features=config.num_filters,
        num_layers=config.num_layers,
        num_levels=256 if config.values == "levels" else 2,
        kernel_size=config.kernel_size,
    )
    where = places(*shape[:2])

    def complete(params: Params, image: Array, known: Array, key: PRNGKey) -> Array:
        draw = _draw(config, shape)
        return sample_pixelcnn(key, net, params, draw, image, known[..., 0], condition=where)

    return _of_pixels(config, shape, net, complete, condition=where)


def places(height: int, width: int) -> Array:
    """The row and the column of each pixel, each as a one-hot vector: `(h, w, h + w)`."""
    rows, columns = jnp.indices((height, width))
    return jnp.concatenate([jax.nn.one_hot(rows, height), jax.nn.one_hot(columns, width)], axis=-1)


def pixelrnn(config: Config, shape: Shape) -> Model:
    """PixelRNN by rows or diagonals."""
    net = PixelRNN(
        num_outputs=num_pixel_params(config, shape[2]),
        recurrence="row" if config.model == "row_lstm" else "diagonal",
        features=config.num_filters,
        num_layers=config.num_layers,
        num_levels=256 if config.values == "levels" else 2,
    )

    def complete(params: Params, image: Array, known: Array, key: PRNGKey) -> Array:
        apply: Callable[..., Any] = net.apply
        predict = functools.partial(apply, params)
        return sample_fixed_point(key, predict, _draw(config, shape), image, known[..., 0]).sample

    return _of_pixels(config, shape, net, complete)


def _draw(config: Config, shape: Shape) -> Callable[[PRNGKey, Array], Array]:
    return lambda key, outputs: draw_pixel(config, key, outputs, shape[2])


def _of_pixels(
    config: Config, shape: Shape, net, complete: Complete, *, condition: Array | None = None
) -> Model:
    """The model of a net whose outputs are by pixel, given a condition if it takes one."""

    def apply(params: Params, image: Array) -> Array:
        return net.apply(params, image, condition)

    def init(key: PRNGKey, images: Array) -> Params:
        return net.init(key, images[0], condition)

    log_prob = autoregressive_log_prob(apply, functools.partial(pixel_log_prob, config))
    return _model(config, shape, init, log_prob, complete)


def _model(
    config: Config,
    shape: Shape,
    init: Callable[[PRNGKey, Array], Params],
    log_prob: LogProb,
    complete: Complete,
) -> Model:
    """The model of an exact log-probability."""
    nothing = jnp.zeros(shape, jnp.int32)

    def sample(params: Params, key: PRNGKey) -> Array:
        return to_grey(config, complete(params, nothing, jnp.zeros(shape, bool), key))

    return Model(
        init=init,
        grad_fn=gradients(negative_log_likelihood_loss(log_prob)),
        log_prob=log_prob,
        test_log_prob=log_prob,
        kind="exact",
        sample=sample,
        complete=complete,
    )
