"""The variational autoencoders of `experiments.density`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.density_config import Config
from experiments.density_data import to_floats
from experiments.density_model import (
    Model,
    Shape,
    draw_value,
    mean_value,
    num_value_params,
    value_log_prob,
)
from metagen_jax.evaluation.likelihood import importance_sampled_log_prob
from metagen_jax.generative import vae
from metagen_jax.generative.editing import spherical_interpolation, vae_complete
from metagen_jax.generative.flows import iaf
from metagen_jax.generative.maximum_likelihood import LogProb, negative_log_likelihood_loss
from metagen_jax.gradients import gradients
from metagen_jax.nets.vae import ConvVAE, DenseVAE, LadderVAE
from metagen_jax.types import Params, PRNGKey

IMPORTANCE_CHUNK = 50
COMPLETION_STEPS = 100
# Of the masked net of each layer of a posterior's flow, and of what the encoder tells it.
FLOW_UNITS = 128


def _log_likelihood(config: Config, image: Array, decoded: Array) -> Array:
    return value_log_prob(config, image, decoded).sum()


def gaussian_vae(config: Config, shape: Shape) -> Model:
    """A Gaussian posterior, by a perceptron or convolutions."""
    latents, num_params = config.num_latents, num_value_params(config)
    if config.model == "conv_vae":
        net = ConvVAE(shape, latents, num_filters=config.num_filters, num_params=num_params)
    else:
        net = DenseVAE(shape, latents, config.hidden_sizes, num_params=num_params)
    apply: Callable[..., Any] = net.apply

    def encode(params: Params, image: Array) -> tuple[Array, Array]:
        return apply(params, to_floats(config, image), method="encode")

    def decode(params: Params, z: Array) -> Array:
        return apply(params, z, method="decode")

    log_likelihood = functools.partial(_log_likelihood, config)
    infer = vae.gaussian_inference(encode, decode, log_likelihood)
    trained = None
    if config.doubly_reparameterized:
        trained = vae.doubly_reparameterized_log_prob(
            encode, decode, log_likelihood, num_samples=config.num_samples
        )
    model = _one_level(
        config,
        init=lambda key, images: net.init(key, to_floats(config, images[0])),
        infer=infer,
        trained=trained,
        decode=decode,
        latents=lambda params, image: encode(params, image)[0],
    )
    complete = vae_complete(
        encode,
        decode,
        log_likelihood,
        functools.partial(draw_value, config),
        num_steps=COMPLETION_STEPS,
        num_warmup=COMPLETION_STEPS,
    )
    return model._replace(complete=complete)


def iaf_vae(config: Config, shape: Shape) -> Model:
    """A posterior that an inverse autoregressive flow makes of a perceptron's Gaussian."""
    net = DenseVAE(
        shape,
        config.num_latents,
        config.hidden_sizes,
        num_params=num_value_params(config),
        num_context=FLOW_UNITS,
    )
    apply: Callable[..., Any] = net.apply
    bijector = iaf(num_layers=config.num_layers, hidden_sizes=(FLOW_UNITS,))

    def init(key: PRNGKey, images: Array) -> Params:
        net_key, flow_key = jax.random.split(key)
        one = jnp.zeros((1, config.num_latents)), jnp.zeros((1, FLOW_UNITS))
        return {
            "net": net.init(net_key, to_floats(config, images[0])),
            "flow": bijector.init(flow_key, *one),
        }

    def encode(params: Params, image: Array) -> tuple[Array, Array, Array]:
        return apply(params["net"], to_floats(config, image), method="encode_with_context")

    def decode(params: Params, z: Array) -> Array:
        return apply(params["net"], z, method="decode")

    def flow(params: Params, context: Array, u: Array) -> tuple[Array, Array]:
        return bijector.inverse(params["flow"], u, context)

    def latents(params: Params, image: Array) -> Array:
        mean, _, context = encode(params, image)
        return flow(params, context, mean)[0]

    log_likelihood = functools.partial(_log_likelihood, config)
    infer = vae.gaussian_inference(encode, decode, log_likelihood, flow=flow)
    return _one_level(config, init=init, infer=infer, decode=decode, latents=latents)


def _one_level(
    config: Config,
    *,
    init: Callable[[PRNGKey, Array], Params],
    infer: vae.Infer,
    decode: vae.Decode,
    latents: Callable[[Params, Array], Array],
    trained: LogProb | None = None,
) -> Model:
    """The model of one level of latents; `trained` is its bound if it is another than usual."""
    bound = vae.importance_weighted_log_prob(infer, num_samples=config.num_samples)
    if trained is None and config.num_samples == 1:
        loss_fn = vae.vae_loss(infer)
    else:
        loss_fn = negative_log_likelihood_loss(trained or bound)

    def grey(params: Params, z: Array) -> Array:
        return mean_value(config, decode(params, z))

    def interpolate(params: Params, first: Array, last: Array, weight: Array) -> Array:
        ends = latents(params, first), latents(params, last)
        return grey(params, spherical_interpolation(*ends, weight))

    return Model(
        init=init,
        grad_fn=gradients(loss_fn),
        log_prob=bound,
        **_importance_sampled(config, infer),
        sample=lambda params, key: grey(params, jax.random.normal(key, (config.num_latents,))),
        samples_are="means of the pixels",
        reconstruct=lambda params, image: grey(params, latents(params, image)),
        interpolate=interpolate,
        latents=latents,
        decode_grey=grey,
    )


def ladder_vae(config: Config, shape: Shape) -> Model:
    net = LadderVAE(
        shape,
        num_latents=(2 * config.num_latents, config.num_latents),
        hidden_sizes=config.hidden_sizes,
        num_params=num_value_params(config),
    )
    apply: Callable[..., Any] = net.apply

    def draw(params: Params, image: Array, key: PRNGKey) -> tuple[Array, Any]:
        return apply(params, to_floats(config, image), key)

    infer = vae.hierarchical_inference(draw, functools.partial(_log_likelihood, config))
    return Model(
        init=lambda key, images: net.init(key, to_floats(config, images[0]), key),
        grad_fn=gradients(vae.vae_loss(infer)),
        log_prob=vae.importance_weighted_log_prob(infer, num_samples=1),
        **_importance_sampled(config, infer),
        sample=lambda params, key: mean_value(config, apply(params, key, method="sample")),
        samples_are="means of the pixels",
        reconstruct=lambda params, image: mean_value(
            config, draw(params, image, jax.random.key(0))[0]
        ),
    )


def _importance_sampled(config: Config, infer: vae.Infer) -> dict:
    return {
        "test_log_prob": importance_sampled_log_prob(
            infer, num_samples=config.test_samples, chunk=IMPORTANCE_CHUNK
        ),
        "kind": f"lower bound, {config.test_samples} importance samples",
    }
