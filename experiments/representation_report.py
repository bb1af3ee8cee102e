"""How `experiments.representation` judges features, its table and its pictures."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import scipy.stats
from jaxtyping import Array, Float

from experiments.representation_config import TWO_VIEWS, Config
from experiments.representation_data import Part, Splits, is_characters, make_views
from experiments.representation_method import Method
from metagen_jax.data.episodes import check_episodes, group_by_class, sample_episode
from metagen_jax.evaluation import plots
from metagen_jax.evaluation.feature_maps import plot_feature_map
from metagen_jax.evaluation.few_shot import Sample, evaluate_few_shot
from metagen_jax.evaluation.image_grids import plot_image_grid
from metagen_jax.evaluation.probes import (
    alignment,
    describe_collapse,
    effective_rank,
    linear_probe,
    logistic_predict,
    nearest_neighbour_accuracy,
    uniformity,
)
from metagen_jax.meta.metric import prototypical_predict
from metagen_jax.runs.log import read_metrics
from metagen_jax.similarity import unit_rows
from metagen_jax.types import Params, PredictFn

# Of the test episodes, the same for every --seed and unlike any likely one.
TEST_SEED = 1_000_000_002
TASKS = ((5, 1), (5, 5), (20, 1))
NUM_NEIGHBOURS = 20
# Features by which collapse and uniformity are measured, and shown on the map.
NUM_MEASURED = 2000
_NO_SHARES = ("effective_rank", "alignment", "uniformity")

Features = Float[np.ndarray, "n features"]


def check_tasks(config: Config, test: Part) -> None:
    """Raises a UserError, before any training, if the test has too few images for the episodes."""
    data = group_by_class(test.labels, test.labels)
    for ways, shots in TASKS:
        check_episodes(data, num_ways=ways, num_shots=shots, num_queries=config.num_queries)


def judge_by_few_shots(config: Config, test: Part, features: Features) -> dict[str, float]:
    """Accuracies on episodes by the nearest class mean and, of several shots, a logistic model."""
    data = group_by_class(features, test.labels)
    numbers = {}
    for ways, shots in TASKS:
        sizes = {"num_ways": ways, "num_shots": shots, "num_queries": config.num_queries}
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


def measure(features: Features, view_a: Features, view_b: Features) -> dict[str, Any]:
    """How features are spread, how near those of two views are, and what has collapsed, if any."""
    some = features[np.random.default_rng(0).permutation(len(features))[:NUM_MEASURED]]
    return {
        "effective_rank": float(effective_rank(some)),
        "alignment": float(alignment(view_a, view_b)),
        "uniformity": float(uniformity(some)),
        "collapse": describe_collapse(some),
    }


def print_table(config: Config, results: Mapping[str, Mapping[str, Any]]) -> None:
    """A row for each kind of features."""
    longest = max(results.values(), key=len)
    names = [name for name in longest if not name.endswith("_interval") and name != "collapse"]
    caption = (
        f"accuracy in %, mean over {config.num_test_tasks} episodes of {config.num_queries} "
        "queries a class, of features of length 1; logistic regression of several shots only"
        if is_characters(config)
        else f"accuracy in % on test images; {NUM_NEIGHBOURS} neighbours"
    )
    if config.fine_tuning:
        caption += "; of a whole net tuned on shares of the labels"
    over = f"{config.seeds} seeds" if config.seeds > 1 else "episodes"
    if config.seeds > 1 or is_characters(config):
        caption += f"; ± 95 % interval over {over}"
    table = rich.table.Table(title=f"Features of {config.dataset}", caption=caption)
    table.add_column("features")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for kind, numbers in results.items():
        cells = []
        for name in names:
            scale = 1 if name in _NO_SHARES else 100
            value, interval = numbers.get(name), numbers.get(f"{name}_interval")
            around = "" if interval is None else f" ± {scale * interval:.2f}"
            cells.append("-" if value is None else f"{scale * value:.2f}{around}")
        table.add_row(kind, *cells)
    rich.console.Console(width=140).print(table)
    for kind, numbers in results.items():
        if numbers.get("collapse"):
            print(f"{kind}: {numbers['collapse']}")


def over_seeds(runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Means of the numbers of several runs, and half widths of their 95 % intervals.

    By Student's t, `t s / sqrt(runs)`; a collapse is that of any run.
    """
    quantile = float(scipy.stats.t.ppf(0.975, len(runs) - 1))
    means: dict[str, dict[str, Any]] = {}
    for kind, numbers in runs[0].items():
        means[kind] = {}
        for name in numbers:
            if name.endswith("_interval"):
                continue
            values = [run[kind][name] for run in runs]
            if name == "collapse":
                means[kind][name] = next(filter(None, values), None)
                continue
            half = quantile * np.std(values, ddof=1) / np.sqrt(len(values))
            means[kind] |= {name: float(np.mean(values)), f"{name}_interval": float(half)}
    return means


def draw(
    config: Config, method: Method, params: Params, splits: Splits, features: Features
) -> None:
    """Draws the learning curve, neighbours, a map and what the method sees or draws."""
    folder, what = config.run_dir, f"{config.method} of {config.dataset}"
    plots.plot_learning_curve(
        read_metrics(folder), folder / "learning_curve.png", title=f"{what}: training"
    )
    some = np.random.default_rng(0).permutation(len(splits.test.images))
    images = splits.test.images / np.float32(255)
    _draw_neighbours(config, images, features, some[:8], what)
    # Of characters a few each: the pictures of six classes are looked for, not those of a sample.
    labels = splits.test.labels
    shown = np.random.default_rng(0).permutation(np.unique(labels))[:6]
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(np.isin(labels, shown)))
    chosen = chosen[:NUM_MEASURED]
    plot_feature_map(
        features[chosen],
        labels[chosen],
        folder / "map.png",
        title=f"{what}: test images by two principal directions",
    )
    drawn = ["learning_curve.png", "neighbours.png", "map.png"]
    if config.method in TWO_VIEWS:
        views = np.asarray(make_views(config, jnp.asarray(images[some[:8]]), num_views=9))
        plot_image_grid(
            views, folder / "views.png", title=f"{config.dataset}: views of an image in each row"
        )
        drawn.append("views.png")
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
