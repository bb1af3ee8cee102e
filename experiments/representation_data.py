"""The images of `experiments.representation`, and the views that are made of them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from experiments.decoding import decoding
from experiments.representation_config import Config, DatasetName
from metagen_jax.data.augment import (
    elastic,
    random_affine,
    random_flip,
    random_resized_crop,
)
from metagen_jax.data.colour_augment import colour_jitter, random_grey
from metagen_jax.data.sources import load_images
from metagen_jax.self_supervised.simclr import Augment
from metagen_jax.types import PRNGKey

# Splits of the source: to learn from, to choose probes by, to test. No character is in two of them.
_SPLITS: dict[DatasetName, tuple[str, str, str]] = {
    "glyphs": ("train", "val", "test"),
    "omniglot": ("{}/train", "{}/val", "{}/test"),
    "cifar10": ("train[:45000]", "train[45000:]", "test"),
}


class Part(NamedTuple):
    """Images and their classes; of characters every quarter turn is one more class."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"]


class Splits(NamedTuple):
    """Images to learn from, to choose probes by, and to test."""

    train: Part
    val: Part
    test: Part


def is_characters(config: Config) -> bool:
    return config.dataset != "cifar10"


def load_splits(config: Config) -> Splits:
    """The images; characters as ink, 28 pixels a side, with all their quarter turns."""
    parts = []
    with decoding(config.dataset) as progress:
        for split in _SPLITS[config.dataset]:
            loaded = load_images(
                config.dataset,
                split.format(config.split),
                data_dir=config.data_dir,
                size=28 if is_characters(config) else None,
                progress=progress,
            )
            parts.append(_prepare(config, loaded.images, loaded.labels))
    return Splits(*parts)


def _prepare(config: Config, images: np.ndarray, labels: np.ndarray) -> Part:
    if is_characters(config):
        # Sorted by class: the first images are whole classes.
        kept = slice(config.num_images)
        images, labels = 255 - images[kept], labels[kept]
        turned = [np.rot90(images, turns, (1, 2)) for turns in range(4)]
        return Part(np.concatenate(turned), np.concatenate([4 * labels + i for i in range(4)]))
    order = np.random.default_rng(0).permutation(len(images))[: config.num_images]
    return Part(images[order], labels[order])


def draw_batch(
    key: PRNGKey, data: tuple[Array, Array], *, batch_size: int
) -> tuple[Float[Array, "b h w c"], Int[Array, " b"]]:
    """Random images, from 0 to 1, and their labels."""
    images, labels = data
    chosen = jax.random.randint(key, (batch_size,), 0, len(images))
    return images[chosen] / 255.0, labels[chosen]


def view_of(config: Config) -> Augment:
    """`view(key, image)`: how a view of an image from 0 to 1 is made."""
    view = _character_view if is_characters(config) else _colour_view
    return functools.partial(view, size=config.view_size)


def _character_view(
    key: PRNGKey, image: Float[Array, "h w 1"], *, size: int | None
) -> Float[Array, "h2 w2 1"]:
    """Drawn by another hand: moved, slanted, bent."""
    affine_key, elastic_key, crop_key = jax.random.split(key, 3)
    affine = functools.partial(
        random_affine, max_rotation=0.35, max_shear=0.35, max_log_scale=0.25, max_shift=3.0
    )
    moved = affine(affine_key, image)
    bent = elastic(elastic_key, moved, displacement=0.8, smoothness=3.0)
    return random_resized_crop(crop_key, bent, min_area=0.8, size=size)


def _colour_view(
    key: PRNGKey, image: Float[Array, "h w 3"], *, size: int | None
) -> Float[Array, "h2 w2 3"]:
    """As published for CIFAR-10, but for smaller crops, of which a short training makes little.

    Appendix B.9 of the SimCLR paper, which leaves out the blur and crops down to 8 %.
    """
    crop_key, flip_key, jitter_key, grey_key = jax.random.split(key, 4)
    cropped = random_resized_crop(crop_key, image, min_area=0.2, size=size)
    image = random_flip(flip_key, cropped)
    return random_grey(grey_key, colour_jitter(jitter_key, image, strength=0.5))


def mild_view(key: PRNGKey, image: UInt8[Array, "h w 3"]) -> UInt8[Array, "h w 3"]:
    """What is fine-tuned on: most of the picture, its colours as they are."""
    crop_key, flip_key = jax.random.split(key)
    return random_flip(flip_key, random_resized_crop(crop_key, image, min_area=0.5))


def make_views(config: Config, images: Array, *, num_views: int) -> Float[Array, "n v h w c"]:
    """Views of images from 0 to 1, to look at."""
    keys = jax.random.split(jax.random.key(0), (len(images), num_views))
    view = view_of(config)
    of_one = jax.vmap(view, in_axes=(0, None))
    return jax.jit(jax.vmap(of_one))(keys, jnp.asarray(images))
