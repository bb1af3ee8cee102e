"""The images of `experiments.density`, with light strokes high, in training, validation, test."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, UInt8

from experiments.decoding import decoding
from experiments.density_config import Config, DatasetName
from metagen_jax.data.sources import load_images
from metagen_jax.types import PRNGKey

# Splits of the source. Those by letter or character have no class in common.
_SPLITS: dict[DatasetName, tuple[str, str, str]] = {
    "binarized_mnist": ("train", "validation", "test"),
    "mnist": ("train[:50000]", "train[50000:]", "test"),
    "fashion_mnist": ("train[:50000]", "train[50000:]", "test"),
    "cifar10": ("train[:45000]", "train[45000:]", "test"),
    "omniglot": ("lake/train", "lake/val", "lake/test"),
    "glyphs": ("train", "val", "test"),
}
_DARK_INK = ("omniglot", "glyphs")


class Splits(NamedTuple):
    """Images `(n, h, w, c)` of values 0..255, or 0 and 1 if these are "static"; and classes."""

    train: UInt8[np.ndarray, "n h w c"]
    val: UInt8[np.ndarray, "m h w c"]
    test: UInt8[np.ndarray, "k h w c"]
    train_labels: Int32[np.ndarray, " n"]
    test_labels: Int32[np.ndarray, " k"]


def load_splits(config: Config) -> Splits:
    """The images, in an order that is the same every time."""
    with decoding(config.dataset) as progress:
        size = 28 if config.dataset in _DARK_INK else None
        parts = [
            load_images(
                config.dataset, split, data_dir=config.data_dir, size=size, progress=progress
            )
            for split in _SPLITS[config.dataset]
        ]
    # Of a set sorted by class the first images would be those of one class.
    order = [np.random.default_rng(0).permutation(len(part.images)) for part in parts]
    train, val, test = (part.images[index] for part, index in zip(parts, order, strict=True))
    train_labels, _, test_labels = (
        part.labels[index] for part, index in zip(parts, order, strict=True)
    )
    if config.dataset in _DARK_INK:
        train, val, test = (255 - images for images in (train, val, test))
    if config.values == "static" and config.dataset != "binarized_mnist":
        train, val, test = ((images > 127).astype(np.uint8) for images in (train, val, test))
    return Splits(train, val[: config.num_validation], test, train_labels, test_labels)


def draw_values(
    config: Config, key: PRNGKey, images: UInt8[Array | np.ndarray, "n h w c"]
) -> Int[Array, "n h w c"]:
    """What a model sees of stored images: 0 and 1, drawn if binarisation is dynamic, or levels."""
    images = jnp.asarray(images)
    if config.values == "dynamic":
        return jax.random.bernoulli(key, images / 255).astype(jnp.int32)
    return images.astype(jnp.int32)


def to_floats(config: Config, values: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Values as nets see them, from -1 to 1 for levels, 0 and 1 otherwise."""
    return values / 127.5 - 1 if config.values == "levels" else values.astype(jnp.float32)


def to_grey(config: Config, values: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Values as pictures show them, from 0 to 1."""
    return values.astype(jnp.float32) / (255 if config.values == "levels" else 1)
