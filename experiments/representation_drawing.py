"""The methods of `experiments.representation` that draw: holes, hidden patches, colours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array

from experiments.representation_config import Config
from experiments.representation_data import is_characters
from experiments.representation_method import (
    Method,
    apply_to,
    centre,
    encoder,
    init_chain,
    rate_of,
)
from metagen_jax.generative.gan import NON_SATURATING, GANParams, gan_optimizer, r1_penalty
from metagen_jax.gradients import gradients, task_keys
from metagen_jax.nets.gan import Discriminator, Generator
from metagen_jax.nets.patch_transformer import PatchTransformer, from_patches, to_patches
from metagen_jax.self_supervised.colorization import (
    ab_grid,
    annealed_mean,
    class_weights,
    colorization_loss,
    colour_frequencies,
    lab_to_rgb,
    rgb_to_lab,
)
from metagen_jax.self_supervised.inpainting import (
    hide_box,
    inpainting_gradients,
    masked_autoencoder_loss,
    split_patches,
    with_hole,
)
from metagen_jax.types import Params, PRNGKey

ADVERSARIAL_WEIGHT, R1_WEIGHT, SHOWN_SHARE = 1e-3, 0.1, 0.25
# Images whose colours are counted.
NUM_COUNTED = 5000


def inpainting(config: Config, images: np.ndarray) -> Method:
    """A context encoder fills a box of half of the sides, from its map, against a discriminator."""
    del images
    size = 28 if is_characters(config) else 32
    shape = (size, size, 1 if is_characters(config) else 3)
    net = encoder(config, pooled=False)
    decoder = Generator(shape, num_filters=config.num_filters)
    discriminator = Discriminator(num_filters=config.num_filters)
    apply_net, apply_decoder = apply_to(net, "net"), apply_to(decoder, "decoder")
    hide = functools.partial(hide_box, shape=(size, size), size=(size // 2, size // 2))

    def fill(params: Params, inputs: Array) -> Array:
        return apply_decoder(params, apply_net(params, inputs))

    def score(params: Params, images: Array) -> Array:
        scores = discriminator.apply(params, images)
        assert isinstance(scores, jax.Array)
        return scores

    def penalty(score_one, real: Array, fake: Array, key: PRNGKey) -> Array:
        del fake, key
        return R1_WEIGHT * r1_penalty(score_one, real)

    field = inpainting_gradients(
        fill,
        score,
        hide,
        losses=NON_SATURATING,
        adversarial_weight=ADVERSARIAL_WEIGHT,
        penalty=penalty,
    )

    def grad_fn(params: Params, images: Array, key):
        direction, metrics = field(params, centre(images), key)
        return direction, {**metrics, "loss": metrics["reconstruction_loss"]}

    def nothing_hidden(images: Array) -> Array:
        return with_hole(centre(images), jnp.zeros(images.shape[:3], bool))

    def init(key: PRNGKey, images: Array) -> GANParams:
        first, second = jax.random.split(key)
        generator = init_chain(first, nothing_hidden(images), net=net, decoder=decoder)
        return GANParams(generator, discriminator.init(second, images))

    def features(params: GANParams, images: Array, num_reference: int | None = None) -> Array:
        return apply_net(params.generator, nothing_hidden(images), num_reference).mean((1, 2))

    def draw(params: GANParams, images: Array, key: PRNGKey) -> Array:
        hidden = jax.vmap(hide)(task_keys(key, len(images)))[..., None]
        filled = fill(params.generator, with_hole(centre(images), hidden[..., 0])) / 2 + 0.5
        holed = jnp.where(hidden, 0.5, images)
        return jnp.stack([images, holed, jnp.where(hidden, filled, images)])

    return Method(
        init=init,
        grad_fn=grad_fn,
        features=features,
        net=lambda params: params.generator["net"],
        optimizer=lambda optimizer: gan_optimizer(
            optimizer,
            optax.adam(rate_of(config, steps=config.steps, peak=config.rate / 5), b1=0.5),
        ),
        draw=draw,
        rows=("image", "hole", "filled"),
    )


def mae(config: Config, images: np.ndarray) -> Method:
    """A transformer draws three quarters of the patches from the others."""
    del images
    size = 28 if is_characters(config) else 32
    shape = (size, size, 1 if is_characters(config) else 3)
    net = PatchTransformer(shape, width=config.num_filters, decoder_width=config.num_filters // 2)

    def cut(images: Array) -> Array:
        return to_patches(images, net.patch_size)

    def apply(params: Params, images: Array, shown: Array) -> Array:
        drawn = net.apply(params, images, shown)
        assert isinstance(drawn, jax.Array)
        return drawn

    # Of a character most patches are blank, and to normalise them would blow up what is in them.
    loss_fn = masked_autoencoder_loss(
        apply, cut, shown_share=SHOWN_SHARE, normalise=not is_characters(config)
    )

    def features(params: Params, images: Array, num_reference: int | None = None) -> Array:
        del num_reference
        tokens = net.apply(params, centre(images), method="features")
        assert isinstance(tokens, jax.Array)
        return tokens

    def draw(params: Params, images: Array, key: PRNGKey) -> Array:
        patches = cut(centre(images))
        shown, _ = split_patches(key, *patches.shape[:2], shown_share=SHOWN_SHARE)
        drawn = apply(params, centre(images), shown)
        if not is_characters(config):
            mean, deviation = patches.mean(-1, keepdims=True), patches.std(-1, keepdims=True)
            drawn = mean + deviation * drawn
        seen = jnp.zeros(patches.shape[:2], bool)
        seen = seen.at[jnp.arange(len(images))[:, None], shown].set(True)[..., None]
        rows = (patches, jnp.where(seen, patches, 0), jnp.where(seen, patches, drawn))
        return jnp.stack([from_patches(row, shape) for row in rows]) / 2 + 0.5

    return Method(
        init=lambda key, images: net.init(key, images, jnp.zeros((len(images), 1), jnp.int32)),
        grad_fn=gradients(lambda params, images, key: loss_fn(params, centre(images), key)),
        features=features,
        net=lambda params: params,
        draw=draw,
        rows=("image", "shown", "drawn"),
    )


def colorization(config: Config, images: np.ndarray) -> Method:
    """Colours of squares of 4x4 pixels, as classes, rare ones counting more, from lightness."""
    grid = ab_grid()
    net, head = encoder(config, pooled=False), nn.Dense(len(grid))
    apply_net, apply_head = apply_to(net, "net"), apply_to(head, "head")

    def logits(params: Params, lightness: Array) -> Array:
        return apply_head(params, apply_net(params, lightness))

    def lightness(images: Array) -> Array:
        return rgb_to_lab(images)[..., :1] / 50 - 1

    def features(params: Params, images: Array, num_reference: int | None = None) -> Array:
        return apply_net(params, lightness(images), num_reference).mean((1, 2))

    def draw(params: Params, images: Array, key: PRNGKey) -> Array:
        del key
        lab = rgb_to_lab(images)
        ab = annealed_mean(logits(params, lightness(images)), grid)
        ab = jax.image.resize(ab, (*lab.shape[:3], 2), "linear")
        coloured = lab_to_rgb(jnp.concatenate([lab[..., :1], ab], -1))
        grey = lab_to_rgb(lab * jnp.array([1.0, 0, 0]))
        return jnp.stack([images, grey, coloured])

    counted = images[:NUM_COUNTED] / np.float32(255)
    weights = class_weights(colour_frequencies(counted, grid, square=4))
    loss_fn = colorization_loss(logits, grid, weights)
    return Method(
        init=lambda key, images: init_chain(key, lightness(images), net=net, head=head),
        grad_fn=gradients(loss_fn),
        features=features,
        draw=draw,
        rows=("image", "seen", "coloured"),
    )
