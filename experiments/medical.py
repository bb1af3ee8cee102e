"""Chest X-rays with pneumonia or without, from a few of each, by a net that was trained on letters.

    python -m experiments.few_shot --run-dir runs/few_shot-glyphs
    python -m experiments.medical --checkpoint runs/few_shot-glyphs --data-dir DIR

The four-block net of a run of `experiments.few_shot` meets a task of another kind: two classes of
X-rays, K examples of each, 15 queries of each. It classifies them by prototypes of its features,
and by a new head, fine-tuned together with the body by SGD. What it has to beat: the same net
trained from a random initialisation on the same examples, and the nearest neighbour in pixels.
Rates and numbers of steps, up to the same one, are chosen on episodes of the validation split, for
the baseline from the same ones. Reported are balanced accuracy and the area under the ROC over
episodes of the test split, transductive (queries normalised together) and inductive (each query by
itself). Intervals are over episodes, which share the patients of one test split: they don't say how
far the figures would be off for other patients. Writes `result.json` and `medical.png`.
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from experiments import few_shot_config, few_shot_learners, program
from experiments.medical_report import Row, draw, show_tables
from metagen_jax.chunks import Chunk, check_chunk
from metagen_jax.data.classes import LabelledImages
from metagen_jax.data.episodes import ClassData, check_episodes, group_by_class, sample_episode
from metagen_jax.data.sources import load_images
from metagen_jax.errors import UserError, one_line
from metagen_jax.evaluation.baselines import (
    choose_fine_tuning,
    fine_tune_predict,
    nearest_neighbour_predict,
)
from metagen_jax.evaluation.few_shot import Sample, both_modes, evaluate_few_shot
from metagen_jax.evaluation.roc import balanced_accuracy, roc_auc
from metagen_jax.meta.maml import maml_predict
from metagen_jax.meta.metric import prototypical_predict
from metagen_jax.nets.conv4 import Conv4
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.training import load_params
from metagen_jax.types import Batch, Episode, MetaParams, Params, PredictFn, PRNGKey

# Of the tasks of validation and test, the same for every --seed.
VALIDATION_SEED, TEST_SEED = 1, 2
SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Config:
    dataset: str = "pneumonia_mnist_part"
    """A TFDS set of two classes with splits val and test, such as "pneumonia_mnist"; "synthetic"
    makes one up."""
    data_dir: Path | None = None
    """Folder of TFDS data sets; without it $TFDS_DATA_DIR, then TFDS's own default."""
    checkpoint: Path | None = None
    """Folder of the run of experiments.few_shot whose best net is tested; the synthetic set does
    without and takes a random one."""

    shots: tuple[int, ...] = (1, 5, 10, 20)
    """Support examples of each class, one column each."""
    num_queries: int = 15
    """Query examples of each class."""
    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    """Rates of SGD to choose from."""
    num_steps: int = 10
    """The largest number of steps of SGD to choose from."""
    num_validation_tasks: int = 200
    """Episodes of the validation split, by which rate and number of steps are chosen."""
    num_test_tasks: int = 1000
    """Episodes of the test split."""
    chunk: Chunk = "auto"
    """Tasks that a device works on at once, or "auto"."""

    seed: int = 0
    """Fixes the random net; tasks are the same for every seed."""
    num_devices: int | None = None
    """Devices to use; without it all, and on a CPU one for each core."""
    run_dir: Path = Path("runs/medical")
    """Where everything of the run is written."""
    resume: bool = False
    """Do it again in the folder of a run that is there already."""


PRESETS = {
    "default": Config(),
    "smoke": Config(
        dataset=SYNTHETIC,
        shots=(2,),
        num_queries=5,
        rates=(0.1,),
        num_steps=2,
        num_validation_tasks=4,
        num_test_tasks=8,
    ),
}


class Pretrained(NamedTuple):
    """A net without a head, its parameters, and the side of the pictures it was trained on."""

    net: Conv4
    params: Params
    image_size: int


def check(config: Config) -> None:
    """Raises a UserError for settings that can't work."""
    check_chunk(config.chunk)
    program.require(
        (
            min(config.shots, default=0) >= 1,
            f"shots is {config.shots}; give one or more numbers of 1 or more",
        ),
        *(
            (getattr(config, name) >= 1, f"{name} is {getattr(config, name)}; give 1 or more")
            for name in ("num_queries", "num_steps")
        ),
        (
            min(config.num_test_tasks, config.num_validation_tasks) >= 2,
            "num_test_tasks and num_validation_tasks need 2 or more for an interval",
        ),
        (
            config.checkpoint is not None or config.dataset == SYNTHETIC,
            "checkpoint is not set; give the folder of a run of experiments.few_shot "
            "(--checkpoint RUN_DIR), such as python -m experiments.few_shot leaves",
        ),
    )


