"""Few-shot classification of characters never seen in training, by MAML.

    python -m experiments.few_shot                                   # embedded glyphs, minutes
    python -m experiments.few_shot --preset omniglot-5w1s --data-dir DIR
    python -m experiments.few_shot --preset omniglot-20w1s --data-dir DIR

Meta-trains an initialisation of the four-block net on episodes of the training classes, keeps the
checkpoint that is best on validation classes, and reports accuracy on `num_test_tasks` episodes of
the test classes: before adaptation and after each step, transductive (queries normalised together,
as published) and inductive (each query by itself), beside nearest neighbours in pixels and a
classifier pretrained on the same classes and fine-tuned on the support set. Writes to the run's
folder: `result.json`, `learning_curve.png`, `episode.png`, `adaptation.png`, metrics, checkpoints.

Results, with command, machine, minutes and seeds, stand in experiments/README.md.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import rich.progress

from experiments import few_shot_report, program
from metagen_jax.data.classes import ClassSplit, LabelledImages, split_classes
from metagen_jax.data.episodes import (
    ClassData,
    check_episodes,
    group_by_class,
    sample_batch,
    sample_episode,
)
from metagen_jax.data.sources import load_images
from metagen_jax.evaluation import few_shot
from metagen_jax.gradients import gradients, mean_over_tasks, task_keys
from metagen_jax.meta.maml import maml_loss, maml_predict
from metagen_jax.nets.conv4 import Conv4, Norm
from metagen_jax.parallel import data_parallel, replicate
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.training import FitResult, fit, init_state, train_step
from metagen_jax.types import Episode, Params, PredictFn, PRNGKey

Learner = Literal["maml", "fomaml", "anil", "boil"]

LEARNERS: dict[Learner, dict[str, Any]] = {
    "maml": {},
    "fomaml": {"gradient": "first_order"},
    "anil": {"trainable": lambda path: "/head/" in path},
    "boil": {"trainable": lambda path: "/head/" not in path},
}


@dataclass(frozen=True)
class Config:
    dataset: str = "glyphs"
    """"glyphs" (embedded), "omniglot", or any TFDS image set with labels."""
    split: str = "vinyals"
    """Class lists of Omniglot: "vinyals", "lake" or "random1200"."""
    data_dir: Path | None = None
    """Folder of TFDS data sets; without it $TFDS_DATA_DIR, then TFDS's own default."""
    image_size: int = 28
    """Height and width of the images, in pixels."""
    rotations: Literal[1, 4] = 4
    """4: characters turned by 90, 180 and 270 degrees are classes of their own; 1: as they are."""

    learner: Learner = "maml"
    """What meta-trains: second-order or first-order MAML, ANIL (head only), BOIL (body only)."""
    num_ways: int = 5
    """Classes in an episode."""
    num_shots: int = 1
    """Support examples of each class."""
    num_queries: int = 5
    """Query examples of each class in training."""
    inner_rate: float = 0.4
    """Learning rate of the inner SGD."""
    inner_steps: int = 1
    """Inner steps in training."""
    num_filters: int = 64
    """Channels of each block of the net."""
    strided: bool = True
    """Strided convolutions, as in MAML's Omniglot net; otherwise max-pooling."""
    norm: Norm = "batch"
    """Normalisation: by the current batch, in groups, by layer, or none."""

    steps: int = 400
    """Outer steps."""
    num_tasks: int = 32
    """Tasks in an outer step."""
    outer_rate: float = 3e-3
    """Learning rate of the outer Adam."""
    cosine: bool = True
    """Warm the outer rate up and let it decay along a cosine; otherwise keep it."""
    chunk: int = 1
    """Tasks that a device works on at once; 1 is fastest on a CPU."""
    validate_every: int = 200
    """Outer steps between validations."""
    num_validation_tasks: int = 300
    """Episodes of a validation."""
    pretraining_steps: int = 1000
    """Steps of the pretrained baseline, 128 images each."""

    test_steps: int = 3
    """Inner steps at validation and test; the figure is after the number that validates best."""
    test_queries: tuple[int, ...] = (15,)
    """Query examples of each class at test; validation takes the first number."""
    num_test_tasks: int = 1000
    """Episodes of the test."""

    seed: int = 0
    """Fixes initialisation, episodes and noise; test episodes are the same for every seed."""
    num_devices: int | None = None
    """Devices to use; without it all, and on a CPU one for each core."""
    run_dir: Path = Path("runs/few_shot")
    """Where everything of the run is written."""
    resume: bool = False
    """Go on from the last checkpoint of the run's folder."""


