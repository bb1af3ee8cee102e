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
import numpy as np
import optax
import rich.progress

from experiments import program
from metagen_jax.data.classes import LabelledImages, split_classes
from metagen_jax.data.episodes import ClassData, check_episodes, group_by_class, sample_episode
from metagen_jax.data.sources import load_images
from metagen_jax.evaluation import few_shot
from metagen_jax.gradients import gradients, mean_over_tasks, task_keys
from metagen_jax.meta.maml import maml_loss, maml_predict
from metagen_jax.nets.conv4 import Conv4, Norm
from metagen_jax.parallel import data_parallel
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.training import fit, init_state, train_step
from metagen_jax.types import Episode, Params

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
    rotations: int = 4
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

    steps: int = 1000
    """Outer steps."""
    num_tasks: int = 32
    """Tasks in an outer step."""
    outer_rate: float = 3e-3
    """Peak learning rate of the outer Adam, warmed up, then decayed along a cosine."""
    chunk: int = 1
    """Tasks that a device works on at once; 1 is fastest on a CPU."""
    validate_every: int = 250
    """Outer steps between validations."""
    num_validation_tasks: int = 300
    """Episodes of a validation."""
    pretraining_steps: int = 1000
    """Steps of the pretrained baseline, 128 images each; 0 leaves it out."""

    eval_steps: int = 3
    """Inner steps at test; the figure is the one after the number best on validation classes."""
    eval_queries: int = 15
    """Query examples of each class at validation and test."""
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


_OMNIGLOT = Config(dataset="omniglot", validate_every=500, pretraining_steps=3000)
_FIVE_WAY = replace(
    _OMNIGLOT, num_ways=5, num_queries=1, inner_rate=0.4, inner_steps=1, num_tasks=32
)
_TWENTY_WAY = replace(_OMNIGLOT, num_ways=20, inner_rate=0.1, inner_steps=5, eval_steps=5)

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
    "omniglot-5w1s": replace(_FIVE_WAY, steps=14000),
    "omniglot-5w5s": replace(_FIVE_WAY, num_shots=5, steps=6000),
    "omniglot-20w1s": replace(_TWENTY_WAY, num_tasks=16, steps=3000),
    "omniglot-20w5s": replace(_TWENTY_WAY, num_shots=5, num_tasks=8, steps=2000),
}


class Splits(NamedTuple):
    train: LabelledImages
    val: LabelledImages
    test: LabelledImages


def load_splits(config: Config) -> Splits:
    """The images of training, validation and test classes, no class in two of them."""
    load = functools.partial(
        load_images, config.dataset, data_dir=config.data_dir, size=config.image_size
    )
    with rich.progress.Progress(transient=True) as bar:
        task = bar.add_task(f"decoding {config.dataset}", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if config.dataset == "glyphs":
            return Splits(*(load(part, progress=progress) for part in Splits._fields))
        if config.dataset == "omniglot":
            parts = (f"{config.split}/{part}" for part in Splits._fields)
            return Splits(*(load(part, progress=progress) for part in parts))
        return Splits(*split_classes(load("train", progress=progress)))


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


def ink(images: jax.Array) -> jax.Array:
    """Bytes with dark ink on light paper to floats with ink near 1 and paper 0."""
    return 1 - images.astype(jnp.float32) / 255


def sampler(config: Config, num_queries: int):
    """`sample(key, data) -> Episode` of normalised images."""

    def sample(key, data: ClassData) -> Episode:
        episode = sample_episode(
            key,
            data,
            num_ways=config.num_ways,
            num_shots=config.num_shots,
            num_queries=num_queries,
            num_rotations=config.rotations,
        )
        return Episode(*((ink(images), labels) for images, labels in episode))

    return sample


def main(config: Config) -> dict[str, Any]:
    """Meta-trains, tests, prints the table and draws the pictures; gives the table's numbers."""
    splits = load_splits(config)
    train_data = to_class_data(config, splits.train, config.num_queries)
    val_data, test_data = (
        to_class_data(config, images, config.eval_queries) for images in (splits.val, splits.test)
    )
    net = Conv4(config.num_ways, config.num_filters, config.strided, config.norm)
    loss_fn = cross_entropy_loss(net.apply)
    learner = LEARNERS[config.learner]
    episode_loss = maml_loss(
        loss_fn,
        inner_optimizer=optax.sgd(config.inner_rate),
        num_steps=config.inner_steps,
        **learner,
    )
    predict = maml_predict(
        loss_fn,
        few_shot.both_modes(net.apply),
        inner_optimizer=optax.sgd(config.inner_rate),
        num_steps=config.eval_steps,
        trainable=learner.get("trainable"),
        every_step=True,
    )
    sample = sampler(config, config.eval_queries)

    def evaluate(params: Params, data: ClassData, num_tasks: int, seed: int):
        return few_shot.evaluate_few_shot(
            predict, params, sample, data, key=jax.random.key(seed), num_tasks=num_tasks
        )

    def validate(params: Params) -> dict[str, float]:
        accuracy = evaluate(params, val_data, config.num_validation_tasks, seed=1)["transductive"]
        return {"accuracy": float(accuracy.mean[config.inner_steps])}

    optimizer = optax.adam(
        optax.warmup_cosine_decay_schedule(
            0.0, config.outer_rate, max(1, config.steps // 50), config.steps
        )
    )
    grad_fn = data_parallel(mean_over_tasks(gradients(episode_loss), chunk=config.chunk))
    sample_train = sampler(config, config.num_queries)

    def sample_tasks(key, data: ClassData) -> Episode:
        return jax.vmap(sample_train, in_axes=(0, None))(task_keys(key, config.num_tasks), data)

    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    blank = jnp.zeros((1, *splits.train.images.shape[1:]))
    result = fit(
        train_step(grad_fn, optimizer, sample_tasks),
        init_state(net.init(init_key, blank), optimizer, train_key),
        train_data,
        num_steps=config.steps,
        run_dir=config.run_dir,
        tasks_per_step=config.num_tasks,
        validate=validate,
        validate_every=config.validate_every,
        resume=config.resume,
    )

    val = evaluate(result.best_params, val_data, config.num_test_tasks, seed=1)["transductive"]
    test = evaluate(result.best_params, test_data, config.num_test_tasks, seed=2)
    best = int(val.mean.argmax())
    numbers = {
        "test_accuracy": float(test["transductive"].mean[best]),
        "test_interval": float(test["transductive"].interval[best]),
        "test_accuracy_inductive": float(test["inductive"].mean[best]),
        "test_interval_inductive": float(test["inductive"].interval[best]),
        "adaptation_steps": best,
        "validation_accuracy": float(val.mean[best]),
        "num_tasks": config.num_test_tasks,
        "best_step": result.best_step,
        "train_seconds": round(result.train_seconds, 1),
        "tasks_per_second": round(result.steps_per_second * config.num_tasks, 1),
    }
    for step in range(config.eval_steps + 1):
        print(step, few_shot.percent(test["transductive"], step), few_shot.percent(test["inductive"], step))
    return numbers


if __name__ == "__main__":
    program.run("few_shot", main, PRESETS, default="glyphs")