def load_pretrained(config: Config) -> Pretrained:
    """The net of a run of `experiments.few_shot` without its head, or a small random one."""
    key = jax.random.key(config.seed)
    if config.checkpoint is None:
        net = Conv4(None, num_filters=8)
        return Pretrained(net, net.init(key, jnp.zeros((1, 28, 28, 1))), 28)
    advice = "give the --run-dir of a run of experiments.few_shot as --checkpoint"
    settings = program.read_settings(config.checkpoint, advice=advice)
    known = {field.name for field in dataclasses.fields(few_shot_config.Config)}
    try:
        trained = few_shot_config.Config(**{k: v for k, v in settings.items() if k in known})
        learner = few_shot_learners.LEARNERS[trained.learner](trained)
    except (TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f"{config.checkpoint} holds a run of other settings ({one_line(error)}); {advice}"
        ) from None
    images = jnp.zeros((1, trained.image_size, trained.image_size, 1))
    params = load_params(config.checkpoint, learner.init(key, images))
    net = few_shot_learners.make_net(trained, None)
    return Pretrained(net, body_of(params, net.init(key, images)), trained.image_size)


def body_of(params: Params, like: Params) -> Params:
    """What of a learner's parameters is the four-block net without its head.

    Args:
      params: of the net, with a head or without; or below `init` or `embed` beside others.
      like: of a net without a head.
    """
    params = params.init if isinstance(params, MetaParams) else params
    params = params.get("embed", params)
    blocks = params.get("params", {})
    body = {"params": {name: blocks[name] for name in like["params"] if name in blocks}}
    if jax.tree.map(jnp.shape, body) != jax.tree.map(jnp.shape, like):
        raise UserError(
            "checkpoint is of a learner whose net is not the plain four-block one; give a run of "
            "another learner, such as maml or prototypical"
        )
    return body


def load_splits(config: Config, size: int) -> tuple[ClassData, ClassData]:
    """The validation and the test split on the device, checked to suffice for the episodes."""

    def on_device(images: LabelledImages) -> ClassData:
        data = group_by_class(images.images, images.labels)
        if len(data.sizes) != 2 or images.images.shape[-1] != 1:
            raise UserError(
                f"{config.dataset!r} has {len(data.sizes)} classes of pictures with "
                f"{images.images.shape[-1]} channels; give a set of 2 classes of grey pictures"
            )
        check_episodes(
            data, num_ways=2, num_shots=max(config.shots), num_queries=config.num_queries
        )
        return data

    if config.dataset == SYNTHETIC:
        return on_device(draw_synthetic(size, seed=1)), on_device(draw_synthetic(size, seed=2))
    load = functools.partial(load_images, config.dataset, data_dir=config.data_dir, size=size)
    return on_device(load("val")), on_device(load("test"))


