"""The models of `experiments.density`: each a loss, a test and a sampler of the same images."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.density_config import Config, ModelName
from experiments.density_data import to_floats
from metagen_jax.evaluation.likelihood import importance_sampled_log_prob
from metagen_jax.generative import vae
from metagen_jax.generative.editing import Complete, vae_complete
from metagen_jax.generative.likelihoods import (
    bernoulli_log_prob,
    discretized_logistic_log_prob,
    sample_bernoulli,
    sample_discretized_logistic,
)
from metagen_jax.generative.maximum_likelihood import LogProb, negative_log_likelihood_loss
from metagen_jax.nets.vae import ConvVAE, DenseVAE, LadderVAE
from metagen_jax.types import LossFn, Params, PRNGKey

IMPORTANCE_CHUNK = 50
COMPLETION_STEPS = 100


class Model(NamedTuple):
    """What the experiment needs of a model. An example is one image of values, `(h, w, c)`.

    Attributes:
      init: `(key, images) -> params`.
      loss_fn: over batches of images.
      log_prob: of one image, for validation.
      test_log_prob: the same, as well as it can be said.
      kind: what `test_log_prob` is.
      sample: `(params, key) -> grey values`, 0 to 1, of one image.
      reconstruct: `(params, image) -> grey values`; None if the model has no latents.
      interpolate: `(params, image, image, weight) -> grey values`, likewise.
      complete: `(params, image, known, key) -> image`, drawn where `known` is false; None if the
        model can't.
    """

    init: Callable[[PRNGKey, Array], Params]
    loss_fn: LossFn
    log_prob: LogProb
    test_log_prob: LogProb
    kind: str
    sample: Callable[[Params, PRNGKey], Array]
    reconstruct: Callable[[Params, Array], Array] | None = None
    interpolate: Callable[[Params, Array, Array, Array], Array] | None = None
    complete: Complete | None = None


def _log_likelihood(config: Config, image: Array, decoded: Array) -> Array:
    if config.values == "levels":
        return discretized_logistic_log_prob(image, decoded[..., 0], decoded[..., 1] - 2).sum()
    return bernoulli_log_prob(image, decoded).sum()


def _draw(config: Config, key: PRNGKey, decoded: Array) -> Array:
    if config.values == "levels":
        return sample_discretized_logistic(key, decoded[..., 0], decoded[..., 1] - 2)
    return sample_bernoulli(key, decoded)


def _mean(config: Config, decoded: Array) -> Array:
    """The mean of `p(x | z)` as a grey value."""
    if config.values == "levels":
        return jnp.clip(decoded[..., 0] / 2 + 0.5, 0, 1)
    return jax.nn.sigmoid(decoded)


def _num_params(config: Config) -> int:
    return 2 if config.values == "levels" else 1


def _gaussian_vae(config: Config, shape: tuple[int, int, int]) -> Model:
    latents, outputs = config.num_latents, _num_params(config)
    if config.model == "conv_vae":
        net = ConvVAE(shape, latents, num_filters=config.num_filters, num_params=outputs)
    else:
        net = DenseVAE(shape, latents, config.hidden_sizes, num_params=outputs)
    apply: Callable[..., Any] = net.apply

    def encode(params: Params, image: Array) -> tuple[Array, Array]:
        return apply(params, to_floats(config, image), method="encode")

    def decode(params: Params, z: Array) -> Array:
        return apply(params, z, method="decode")

    def grey(params: Params, z: Array) -> Array:
        return _mean(config, decode(params, z))

    def reconstruct(params: Params, image: Array) -> Array:
        return grey(params, encode(params, image)[0])

    def interpolate(params: Params, first: Array, last: Array, weight: Array) -> Array:
        ends = encode(params, first)[0], encode(params, last)[0]
        return grey(params, (1 - weight) * ends[0] + weight * ends[1])

    log_likelihood = functools.partial(_log_likelihood, config)
    infer = vae.gaussian_inference(encode, decode, log_likelihood)
    bound = vae.importance_weighted_log_prob(infer, num_samples=config.num_samples)
    if config.doubly_reparameterized:
        trained = vae.doubly_reparameterized_log_prob(
            encode, decode, log_likelihood, num_samples=config.num_samples
        )
        loss_fn = negative_log_likelihood_loss(trained)
    elif config.num_samples > 1:
        loss_fn = negative_log_likelihood_loss(bound)
    else:
        loss_fn = vae.vae_loss(infer)
    return Model(
        init=lambda key, images: net.init(key, to_floats(config, images[0])),
        loss_fn=loss_fn,
        log_prob=bound,
        **_importance_sampled(config, infer),
        sample=lambda params, key: grey(params, jax.random.normal(key, (config.num_latents,))),
        reconstruct=reconstruct,
        interpolate=interpolate,
        complete=vae_complete(
            encode,
            decode,
            log_likelihood,
            functools.partial(_draw, config),
            num_steps=COMPLETION_STEPS,
            num_warmup=COMPLETION_STEPS,
        ),
    )


def _ladder_vae(config: Config, shape: tuple[int, int, int]) -> Model:
    net = LadderVAE(
        shape,
        num_latents=(2 * config.num_latents, config.num_latents),
        hidden_sizes=config.hidden_sizes,
        num_params=_num_params(config),
    )
    apply: Callable[..., Any] = net.apply

    def draw(params: Params, image: Array, key: PRNGKey) -> tuple[Array, Any]:
        return apply(params, to_floats(config, image), key)

    infer = vae.hierarchical_inference(draw, functools.partial(_log_likelihood, config))
    return Model(
        init=lambda key, images: net.init(key, to_floats(config, images[0]), key),
        loss_fn=vae.vae_loss(infer),
        log_prob=vae.importance_weighted_log_prob(infer, num_samples=1),
        **_importance_sampled(config, infer),
        sample=lambda params, key: _mean(config, apply(params, key, method="sample")),
        reconstruct=lambda params, image: _mean(config, draw(params, image, jax.random.key(0))[0]),
    )


def _importance_sampled(config: Config, infer: vae.Infer) -> dict:
    return {
        "test_log_prob": importance_sampled_log_prob(
            infer, num_samples=config.test_samples, chunk=IMPORTANCE_CHUNK
        ),
        "kind": f"lower bound, {config.test_samples} importance samples",
    }


MODELS: dict[ModelName, Callable[[Config, tuple[int, int, int]], Model]] = {
    "vae": _gaussian_vae,
    "conv_vae": _gaussian_vae,
    "iwae": _gaussian_vae,
    "ladder_vae": _ladder_vae,
}