# Published: 60,000 steps; 5-way 1 inner step at 0.4, 20-way 5 at 0.1; Adam at 1e-3; as many queries
# as shots, at test as well. For 2 cores fewer steps at a higher, decaying rate, and one inner step.
_OMNIGLOT = Config(
    dataset="omniglot",
    num_queries=1,
    test_queries=(1, 15),
    validate_every=500,
    pretraining_steps=3000,
)

_PUBLISHED: dict[str, Any] = {"steps": 60_000, "outer_rate": 1e-3, "cosine": False}

PRESETS = {
    "glyphs": Config(),
    "smoke": Config(
        steps=6,
        num_tasks=4,
        num_filters=8,
        validate_every=3,
        num_validation_tasks=8,
        num_test_tasks=16,
        pretraining_steps=6,
    ),
    "omniglot-5w1s": replace(_OMNIGLOT, num_ways=5, steps=14000),
    "omniglot-5w5s": replace(
        _OMNIGLOT, num_ways=5, num_shots=5, num_queries=5, test_queries=(5, 15), steps=5000
    ),
    "omniglot-20w1s": replace(_OMNIGLOT, num_ways=20, num_tasks=16, steps=15000),
    "omniglot-20w5s": replace(
        _OMNIGLOT,
        num_ways=20,
        num_shots=5,
        num_queries=5,
        test_queries=(5, 15),
        num_tasks=8,
        steps=2000,
    ),
    "omniglot-5w1s-published": replace(_OMNIGLOT, num_ways=5, **_PUBLISHED),
    "omniglot-20w1s-published": replace(
        _OMNIGLOT,
        num_ways=20,
        num_tasks=16,
        inner_rate=0.1,
        inner_steps=5,
        test_steps=5,
        **_PUBLISHED,
    ),
}


def load_splits(config: Config) -> ClassSplit:
    """The images of training, validation and test classes, no class in two of them."""
    load = functools.partial(
        load_images, config.dataset, data_dir=config.data_dir, size=config.image_size
    )
    with rich.progress.Progress(transient=True) as bar:
        task = bar.add_task(f"decoding {config.dataset}", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if config.dataset == "glyphs":
            return ClassSplit(*(load(part, progress=progress) for part in ClassSplit._fields))
        if config.dataset == "omniglot":
            parts = (f"{config.split}/{part}" for part in ClassSplit._fields)
            return ClassSplit(*(load(part, progress=progress) for part in parts))
        return split_classes(load("train", progress=progress))


def to_class_data(config: Config, images: LabelledImages, num_queries: int) -> ClassData:
    """The images on the device, sorted by class, checked to suffice for the episodes."""
    data = group_by_class(images.images, images.labels)
    check_episodes(
        data,
        num_ways=config.num_ways,
        num_shots=config.num_shots,
        num_queries=num_queries,
        num_rotations=config.rotations,
    )
    return data


def normalise(images: jax.Array) -> jax.Array:
    """Bytes to floats in [0, 1]; one channel is turned round, so that dark ink is near 1."""
    scaled = images.astype(jnp.float32) / 255
    return 1 - scaled if images.shape[-1] == 1 else scaled


def sampler(config: Config, num_queries: int) -> few_shot.Sample:
    """`sample(key, data) -> Episode` of normalised images."""

    def sample(key: PRNGKey, data: ClassData) -> Episode:
        episode = sample_episode(
            key,
            data,
            num_ways=config.num_ways,
            num_shots=config.num_shots,
            num_queries=num_queries,
            num_rotations=config.rotations,
        )
        return Episode(*((normalise(images), labels) for images, labels in episode))

    return sample


def check(config: Config) -> None:
    """Raises a UserError for settings that would fail only after training, or without sense."""
    counts = ("num_shots", "num_queries", "num_tasks", "num_validation_tasks", "num_filters")
    steps = ("steps", "inner_steps", "pretraining_steps", "test_steps")
    program.require(
        *(
            (getattr(config, name) >= 1, f"{name} is {getattr(config, name)}; give 1 or more")
            for name in (*counts, *steps)
        ),
        (config.num_ways >= 2, f"num_ways is {config.num_ways}; give 2 or more"),
        (config.steps >= 2, f"steps is {config.steps}; give 2 or more"),
        (
            min(config.test_queries, default=0) >= 1,
            f"test_queries is {config.test_queries}; give one or more numbers of 1 or more",
        ),
        (
            min(config.num_test_tasks, config.num_validation_tasks) >= 2,
            "num_test_tasks and num_validation_tasks need 2 or more for an interval",
        ),
    )


class Learned(NamedTuple):
    """What meta-training gives: how to predict, and how it went."""

    predict: PredictFn
    result: FitResult


def meta_train(config: Config, data: ClassData, val_data: ClassData) -> Learned:
    """Meta-trains the net; the parameters that validate best are the result."""
    net = make_net(config, config.num_ways)
    loss_fn = cross_entropy_loss(net.apply)
    options = LEARNERS[config.learner]
    inner_optimizer = optax.sgd(config.inner_rate)
    episode_loss = maml_loss(
        loss_fn, inner_optimizer=inner_optimizer, num_steps=config.inner_steps, **options
    )
    predict = maml_predict(
        loss_fn,
        few_shot.both_modes(net.apply),
        inner_optimizer=inner_optimizer,
        num_steps=config.test_steps,
        trainable=options.get("trainable"),
        every_step=True,
    )
    sample, sample_val = (
        sampler(config, config.num_queries),
        sampler(config, config.test_queries[0]),
    )

    def sample_tasks(key: PRNGKey, data: ClassData) -> Episode:
        return jax.vmap(sample, in_axes=(0, None))(task_keys(key, config.num_tasks), data)

    def validate(params: Params) -> dict[str, float]:
        accuracies = few_shot.evaluate_few_shot(
            predict,
            params,
            sample_val,
            val_data,
            key=jax.random.key(few_shot_report.VALIDATION_SEED),
            num_tasks=config.num_validation_tasks,
            chunk=config.chunk,
            devices=jax.local_devices()[: config.num_devices],
        )
        return {"accuracy": accuracies["transductive"].mean.max()}

    rate = config.outer_rate
    warmup = max(1, config.steps // 50)
    optimizer = optax.adam(
        optax.warmup_cosine_decay_schedule(0.0, rate, warmup, config.steps)
        if config.cosine
        else rate
    )
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    params = net.init(init_key, normalise(data.examples[:1]))
    devices = program.devices_for(config.num_devices, config.num_tasks)
    grad_fn = data_parallel(
        mean_over_tasks(gradients(episode_loss), chunk=config.chunk), devices=devices
    )
    state, data = replicate((init_state(params, optimizer, train_key), data), devices=devices)
    result = fit(
        train_step(grad_fn, optimizer, sample_tasks),
        state,
        data,
        num_steps=config.steps,
        run_dir=config.run_dir,
        tasks_per_step=config.num_tasks,
        validate=validate,
        validate_every=config.validate_every,
        resume=config.resume,
    )
    return Learned(predict, result)


def pretrain(config: Config, data: ClassData) -> Params:
    """A conventional classifier of all training classes, by the same net and optimiser."""
    net = make_net(config, len(data.sizes) * config.rotations)

    def sample(key: PRNGKey, data: ClassData):
        images, labels = sample_batch(key, data, batch_size=128, num_rotations=config.rotations)
        return normalise(images), labels

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, config.pretraining_steps))
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    params = net.init(init_key, normalise(data.examples[:1]))
    return fit(
        train_step(gradients(cross_entropy_loss(net.apply)), optimizer, sample),
        init_state(params, optimizer, train_key),
        data,
        num_steps=config.pretraining_steps,
        run_dir=config.run_dir / "pretrained",
        resume=config.resume,
    ).best_params


