"""Flow matching in `experiments.density`, between noise and images with uniform noise added."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.density_config import Config
from experiments.density_model import Model, Shape
from metagen_jax.generative.dequantisation import dequantized_log_prob, quantize
from metagen_jax.generative.flow_matching import (
    Velocity,
    dequantized_matching_loss,
    flow_matching_log_prob,
    flow_matching_sample,
    inpaint,
)
from metagen_jax.gradients import gradients
from metagen_jax.nets.velocity import VelocityUNet
from metagen_jax.types import Batch, Metrics, Params, PRNGKey

SAMPLE_STEPS, LIKELIHOOD_STEPS = 30, 20


def flow_matching(config: Config, shape: Shape) -> Model:
    """A U-Net's velocity field on images from -1 to 1."""
    net = VelocityUNet(num_filters=config.num_filters)
    velocity: Velocity = net.apply  # pyright: ignore[reportAssignmentType]
    num_levels = 256 if config.values == "levels" else 2
    grad_fn = gradients(dequantized_matching_loss(velocity, num_levels=num_levels))

    def to_levels(x: Array) -> Array:
        return quantize(x / 2 + 0.5, num_levels=num_levels)

    def grad_of_images(params: Params, images: Batch, key: Array) -> tuple[Params, Metrics]:
        return grad_fn(params, (images, None), key)

    log_density = flow_matching_log_prob(velocity, num_steps=LIKELIHOOD_STEPS, num_probes=1)

    def log_prob(params: Params, image: Array, key: PRNGKey) -> Array:
        noise_key, probe_key = jax.random.split(key)

        def of_unit(y: Array) -> Array:
            return log_density(params, (2 * y - 1, None), probe_key) + y.size * math.log(2)

        return dequantized_log_prob(noise_key, image, of_unit, num_levels=num_levels)

    def sample(params: Params, key: PRNGKey) -> Array:
        x = flow_matching_sample(key, velocity, params, shape=shape, num_steps=SAMPLE_STEPS)
        return to_levels(x) / (num_levels - 1)

    def complete(params: Params, image: Array, known: Array, key: PRNGKey) -> Array:
        centre = 2 * (image + 0.5) / num_levels - 1
        x = inpaint(key, velocity, params, centre, known, num_steps=SAMPLE_STEPS)
        return to_levels(x).astype(image.dtype)

    return Model(
        init=lambda key, images: net.init(key, jnp.zeros(shape), 0.0),
        grad_fn=grad_of_images,
        sample=sample,
        log_prob=None,
        test_log_prob=log_prob,
        kind=f"lower bound in the mean: uniform dequantisation, {LIKELIHOOD_STEPS} steps, 1 probe",
        complete=complete,
        loss_label="Squared error of the velocity",
    )