def draw_synthetic(size: int, *, seed: int, num_each: int = 60) -> LabelledImages:
    """Noise with a bright spot in the upper half or in the lower."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(2, dtype=np.int32), num_each)
    rows = size * (0.3 + 0.4 * labels + rng.uniform(-0.1, 0.1, len(labels)))
    columns = size * rng.uniform(0.3, 0.7, len(labels))
    across = np.arange(size)
    squares = (across[:, None] - rows[:, None, None]) ** 2
    squares = squares + (across - columns[:, None, None]) ** 2
    spots = 150 * np.exp(-squares / (0.02 * size**2))
    images = np.clip(spots + rng.uniform(0, 100, spots.shape), 0, 255).astype(np.uint8)
    return LabelledImages(images[..., None], labels, ("upper", "lower"))


def sampler(config: Config, num_shots: int) -> Sample:
    """`sample(key, data) -> Episode` of pictures in [0, 1], bright as they are."""

    def sample(key: PRNGKey, data: ClassData) -> Episode:
        episode = sample_episode(
            key, data, num_ways=2, num_shots=num_shots, num_queries=config.num_queries
        )
        return Episode(*((images.astype(jnp.float32) / 255, y) for images, y in episode))

    return sample


def scratch_predict(net: Conv4, *, num_steps: int) -> PredictFn:
    """Trains a net from a random initialisation on each support set.

    A `PredictFn` of `MetaParams((), rate)`, as `choose_fine_tuning` takes it.
    """
    loss_fn = cross_entropy_loss(net.apply)

    def predict(params: MetaParams, support: Batch, inputs: Array, key: PRNGKey) -> PyTree:
        init_key, train_key = jax.random.split(key)
        trained = maml_predict(
            loss_fn,
            both_modes(net.apply),
            inner_optimizer=optax.sgd(params.rule),
            num_steps=num_steps,
            every_step=True,
        )
        return trained(net.init(init_key, inputs[:1]), support, inputs, train_key)

    return predict


def prototypes_predict(net: Conv4) -> PredictFn:
    """Classifies by prototypes of the features, in both modes."""
    return few_shot_learners.each_mode(
        lambda inductive: prototypical_predict(net.apply, num_ways=2, inductive=inductive)
    )


def score(
    logits: Float[Array, "*steps queries 2"], labels: Int[Array, " queries"]
) -> dict[str, Array]:
    """The metrics of one task, `(*steps,)`; a query whose logits are NaN counts as wrong."""

    def of_step(margins):
        predicted = jnp.where(jnp.isnan(margins), -1, margins > 0)
        accuracy = balanced_accuracy(predicted, labels, num_classes=2)
        return {"balanced_accuracy": accuracy, "auc": roc_auc(margins, labels)}

    margins = logits[..., 1] - logits[..., 0]
    *steps, num_queries = margins.shape
    flat = jax.vmap(of_step)(margins.reshape(-1, num_queries))
    return jax.tree.map(lambda x: x.reshape(steps), flat)


def compare_methods(
    config: Config, pretrained: Pretrained, num_shots: int, val: ClassData, test: ClassData
) -> dict[str, Row]:
    """Every method and mode by name, on the same episodes."""
    net = pretrained.net.clone(num_outputs=2)
    image = jnp.zeros((1, pretrained.image_size, pretrained.image_size, 1))
    blocks = net.init(jax.random.key(config.seed), image)["params"] | pretrained.params["params"]
    sample = sampler(config, num_shots)
    devices = tuple(jax.local_devices()[: config.num_devices])
    run: dict[str, Any] = {"chunk": config.chunk, "devices": devices}

    def on_test(predict: PredictFn, params: Params) -> PyTree:
        return evaluate_few_shot(
            predict,
            params,
            sample,
            test,
            key=jax.random.key(TEST_SEED),
            num_tasks=config.num_test_tasks,
            score=score,
            **run,
        )

    prototypes = on_test(prototypes_predict(pretrained.net), pretrained.params)
    rows = {f"prototypes_{mode}": Row(metrics) for mode, metrics in prototypes.items()}
    fine_tuned = fine_tune_predict(
        cross_entropy_loss(net.apply),
        both_modes(net.apply),
        num_ways=2,
        num_steps=config.num_steps,
        every_step=True,
    )
    for name, predict, params in (
        ("fine_tuned", fine_tuned, {"params": blocks}),
        ("from_scratch", scratch_predict(net, num_steps=config.num_steps), ()),
    ):
        choices = choose_fine_tuning(
            predict,
            params,
            sample,
            val,
            key=jax.random.key(VALIDATION_SEED),
            rates=config.rates,
            num_tasks=config.num_validation_tasks,
            **run,
        )
        for mode, choice in choices.items():
            metrics = on_test(predict, MetaParams(params, jnp.float32(choice.rate)))[mode]
            chosen = {metric: value.at(choice.num_steps) for metric, value in metrics.items()}
            rows[f"{name}_{mode}"] = Row(chosen, choice)
    rows["nearest_neighbour"] = Row(on_test(nearest_neighbour_predict(2), ()))
    return rows


def main(config: Config) -> dict[str, Any]:
    """Tests all methods at all numbers of shots, prints the tables and draws the figure."""
    check(config)
    pretrained = load_pretrained(config)
    val, test = load_splits(config, pretrained.image_size)
    sizes = [" + ".join(map(str, data.sizes.tolist())) for data in (val, test)]
    print(f"{config.dataset}: {sizes[0]} pictures to validate, {sizes[1]} to test")
    columns = {}
    for num_shots in config.shots:
        print(f"{num_shots} of each class")
        columns[num_shots] = compare_methods(config, pretrained, num_shots, val, test)
    about = f"{config.num_test_tasks} test tasks, {config.num_queries} queries a class"
    show_tables(columns, about)
    draw(columns, f"{config.dataset}: {about}", config.run_dir / "medical.png")
    numbers: dict[str, Any] = {
        "num_tasks": config.num_test_tasks,
        "num_queries_per_task": 2 * config.num_queries,
    }
    for num_shots, rows in columns.items():
        for name, row in rows.items():
            end = f"{num_shots}_shot"
            for metric, value in row.metrics.items():
                numbers[f"{name}_{metric}_{end}"] = float(value.mean)
                numbers[f"{name}_{metric}_interval_{end}"] = float(value.interval)
            if row.choice is not None:
                numbers[f"{name}_rate_{end}"] = row.choice.rate
                numbers[f"{name}_steps_{end}"] = row.choice.num_steps
    return numbers


if __name__ == "__main__":
    program.run("medical", main, PRESETS, default="default")
