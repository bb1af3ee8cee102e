"""How the samples of `experiments.density` compare with test images, by a classifier's features."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table
from jaxtyping import Array, Float

from experiments.density_config import Config
from experiments.density_data import Splits
from experiments.density_model import Model
from metagen_jax.evaluation.image_grids import plot_image_grid
from metagen_jax.evaluation.sample_quality import (
    frechet_distance,
    kernel_distance,
    nearest_neighbours,
    precision_recall,
)
from metagen_jax.gradients import gradients, task_keys
from metagen_jax.nets.conv4 import Conv4
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.training import fit, init_state, train_step
from metagen_jax.types import Params, PRNGKey

CLASSIFIER_STEPS, CLASSIFIER_BATCH, CLASSIFIER_SEED = 3000, 128, 7
SAMPLE_SEED, BLOCK, NUM_SHOWN = 1_000_000_004, 500, 10


def compare_and_report(
    config: Config, model: Model, params: Params, splits: Splits
) -> dict[str, Any]:
    """Draws as many samples as test images are compared, compares both, prints and draws.

    The features are those before the head of a `Conv4` with group norms, trained on the same
    training images for so many steps from a seed of its own: the same for every model.
    """
    peak = 1 if config.values == "static" else 255
    kept = slice(config.num_compared)
    train, test = (x.astype(np.float32) / peak for x in (splits.train, splits.test[kept]))
    samples = _draw_samples(model, params, len(test))
    classifier = _train_classifier(config, train, splits.train_labels)
    num_classes = int(splits.train_labels.max()) + 1
    of_train, of_test, of_samples = (
        _in_blocks(lambda x: _net(None).apply(classifier, x), images)
        for images in (train[: len(test)], test, samples)
    )
    logits = {
        name: _in_blocks(lambda x: _net(num_classes).apply(classifier, x), images)
        for name, images in (("test", test), ("samples", samples))
    }
    shares = np.bincount(logits["samples"].argmax(1), minlength=num_classes) / len(samples)
    quality = precision_recall(of_test, of_samples)
    kernel = kernel_distance(
        jax.random.key(SAMPLE_SEED), of_test, of_samples, subset_size=min(1000, len(test))
    )
    numbers = {
        "frechet_distance": frechet_distance(of_test, of_samples),
        "frechet_distance_of_training_images": frechet_distance(of_test, of_train),
        "kernel_distance": float(kernel.mean),
        "precision": quality.precision,
        "recall": quality.recall,
        "num_samples": len(samples),
        "samples_are": model.samples_are or "draws",
        "smallest_share_of_a_class": float(shares.min()),
        "classifier_accuracy": float((logits["test"].argmax(1) == splits.test_labels[kept]).mean()),
    }
    _print_table(config, numbers)
    _draw_nearest(config, samples[:NUM_SHOWN], train)
    return numbers


def _net(num_outputs: int | None) -> Conv4:
    return Conv4(num_outputs, 64, norm="group")


def _train_classifier(config: Config, images: np.ndarray, labels: np.ndarray) -> Params:
    net = _net(int(labels.max()) + 1)

    def sample(key: PRNGKey, data: tuple[Array, Array]) -> tuple[Array, Array]:
        chosen = jax.random.randint(key, (CLASSIFIER_BATCH,), 0, len(data[1]))
        return data[0][chosen], data[1][chosen]

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, CLASSIFIER_STEPS))
    init_key, train_key = jax.random.split(jax.random.key(CLASSIFIER_SEED))
    params = net.init(init_key, jnp.asarray(images[:1]))
    return fit(
        train_step(gradients(cross_entropy_loss(net.apply)), optimizer, sample),
        init_state(params, optimizer, train_key),
        (jnp.asarray(images), jnp.asarray(labels)),
        num_steps=CLASSIFIER_STEPS,
        run_dir=config.run_dir / "classifier",
        resume=config.resume,
    ).best_params


def _draw_samples(model: Model, params: Params, count: int) -> Float[np.ndarray, "n h w c"]:
    keys = task_keys(jax.random.key(SAMPLE_SEED), count)
    draw = jax.jit(jax.vmap(model.sample, in_axes=(None, 0)))
    blocks = [draw(params, keys[start : start + BLOCK]) for start in range(0, count, BLOCK)]
    return np.concatenate([np.clip(block, 0, 1) for block in blocks])


def _in_blocks(function, images: np.ndarray) -> Float[np.ndarray, "n d"]:
    compiled = jax.jit(function)
    starts = range(0, len(images), BLOCK)
    return np.concatenate([compiled(images[start : start + BLOCK]) for start in starts])


def _print_table(config: Config, numbers: dict[str, Any]) -> None:
    table = rich.table.Table(
        title=f"{numbers['num_samples']:,} samples of {config.model}, by a classifier's features; "
        f"they are {numbers['samples_are']}",
        caption=f"classifier: accuracy {100 * numbers['classifier_accuracy']:.1f} % on test images",
    )
    table.add_column("Frechet distance from test images")
    table.add_column("of training images")
    table.add_column("precision / recall")
    table.add_column("rarest class")
    table.add_row(
        f"{numbers['frechet_distance']:.3f}",
        f"{numbers['frechet_distance_of_training_images']:.3f}",
        f"{numbers['precision']:.2f} / {numbers['recall']:.2f}",
        f"{100 * numbers['smallest_share_of_a_class']:.1f} %",
    )
    rich.console.Console(width=100).print(table)


def _draw_nearest(config: Config, samples: np.ndarray, train: np.ndarray) -> None:
    flat = samples.reshape(len(samples), -1), train.reshape(len(train), -1)
    _, indices = nearest_neighbours(*flat)
    plot_image_grid(
        np.stack([samples, train[np.asarray(indices)[:, 0]]]),
        config.run_dir / "nearest.png",
        title=f"{config.model} of {config.dataset}: samples, and the nearest training images",
        row_labels=["sample", "nearest"],
    )
