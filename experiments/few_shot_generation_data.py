"""The images of `experiments.few_shot_generation`, ink high, and the episodes drawn from them."""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from experiments.decoding import decoding
from experiments.few_shot_generation_config import USE_QUERIES, Config
from metagen_jax.data.classes import LabelledImages, select_classes
from metagen_jax.data.episodes import ClassData, check_episodes, group_by_class, sample_batch
from metagen_jax.data.set_episodes import sample_set_episode, vary_shots
from metagen_jax.data.sources import load_images
from metagen_jax.errors import UserError
from metagen_jax.evaluation.few_shot import Sample
from metagen_jax.types import Episode, PRNGKey

PARTS = ("train", "val", "test")
# Of validation in training. They depend on no setting of the test, as that may be made again.
VALIDATION_SHOTS, VALIDATION_QUERIES = (1, 4), 4


class Splits(NamedTuple):
    """Images by class, no class in two parts: grey of 8 bits, or 0 and 1 if values are "stored"."""

    train: ClassData
    val: ClassData
    test: ClassData


def load_splits(config: Config) -> Splits:
    """The images of training, validation and test classes, checked to suffice for the episodes."""
    prefix = f"{config.split}/" if config.dataset == "omniglot" else ""
    with decoding(config.dataset) as progress:
        train, val, test = (
            load_images(
                config.dataset,
                prefix + part,
                data_dir=config.data_dir,
                size=config.image_size,
                resampling=config.resampling,
                progress=progress,
            )
            for part in PARTS
        )
    if config.sets_of == "alphabets":
        train, val, test = map(by_alphabet, (train, val, test))
    test = frozen_subset(test, config.num_test_classes)
    splits = Splits(*(to_class_data(config, images) for images in (train, val, test)))
    check_sizes(config, splits)
    return splits


def check_sizes(config: Config, splits: Splits) -> None:
    """Raises a UserError if a class is too small for the episodes of its part."""
    anew, anew_at_test = config.replacement == "always", config.replacement != "never"
    train_counts = config.train_shots, config.num_queries
    test_counts = max(config.shots), config.test_queries
    of_training, of_test = "by train_shots and num_queries", "by shots and test_queries"
    for data, of, counts, replacement in (
        (splits.train, f"training classes, {of_training}", train_counts, anew),
        (splits.val, "validation classes", (max(VALIDATION_SHOTS), VALIDATION_QUERIES), anew),
        (splits.val, f"validation classes, {of_test}", test_counts, anew_at_test),
        (splits.test, f"test classes, {of_test}", test_counts, anew_at_test),
    ):
        num_shots, num_queries = counts
        with _named(f"the {of}"):
            check_episodes(
                data,
                num_ways=1,
                num_shots=num_shots,
                num_queries=num_queries,
                replacement=replacement,
            )
    if config.use_tasks:
        with _named("the test classes, for use_tasks"):
            check_episodes(
                splits.test,
                num_ways=config.use_ways,
                num_shots=config.use_shots,
                num_queries=USE_QUERIES,
            )


def by_alphabet(images: LabelledImages) -> LabelledImages:
    """Omniglot with a class for each alphabet, of whose characters all have its name."""
    of_characters = [name.rpartition("_")[0] for name in images.class_names]
    names, alphabets = np.unique(of_characters, return_inverse=True)
    labels = alphabets.astype(np.int32)[images.labels]
    return LabelledImages(images.images, labels, tuple(map(str, names)))


def frozen_subset(images: LabelledImages, num_classes: int | None) -> LabelledImages:
    """The first classes in an order that depends on their sorted names alone."""
    if num_classes is None:
        return images
    names = sorted(images.class_names)
    # RandomState, as its numbers are frozen; those of NumPy's newer generators may change.
    order = np.random.RandomState(0).permutation(len(names))
    return select_classes(images, [names[i] for i in order[:num_classes]])


def to_class_data(config: Config, images: LabelledImages) -> ClassData:
    """The images on the device, sorted by class."""
    ink = 255 - images.images
    return group_by_class(
        (ink > 127).astype(np.uint8) if config.values == "stored" else ink, images.labels
    )


@contextlib.contextmanager
def _named(place: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def training_episodes(config: Config) -> Sample:
    """`sample(key, data) -> Episode` of one class, a character or an alphabet, in training."""
    draw = functools.partial(
        sample_set_episode,
        num_shots=config.train_shots,
        num_queries=config.num_queries,
        num_rotations=config.rotations,
        values=config.values,
        replacement=config.replacement == "always",
    )
    if not config.vary_shots:
        return draw

    def sample(key: PRNGKey, data: ClassData) -> Episode:
        draw_key, vary_key = jax.random.split(key)
        return vary_shots(vary_key, draw(draw_key, data))

    return sample


def validation_episodes(config: Config) -> Sample:
    """`sample(key, data) -> Episode` of a validation in training."""
    return functools.partial(
        sample_set_episode,
        num_shots=max(VALIDATION_SHOTS),
        num_queries=VALIDATION_QUERIES,
        values=config.values,
        replacement=config.replacement == "always",
    )


def test_episodes(config: Config) -> Sample:
    """`sample(key, data) -> Episode` of as many shots as are tested, and the queries of a test."""
    return functools.partial(
        sample_set_episode,
        num_shots=max(config.shots),
        num_queries=config.test_queries,
        values=config.values,
        replacement=config.replacement != "never",
    )


def conventional_batches(config: Config, num_images: int) -> Sample:
    """`sample(key, data) -> images` of any classes, as many as an episode has."""

    def sample(key: PRNGKey, data: ClassData) -> Array:
        image_key, value_key = jax.random.split(key)
        images, _ = sample_batch(
            image_key, data, batch_size=num_images, num_rotations=config.rotations
        )
        if config.values == "bernoulli":
            images = jax.random.bernoulli(value_key, images / 255)
        return images.astype(np.int32)

    return sample  # pyright: ignore[reportReturnType]
