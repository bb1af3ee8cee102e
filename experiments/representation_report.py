"""How `experiments.representation` judges features, its table and its pictures."""

import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from jaxtyping import Array, Float

from experiments.representation_config import Config
from experiments.representation_data import Part, Splits, is_characters, make_views
from experiments.representation_method import Method
from metagen_jax.data.episodes import check_episodes, group_by_class, sample_episode
from metagen_jax.evaluation import plots
from metagen_jax.evaluation.feature_maps import plot_feature_map
from metagen_jax.evaluation.few_shot import Sample, evaluate_few_shot
from metagen_jax.evaluation.image_grids import plot_image_grid
from metagen_jax.evaluation.probes import (
    describe_collapse,
    effective_rank,
    linear_probe,
    logistic_predict,
    nearest_neighbour_accuracy,
    uniformity,
)
from metagen_jax.meta.metric import prototypical_predict
from metagen_jax.similarity import unit_rows
from metagen_jax.types import Params, PredictFn

# Of the test episodes, the same for every --seed and unlike any likely one.
TEST_SEED = 1_000_000_002
TASKS = ((5, 1), (5, 5), (20, 1))
NUM_NEIGHBOURS = 20
# Features by which collapse and uniformity are measured, and shown on the map.
NUM_MEASURED = 2000

Features = Float[np.ndarray, "n features"]


def judge_by_few_shots(config: Config, test: Part, features: Features) -> dict[str, float]:
    """Accuracies on episodes by the nearest class mean and, of several shots, a logistic model."""
    data = group_by_class(features, test.labels)
    numbers = {}
    for ways, shots in TASKS:
        sizes = {"num_ways": ways, "num_shots": shots, "num_queries": config.num_queries}
        check_episodes(data, **sizes)
        for name, predict in _predictors(ways, shots).items():
            accuracy = evaluate_few_shot(
                predict,
                (),
                _sampler(**sizes),
                data,
                key=jax.random.key(TEST_SEED),
                num_tasks=config.num_test_tasks,
            )
            what = f"{ways}_way_{shots}_shot_{name}"
            numbers |= {what: float(accuracy.mean), f"{what}_interval": float(accuracy.interval)}
    return numbers


# The same functions for all features, which then share compiled programs.
@functools.cache
def _predictors(num_ways: int, num_shots: int) -> dict[str, PredictFn]:
    def embed(params: Params, inputs: Array) -> Array:
        del params
        return unit_rows(inputs)

    predictors = {"class_mean": prototypical_predict(embed, num_ways=num_ways)}
    if num_shots > 1:
        predictors["logistic"] = logistic_predict(embed, num_ways=num_ways)
    return predictors


@functools.cache
def _sampler(**sizes: int) -> Sample:
    return functools.partial(sample_episode, **sizes)


def judge_by_probes(
    train: tuple[Features, np.ndarray],
    val: tuple[Features, np.ndarray],
    test: tuple[Features, np.ndarray],
) -> dict[str, float]:
    """Accuracies of a linear probe and of nearest neighbours, on features of labelled images."""
    num_classes = int(train[1].max()) + 1
    probe = linear_probe(train, val, test, num_classes=num_classes)
    neighbours = nearest_neighbour_accuracy(
        train, test, num_classes=num_classes, num_neighbours=NUM_NEIGHBOURS
    )
    return {"linear_probe": probe.accuracy, "nearest_neighbours": neighbours}


def measure(features: Features) -> dict[str, Any]:
    """How features are spread, and what has collapsed, if anything has."""
    some = features[np.random.default_rng(0).permutation(len(features))[:NUM_MEASURED]]
    return {
        "effective_rank": float(effective_rank(some)),
        "uniformity": float(uniformity(some)),
        "collapse": describe_collapse(some),
    }


def print_table(config: Config, results: Mapping[str, Mapping[str, Any]]) -> None:
    """A row for each kind of features."""
    names = [
        name
        for name in next(iter(results.values()))
        if not name.endswith("_interval") and name not in ("collapse", "uniformity")
    ]
    caption = (
        f"accuracy in %, mean ± 95 % interval over {config.num_test_tasks} episodes of "
        f"{config.num_queries} queries a class, of features of length 1"
        if is_characters(config)
        else f"accuracy in % on test images; {NUM_NEIGHBOURS} neighbours"
    )
    table = rich.table.Table(title=f"Features of {config.dataset}", caption=caption)
    table.add_column("features")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for kind, numbers in results.items():
        cells = []
        for name in names:
            if name == "effective_rank":
                cells.append(f"{numbers[name]:.1f}")
                continue
            interval = numbers.get(f"{name}_interval")
            around = "" if interval is None else f" ± {100 * interval:.2f}"
            cells.append(f"{100 * numbers[name]:.2f}{around}")
        table.add_row(kind, *cells)
    rich.console.Console(width=140).print(table)
    for kind, numbers in results.items():
        if numbers["collapse"]:
            print(f"{kind}: {numbers['collapse']}")


def draw(
    config: Config, method: Method, params: Params, splits: Splits, features: Features
) -> None:
    """Draws the learning curve, views, neighbours, a map and what the method draws."""
    folder, what = config.run_dir, f"{config.method} of {config.dataset}"
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    plots.plot_learning_curve(
        map(json.loads, lines), folder / "learning_curve.png", title=f"{what}: training"
    )
    some = np.random.default_rng(0).permutation(len(splits.test.images))
    images = splits.test.images / np.float32(255)
    views = np.asarray(make_views(config, jnp.asarray(images[some[:8]]), num_views=9))
    plot_image_grid(
        np.concatenate([images[some[:8], None], views], 1),
        folder / "views.png",
        title=f"{config.dataset}: images and views of them",
    )
    _draw_neighbours(config, images, features, some[:8], what)
    chosen = some[:NUM_MEASURED]
    plot_feature_map(
        features[chosen],
        splits.test.labels[chosen],
        folder / "map.png",
        title=f"{what}: test images by two principal directions",
    )
    drawn = ["learning_curve.png", "views.png", "neighbours.png", "map.png"]
    if method.draw is not None:
        rows = method.draw(params, jnp.asarray(images[some[:12]]), jax.random.key(0))
        plot_image_grid(
            np.asarray(rows),
            folder / "drawings.png",
            title=f"{what}: test images",
            row_labels=method.rows,
        )
        drawn.append("drawings.png")
    print(f"pictures are in {folder}: {', '.join(drawn)}")


def _draw_neighbours(
    config: Config, images: np.ndarray, features: Features, queries: np.ndarray, what: str
) -> None:
    unit = np.asarray(unit_rows(jnp.asarray(features)))
    nearest = np.argsort(-(unit[queries] @ unit.T), axis=1)[:, :10]
    plot_image_grid(
        images[nearest],
        config.run_dir / "neighbours.png",
        title=f"{what}: nearest test images",
        note="Left: the image itself.",
    )
