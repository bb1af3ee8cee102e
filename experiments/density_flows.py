"""The normalizing flows of `experiments.density`, over images with uniform noise added."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from experiments.density_config import Config
from experiments.density_model import Model, Shape
from metagen_jax.generative import flows
from metagen_jax.generative.bijectors import Bijector
from metagen_jax.generative.couplings import spline_transform
from metagen_jax.generative.dequantisation import (
    dequantized_log_prob,
    inverse_logit_transform,
    logit_density,
    logit_transform,
    quantize,
)
from metagen_jax.generative.editing import flow_complete, spherical_interpolation
from metagen_jax.generative.maximum_likelihood import LogProb, negative_log_likelihood_loss
from metagen_jax.gradients import gradients
from metagen_jax.types import Params, PRNGKey

ALPHA_OF_IMAGES, ALPHA_OF_VECTORS = 0.05, 1e-6
"""Of the logit transform, as RealNVP and MAF have it. With the larger one a pixel that is nearly
always blank hardly varies, and ink there would lie hundreds of standard deviations away from it: a
scale for each pixel needs the smaller."""

COMPLETION_STEPS, COMPLETION_NOISE = 100, 0.1


def flow(config: Config, shape: Shape) -> Model:
    """A flow of images or, for MAF and splines, of the vectors of their values."""
    images = config.model in ("realnvp", "glow")
    alpha = ALPHA_OF_IMAGES if images else ALPHA_OF_VECTORS
    bijector = _bijector(config)
    flow_shape = shape if images else (shape[0] * shape[1] * shape[2],)
    log_density = flows.flow_log_prob(bijector)
    draw = flows.flow_sample(bijector, flow_shape)
    num_levels = 256 if config.values == "levels" else 2

    def to_reals(key: PRNGKey, image: Array) -> Array:
        noise = jax.random.uniform(key, image.shape)
        return logit_transform((image + noise) / num_levels, alpha=alpha)[0].reshape(flow_shape)

    def to_levels(z: Array) -> Array:
        y = inverse_logit_transform(z.reshape(shape), alpha=alpha)
        return quantize(y, num_levels=num_levels)

    def to_grey(z: Array) -> Array:
        return to_levels(z) / (num_levels - 1)

    def log_prob_by(num_samples: int) -> LogProb:
        def log_prob(params: Params, image: Array, key: PRNGKey) -> Array:
            def of_reals(z: Array) -> Array:
                return log_density(params, z.reshape(flow_shape), key)

            density = logit_density(of_reals, alpha=alpha)
            return dequantized_log_prob(
                key, image, density, num_samples=num_samples, num_levels=num_levels
            )

        return log_prob

    def interpolate(params: Params, first: Array, last: Array, weight: Array) -> Array:
        ends = [
            bijector.forward(params, to_reals(jax.random.key(i), image), None)[0]
            for i, image in enumerate((first, last))
        ]
        (first_z, unravel), (last_z, _) = map(ravel_pytree, ends)
        z = unravel(spherical_interpolation(first_z, last_z, weight))
        return to_grey(bijector.inverse(params, z, None)[0])

    run_chain = flow_complete(
        bijector,
        noise=COMPLETION_NOISE,
        num_steps=COMPLETION_STEPS,
        num_warmup=COMPLETION_STEPS,
    )

    def complete(params: Params, image: Array, known: Array, key: PRNGKey) -> Array:
        noise_key, chain_key = jax.random.split(key)
        x = run_chain(params, to_reals(noise_key, image), known.reshape(flow_shape), chain_key)
        return jnp.where(known, image, to_levels(x).astype(image.dtype))

    def init(key: PRNGKey, batch: Array) -> Params:
        keys = jax.random.split(key, len(batch))
        return bijector.init(key, jax.vmap(to_reals)(keys, batch))

    return Model(
        init=init,
        grad_fn=gradients(negative_log_likelihood_loss(log_prob_by(1))),
        log_prob=log_prob_by(1),
        test_log_prob=log_prob_by(config.test_samples),
        kind=f"lower bound, {config.test_samples} samples of uniform dequantisation",
        sample=lambda params, key: to_grey(draw(key, params)),
        interpolate=interpolate,
        # The inverse of the others takes a pass of the net for each value of an image.
        complete=complete if images else None,
    )


def _bijector(config: Config) -> Bijector:
    builders: dict[str, Callable[[], Bijector]] = {
        "realnvp": lambda: flows.realnvp_images(num_filters=config.num_filters),
        "glow": lambda: flows.glow_images(num_filters=config.num_filters),
        "maf": lambda: flows.maf(hidden_sizes=config.hidden_sizes),
        "spline": lambda: flows.maf(
            hidden_sizes=config.hidden_sizes, transform=spline_transform(bound=6.0)
        ),
    }
    return builders[config.model]()