def make_net(config: Config, num_outputs: int) -> Conv4:
    return Conv4(num_outputs, config.num_filters, config.strided, config.norm)


def main(config: Config) -> dict[str, Any]:
    """Meta-trains, tests, prints the tables, draws the pictures; gives the numbers by name."""
    check(config)
    splits = load_splits(config)
    num_queries = max(config.num_queries, *config.test_queries)
    train, val, test = (to_class_data(config, images, num_queries) for images in splits)
    describe = " / ".join(str(len(part.sizes) * config.rotations) for part in (train, val, test))
    print(f"{config.dataset}: {describe} classes for training / validation / test")
    print(f"meta-training by {config.learner}")
    learned = meta_train(config, train, val)
    print("pretraining a classifier of all training classes, to fine-tune as a baseline")
    pretrained = pretrain(config, train)
    numbers: dict[str, Any] = {
        "num_tasks": config.num_test_tasks,
        "best_step": learned.result.best_step,
        "train_seconds": round(learned.result.train_seconds, 1),
        "validation_seconds": round(learned.result.validation_seconds, 1),
        "tasks_per_second": round(learned.result.steps_per_second * config.num_tasks, 1),
    }
    return numbers | few_shot_report.report(
        few_shot_report.Subject(
            name=config.learner,
            predict=learned.predict,
            params=learned.result.best_params,
            pretrained=pretrained,
            apply=make_net(config, config.num_ways).apply,
        ),
        {num_queries: sampler(config, num_queries) for num_queries in config.test_queries},
        val,
        test,
        num_ways=config.num_ways,
        num_tasks=config.num_test_tasks,
        chunk=config.chunk,
        devices=jax.local_devices()[: config.num_devices],
        run_dir=config.run_dir,
    )


if __name__ == "__main__":
    program.run("few_shot", main, PRESETS, default="glyphs")
