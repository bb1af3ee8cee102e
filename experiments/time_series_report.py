"""How `experiments.time_series` judges features, its table and its pictures."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table
from jaxtyping import Array, Bool, Float, Int

from experiments.time_series_config import SOUNDS, Config, DatasetName
from experiments.time_series_data import Dataset, Part, split
from metagen_jax.data.audio import RATE
from metagen_jax.data.episodes import group_by_class, sample_episode
from metagen_jax.evaluation import plots
from metagen_jax.evaluation.baselines import nearest_neighbour_predict
from metagen_jax.evaluation.cross_validation import cross_validated_probe
from metagen_jax.evaluation.estimates import Estimate, estimate
from metagen_jax.evaluation.feature_maps import plot_feature_map
from metagen_jax.evaluation.few_shot import Sample, evaluate_few_shot
from metagen_jax.evaluation.figures import COLOURS, finish, new_figure, save
from metagen_jax.evaluation.probes import linear_probe
from metagen_jax.evaluation.spectrograms import plot_spectrograms
from metagen_jax.meta.metric import prototypical_predict
from metagen_jax.runs.log import read_metrics
from metagen_jax.similarity import unit_rows
from metagen_jax.types import Params, PredictFn

# Of the test episodes, the same for every --seed and unlike any likely one.
TEST_SEED = 1_000_000_002
SHOTS, MOST_WAYS = (1, 5), 5
RAW = "without a net"

Features = Mapping[str, Float[np.ndarray, "_ features"]]
"""By the names of the parts of a `Dataset`."""
Judged = dict[str, dict[str, Estimate]]
"""Accuracies by what is asked, then by the kind of features."""


def judge(
    config: Config, name: DatasetName, data: Dataset, target: str, kinds: Mapping[str, Features]
) -> Judged:
    """Accuracies of all kinds of features, by probes and by few shots.

    Series as they are, without a net, are judged by their nearest neighbour.
    """
    judged: Judged = {}
    for kind, features in kinds.items():
        if name not in SOUNDS and kind == RAW:
            correct = _nearest(features, data, target)
        else:
            correct = _probe(features, data, target)
        judged.setdefault(f"{name}: {target}", {})[kind] = estimate(correct.astype(np.float64))
        for num_ways, num_shots in _episodes(config, data.few, target):
            what = f"{name}: {target}, {num_ways}-way {num_shots}-shot"
            series_as_they_are = name not in SOUNDS and kind == RAW
            judged.setdefault(what, {})[kind] = evaluate_few_shot(
                nearest(num_ways) if series_as_they_are else class_mean(num_ways),
                (),
                _sampler(num_ways=num_ways, num_shots=num_shots, num_queries=config.num_queries),
                group_by_class(
                    features["few"] if series_as_they_are else _standard(features, "few"),
                    data.few.labels[target],
                ),
                key=jax.random.key(TEST_SEED),
                num_tasks=config.num_test_tasks,
            )
    return judged


def _episodes(config: Config, part: Part, target: str) -> list[tuple[int, int]]:
    """Ways and shots for which there are enough examples of each class."""
    sizes = np.unique(part.labels[target], return_counts=True)[1]
    ways = min(MOST_WAYS, len(sizes))
    return [(ways, shots) for shots in SHOTS if sizes.min() >= shots + config.num_queries]


def _standard(features: Features, part: str) -> Float[np.ndarray, "n features"]:
    """Features by the means and deviations of those that are learned from, without labels."""
    learned = features["learned"]
    deviation = learned.std(0)
    return (features[part] - learned.mean(0)) / np.where(deviation > 0, deviation, 1)


def _probe(features: Features, data: Dataset, target: str) -> Bool[np.ndarray, " n"]:
    """What a linear probe gets right, chosen by validation or, without any, cross-validation."""
    train, test = (
        (features[name], part.labels[target])
        for name, part in (("train", data.train), ("test", data.test))
    )
    num_classes = int(train[1].max()) + 1
    if data.val is None:
        return cross_validated_probe(train, test, num_classes=num_classes).correct
    val = features["val"], data.val.labels[target]
    classifier = linear_probe(train, val, test, num_classes=num_classes).classifier
    return np.asarray(classifier(test[0]).argmax(1)) == test[1]


def _nearest(features: Features, data: Dataset, target: str) -> Bool[np.ndarray, " n"]:
    """What the nearest training example gets right."""
    labels = data.train.labels[target]
    predict = jax.jit(nearest_neighbour_predict(int(labels.max()) + 1))
    support = features["train"], labels
    logits = predict((), support, features["test"], jax.random.key(0))
    return np.asarray(logits.argmax(1)) == data.test.labels[target]


# The same functions for all features, which then share compiled programs.
@functools.cache
def nearest(num_ways: int) -> PredictFn:
    return nearest_neighbour_predict(num_ways)


@functools.cache
def class_mean(num_ways: int) -> PredictFn:
    """By the nearest mean of a class, of features of length 1."""

    def embed(params: Params, inputs: Array) -> Array:
        del params
        return unit_rows(inputs)

    return prototypical_predict(embed, num_ways=num_ways)


@functools.cache
def _sampler(**sizes: int) -> Sample:
    return functools.partial(sample_episode, **sizes)


def summarise(config: Config, judged: Judged) -> dict[str, Any]:
    """All accuracies with their intervals, how far the method is above others, and averages."""
    numbers: dict[str, Any] = {}
    for task, kinds in judged.items():
        own = kinds[config.method]
        of_task = {}
        for kind, accuracy in kinds.items():
            of_task[kind] = float(accuracy.mean)
            of_task[f"{kind}_interval"] = float(accuracy.interval)
            if kind != config.method:
                gain = estimate(own.per_task - accuracy.per_task)
                of_task[f"gain_over_{kind}"] = float(gain.mean)
                of_task[f"gain_over_{kind}_interval"] = float(gain.interval)
        numbers[task] = of_task
    whole = [kinds for task, kinds in judged.items() if task.endswith(": class")]
    average = {
        kind: float(np.mean([kinds[kind].mean for kinds in whole]))
        for kind in (whole[0] if len(whole) > 1 else ())
    }
    return {"accuracies": numbers, "average_over_sets": average}


def print_table(
    config: Config, data: Mapping[DatasetName, Dataset], judged: Judged, average: Mapping
) -> None:
    """A row for each task, a column for each kind of features."""
    raw = " / ".join(sorted({of.raw_name for of in data.values()}))
    caption = (
        f"accuracy in %, ± 95 % interval over test examples or {config.num_test_tasks} episodes; "
        f"{RAW}: {raw}; series as they are by their nearest neighbour, features by a linear probe, "
        "of few shots by the nearest class mean"
    )
    table = rich.table.Table(title="Features of sequences", caption=caption)
    table.add_column("task")
    for kind in next(iter(judged.values())):
        table.add_column(kind, justify="right")
    for task, kinds in judged.items():
        cells = [f"{100 * a.mean:.2f} ± {100 * a.interval:.2f}" for a in kinds.values()]
        table.add_row(task, *cells)
    if average:
        table.add_row("average over sets", *(f"{100 * x:.2f}" for x in average.values()))
    rich.console.Console(width=140).print(table)


def draw_set(
    config: Config, name: DatasetName, data: Dataset, features: Float[np.ndarray, "n f"]
) -> None:
    """Draws the learning curve, examples of each class, and a map of the test features."""
    folder = config.run_dir / name
    plots.plot_learning_curve(
        read_metrics(folder),
        folder / "learning_curve.png",
        title=f"{config.method} of {name}: training",
    )
    target, labels = next(iter(data.test.labels.items()))
    names = [f"class {name}" if name.isdigit() else name for name in data.class_names[target]]
    _draw_examples(name, data.test, names, labels, folder / "examples.png")
    plot_feature_map(
        features,
        labels,
        folder / "map.png",
        title=f"{config.method} of {name}: test features by two principal directions",
        class_names=names,
    )


def _draw_examples(
    name: DatasetName, part: Part, names: list[str], labels: Int[np.ndarray, " n"], file: Path
) -> None:
    """Three of each class, the first of several variables."""
    sequences = split(part.sequences)
    rows = [[sequences[i] for i in np.flatnonzero(labels == c)[:3]] for c in range(len(names))]
    title = f"{name}: test examples"
    if name in SOUNDS:
        sounds = [
            [(label, sound[:, 0]) for sound in row] for label, row in zip(names, rows, strict=True)
        ]
        plot_spectrograms(sounds, file, title=title, rate=RATE)
        return
    columns = min(3, len(names))
    down = -(-len(names) // columns)
    figure = new_figure(3.2 * columns, 1.7 * down + 0.5, title)
    panels = np.atleast_1d(figure.subplots(down, columns, sharex=True)).ravel()
    for axes, label, row in zip(panels, names, rows, strict=False):
        for colour, sequence in zip(COLOURS, row, strict=False):
            axes.plot(sequence[:, 0], color=colour, lw=0.9)
        finish(axes, "", label)
    for axes in panels[len(names) :]:
        axes.axis("off")
    save(figure, file)


def draw_accuracies(config: Config, judged: Judged) -> None:
    """Every task in a row, every kind of features in a colour, with intervals."""
    figure = new_figure(8.0, 0.38 * len(judged) + 1.4, f"Features of sequences, {config.method}")
    axes = figure.subplots()
    kinds = list(next(iter(judged.values())))
    for i, (kind, colour) in enumerate(zip(kinds, COLOURS, strict=False)):
        accuracies = [of_task[kind] for of_task in judged.values()]
        axes.errorbar(
            [100 * float(a.mean) for a in accuracies],
            np.arange(len(judged)) + 0.16 * (i - (len(kinds) - 1) / 2),
            xerr=[100 * float(a.interval) for a in accuracies],
            fmt="o",
            ms=4,
            lw=1.2,
            color=colour,
            label=kind,
        )
    axes.set_yticks(range(len(judged)), list(judged))
    axes.invert_yaxis()
    finish(axes, "Accuracy (%), 95 % intervals", "")
    axes.grid(axis="x", color="#DDDDDD", lw=0.7)
    figure.legend(loc="outside lower center", ncols=len(kinds), frameon=False)
    save(figure, config.run_dir / "accuracies.png")
