"""The GAN of `experiments.density`: no likelihood, samples alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from experiments.density_config import Config
from experiments.density_data import to_floats
from experiments.density_model import Model, Shape
from metagen_jax.generative.gan import (
    NON_SATURATING,
    GANParams,
    Score,
    gan_gradients,
    gan_optimizer,
    r1_penalty,
)
from metagen_jax.nets.gan import Discriminator, Generator
from metagen_jax.types import Params, PRNGKey

R1_WEIGHT, AVERAGE_RATE = 0.2, 1e-3


def gan(config: Config, shape: Shape) -> Model:
    """Non-saturating, with R1; samples are those of the generator's moving average."""
    generator = Generator(shape, num_filters=config.num_filters)
    discriminator = Discriminator(num_filters=config.num_filters)
    draw: Callable[..., Array] = generator.apply  # pyright: ignore[reportAssignmentType]
    score: Score = discriminator.apply  # pyright: ignore[reportAssignmentType]

    def generate(params: Params, batch: Array, keys: Key[Array, " n"]) -> Array:
        del batch
        latents = jax.vmap(lambda key: jax.random.normal(key, (config.num_latents,)))(keys)
        return draw(params, latents)

    def penalty(score_one, real: Array, fake: Array, key: PRNGKey) -> Array:
        del fake, key
        return R1_WEIGHT * r1_penalty(score_one, real)

    field = gan_gradients(generate, score, losses=NON_SATURATING, penalty=penalty)

    def init(key: PRNGKey, images: Array) -> GANParams:
        first, second = jax.random.split(key)
        params = generator.init(first, jnp.zeros((1, config.num_latents)))
        return GANParams(params, discriminator.init(second, to_floats(config, images[:1])), params)

    # A short run would else end with an average of what it began with: noise.
    average_rate = min(max(AVERAGE_RATE, 10 / config.steps), 1.0)

    def update_slow(params: GANParams, batch: Array, key: PRNGKey) -> GANParams:
        del batch, key
        average = optax.incremental_update(params.generator, params.average, average_rate)
        return params._replace(average=average)

    def sample(params: GANParams, key: PRNGKey) -> Array:
        image = generate(params.average, jnp.zeros(()), key[None])[0]
        return image / 2 + 0.5 if config.values == "levels" else image

    adam = optax.adam(config.rate, b1=0.5)
    return Model(
        init=init,
        grad_fn=lambda params, images, key: field(params, to_floats(config, images), key),
        sample=sample,
        log_prob=None,
        test_log_prob=None,
        kind="no likelihood",
        optimizer=gan_optimizer(adam, adam),
        update_slow=update_slow,
        loss_label="Generator's loss",
    )
