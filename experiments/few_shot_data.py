"""The episodes of `experiments.few_shot`: of labelled images, or made up from unlabelled ones."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Num, PyTree

from experiments.decoding import decoding
from experiments.few_shot_config import Config
from experiments.few_shot_start import check_learned
from metagen_jax.data.augment import random_affine
from metagen_jax.data.classes import ClassSplit, LabelledImages, split_classes
from metagen_jax.data.colour_sets import load_cifar_fs, load_mini_imagenet
from metagen_jax.data.episodes import (
    ClassData,
    check_episodes,
    group_by_class,
    sample_batch,
    sample_episode,
)
from metagen_jax.data.sources import load_images
from metagen_jax.data.unsupervised import (
    cluster_classes,
    sample_cluster_episode,
    turned_clusters,
    umtra_episode,
    whiten,
)
from metagen_jax.errors import UserError
from metagen_jax.evaluation.few_shot import Sample
from metagen_jax.gradients import gradients
from metagen_jax.nets.conv4 import Conv4
from metagen_jax.self_supervised.simclr import Augment, simclr_loss
from metagen_jax.training import fit, init_state, load_params, train_step
from metagen_jax.types import Episode, Params, PRNGKey

# Of CACTUs: partitions and clusters of the embedding, and images embedded at once.
NUM_PARTITIONS, NUM_CLUSTERS, BLOCK = 10, 500, 1000


def load_splits(config: Config) -> ClassSplit:
    """The images of training, validation and test classes, no class in two of them."""
    parts = ClassSplit._fields
    with decoding(config.dataset) as progress:
        if config.dataset == "cifar_fs":
            load: Callable = functools.partial(load_cifar_fs, data_dir=config.data_dir)
        elif config.dataset == "mini_imagenet":
            folder = config.data_dir or "mini_imagenet"
            load = functools.partial(load_mini_imagenet, folder=folder, size=config.image_size)
        else:
            load = functools.partial(
                load_images, config.dataset, data_dir=config.data_dir, size=config.image_size
            )
        if config.dataset.partition(":")[0] == "omniglot":
            parts = tuple(f"{config.split}/{part}" for part in parts)
        elif config.dataset not in ("glyphs", "cifar_fs", "mini_imagenet"):
            return _split_by_class(config.dataset, load("train", progress=progress))
        return ClassSplit(*(load(part, progress=progress) for part in parts))


def _split_by_class(dataset: str, images: LabelledImages) -> ClassSplit:
    num_classes = len(images.class_names)
    try:
        return split_classes(images)
    except UserError:
        what = f"{num_classes} classes" if num_classes > 1 else "no labels, or a single one"
        raise UserError(
            f"dataset {dataset} has {what}, too few for training, validation and test to have "
            "classes of their own; give a --dataset of more classes"
        ) from None


def to_class_data(
    config: Config, images: LabelledImages, part: Literal["training", "validation", "test"]
) -> ClassData:
    """The images on the device, sorted by class, checked to suffice for the episodes."""
    data = group_by_class(images.images, images.labels)
    train = part == "training"
    if train and config.labels != "true":
        return data
    try:
        check_episodes(
            data,
            num_ways=(train and config.train_ways) or config.num_ways,
            num_shots=(train and config.train_shots) or config.num_shots,
            num_queries=config.num_queries if train else max(config.test_queries),
            num_rotations=config.rotations,
        )
    except UserError as error:
        names = ("num_ways", "num_shots", "num_queries" if train else "test_queries")
        settings = {name: getattr(config, name) for name in names}
        if train:
            others = {"train_ways": config.train_ways, "train_shots": config.train_shots}
            settings |= {name: value for name, value in others.items() if value is not None}
        listed = ", ".join(f"{name} {value}" for name, value in settings.items())
        raise UserError(f"the {part} classes of {config.dataset} ({listed}): {error}") from None
    return data


def normalise(images: Num[Array, "*shape"]) -> Array:
    """Bytes to floats in [0, 1]; one channel is turned round: ink, dark on paper, is near 1."""
    scaled = images.astype(jnp.float32) / 255
    return 1 - scaled if images.shape[-1] == 1 else scaled


def sampler(config: Config, num_queries: int) -> Sample:
    """`sample(key, data) -> Episode` of normalised images of labelled classes."""
    return _normalised(
        functools.partial(
            sample_episode,
            num_ways=config.num_ways,
            num_shots=config.num_shots,
            num_queries=num_queries,
            num_rotations=config.rotations,
        )
    )


def training_episodes(config: Config, data: ClassData) -> tuple[PyTree, Sample]:
    """What training draws from, and `sample(key, that) -> Episode`.

    Without labels a quarter turn of every image (UMTRA) or of every cluster of images (CACTUs) is
    one more, as with labels every turned class is a class.
    """
    train = replace(
        config,
        num_ways=config.train_ways or config.num_ways,
        num_shots=config.train_shots or config.num_shots,
    )
    if config.labels == "true":
        return data, sampler(train, config.num_queries)
    if config.labels == "umtra":
        turns = [jnp.rot90(data.examples, k, (1, 2)) for k in range(config.rotations)]
        return jnp.concatenate(turns), _normalised(
            functools.partial(
                umtra_episode,
                num_ways=train.num_ways,
                num_queries=config.num_queries,
                augment=augmentation(data.examples),
            )
        )
    images = data.examples
    num_clusters = min(NUM_CLUSTERS, len(images) // 20)
    needed = max(2, -(-train.num_ways // config.rotations))
    if num_clusters < needed:
        raise UserError(
            f"there are {len(images)} pictures to train with, for {train.num_ways}-way episodes of "
            f"clusters of 20 in {config.rotations} turns; give {20 * needed} or more"
        )
    clusters = cluster_classes(
        jax.random.key(config.seed),
        images,
        whiten(embed(config, images)),
        num_partitions=NUM_PARTITIONS,
        num_clusters=num_clusters,
        min_size=train.num_shots + config.num_queries,
    )
    return turned_clusters(clusters, config.rotations), _normalised(
        functools.partial(
            sample_cluster_episode,
            num_ways=train.num_ways,
            num_shots=train.num_shots,
            num_queries=config.num_queries,
        )
    )


def augmentation(images: Num[Array, "n h w c"]) -> Augment:
    """Turns, shears, scales and shifts an image like these, in bytes."""
    _, height, _, channels = images.shape
    return functools.partial(
        random_affine,
        max_rotation=0.35,
        max_shear=0.35,
        max_log_scale=0.25,
        max_shift=0.12 * height,
        background=255.0 if channels == 1 else 0.0,
    )


def embed(config: Config, images: Num[Array, "n h w c"]) -> Float[Array, "n features"]:
    """Features of images that a net finds by telling views of one from views of others."""
    net = Conv4(None, config.num_filters, norm=config.norm)

    def features(params: Params, images: Num[Array, "n h w c"]) -> Array:
        return net.apply(params, normalise(images))  # pyright: ignore[reportReturnType]

    def sample(key: PRNGKey, data: ClassData) -> Array:
        return sample_batch(key, data, batch_size=128)[0]

    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    params = net.init(init_key, normalise(images[:1]))
    if config.features_from is not None:
        check_learned(config.features_from, config, "--features-from")
        params = load_params(config.features_from / "net", params)
        return _in_blocks(config, features, params, images)
    print("training by SimCLR a net, whose clusters of images stand for classes")
    grad_fn = gradients(simclr_loss(features, augmentation(images), temperature=0.2))
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, config.pretraining_steps))
    params = fit(
        train_step(grad_fn, optimizer, sample),
        init_state(params, optimizer, train_key),
        ClassData(images, jnp.zeros(1, jnp.int32), jnp.array([len(images)])),
        num_steps=config.pretraining_steps,
        run_dir=config.run_dir / "simclr",
        resume=config.resume,
    ).best_params
    return _in_blocks(config, features, params, images)


def _in_blocks(config: Config, features, params: Params, images: Array) -> Array:
    """The features of all images; batch norm goes by a block, which should be of all classes."""
    order = jax.random.permutation(jax.random.key(config.seed), len(images))
    of_block = jax.jit(features)
    starts = range(0, len(images), BLOCK)
    blocks = [of_block(params, images[order[start : start + BLOCK]]) for start in starts]
    return jnp.concatenate(blocks)[jnp.argsort(order)]


def _normalised(sample: Callable[[PRNGKey, PyTree], Episode]) -> Sample:
    def sample_normalised(key: PRNGKey, data: PyTree) -> Episode:
        episode = sample(key, data)
        return Episode(*((normalise(images), labels) for images, labels in episode))

    return sample_normalised
