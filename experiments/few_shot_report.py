"""The test of `experiments.few_shot`: its tables and pictures."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from metagen_jax.chunks import Chunk
from metagen_jax.data.episodes import ClassData
from metagen_jax.evaluation import baselines, plots
from metagen_jax.evaluation.estimates import Estimate, percent
from metagen_jax.evaluation.few_shot import Sample, both_modes, evaluate_few_shot, transductive
from metagen_jax.runs.log import read_metrics
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.types import MetaParams, Params, PredictFn

VALIDATION_SEED, TEST_SEED = 1, 2
MODES = ("transductive", "inductive")
FINE_TUNING_STEPS, FINE_TUNING_RATES = 5, (0.03, 0.1, 0.3, 1.0)
NUM_CHOICE_TASKS = 300


class Subject(NamedTuple):
    """What is tested.

    Attributes:
      name: of the learner.
      predict: `{mode: logits after each step}`.
      params: what it starts from.
      pretrained: parameters of a conventional classifier, for the baseline; None leaves it out.
      apply: of the net with one output for each class of an episode.
    """

    name: str
    predict: PredictFn
    params: Params
    pretrained: Params | None
    apply: Callable


class Row(NamedTuple):
    """A line of the table: a method, its steps on the support set, its accuracy by mode."""

    method: str
    steps: str
    accuracies: Mapping[str, Estimate]


class Tested(NamedTuple):
    """The accuracies with one number of queries.

    Attributes:
      learner: by mode, after 0, 1, ... steps.
      best: the number of steps that validated best.
      others: the baselines, by name.
      fine_tuning: the steps and the rate that were chosen for fine-tuning, by name.
    """

    learner: Mapping[str, Estimate]
    best: int
    others: dict[str, Row]
    fine_tuning: dict[str, float]


def report(
    subject: Subject,
    samplers: Mapping[int, Sample],
    val_data: ClassData,
    test_data: ClassData,
    *,
    what: str,
    num_ways: int,
    num_tasks: int,
    chunk: Chunk,
    devices: Sequence[jax.Device],
    run_dir: Path,
) -> dict[str, Any]:
    """Tests with each number of queries, prints the tables, draws the pictures.

    Args:
      subject: what is tested.
      samplers: of episodes, by their queries a class; the first gives the plainly named numbers.
      val_data: classes on which steps and rates are chosen.
      test_data: classes of the test.
      what: data, ways and shots, for the titles of the pictures.
      num_ways: classes of an episode.
      num_tasks: episodes of the test.
      chunk: how many episodes a device works on at once.
      devices: what to spread the episodes over.
      run_dir: where pictures are written.

    Returns:
      The numbers of the tables; those of later samplers end in `_15_queries` and the like.
    """
    numbers: dict[str, Any] = {}
    for num_queries, sample in samplers.items():
        tested = _test(subject, sample, val_data, test_data, num_ways, num_tasks, chunk, devices)
        queries = "1 query" if num_queries == 1 else f"{num_queries} queries"
        title = f"{num_tasks} episodes of unseen classes, {queries} a class"
        rows = [
            Row(subject.name, str(step) if step else "none", _at_step(tested.learner, step))
            for step in range(len(tested.learner["transductive"].mean))
        ]
        shown = [row for step, row in enumerate(rows) if _is_shown(step, tested.best, len(rows))]
        chosen = rows[tested.best]
        _print_table(
            title, [*shown, *tested.others.values()], chosen=chosen if len(rows) > 1 else None
        )
        suffix = f"_{num_queries}_queries" if numbers else ""
        found = {f"after_{row.steps}_steps": row for row in shown[1:]}
        found |= {"test": chosen, "before_adaptation": shown[0], **tested.others}
        if not suffix:
            _draw_episode(subject, sample, test_data, tested.best, run_dir / "episode.png")
            _draw_adaptation(
                subject.name, tested, num_ways, f"{what}: {title}", run_dir / "adaptation.png"
            )
        numbers |= {
            f"queries_per_class{suffix}": num_queries,
            f"adaptation_steps{suffix}": tested.best,
            **{f"{name}{suffix}": value for name, value in tested.fine_tuning.items()},
        }
        for name, row in found.items():
            numbers |= _numbers(name, row, suffix)
    print(f"pictures of the test are in {run_dir}: adaptation.png, episode.png")
    return numbers


def _test(
    subject: Subject,
    sample: Sample,
    val_data: ClassData,
    test_data: ClassData,
    num_ways: int,
    num_tasks: int,
    chunk: Chunk,
    devices: Sequence[jax.Device],
) -> Tested:
    """Tests a learner and the baselines, each with the steps that suit it on validation classes."""
    few = min(NUM_CHOICE_TASKS, num_tasks)
    schedule = {"chunk": chunk, "devices": devices}

    def evaluate(predict, params, data, seed, count=num_tasks):
        key = jax.random.key(seed)
        return evaluate_few_shot(
            predict, params, sample, data, key=key, num_tasks=count, **schedule
        )

    steps = evaluate(subject.predict, subject.params, val_data, VALIDATION_SEED, few)
    learner = evaluate(subject.predict, subject.params, test_data, TEST_SEED)
    others = {"nearest_neighbour": _nearest_neighbour(evaluate, test_data, num_ways)}
    fine_tuning = {}
    if subject.pretrained is not None:
        choose = functools.partial(
            baselines.choose_fine_tuning,
            sample=sample,
            data=val_data,
            key=jax.random.key(VALIDATION_SEED),
            rates=FINE_TUNING_RATES,
            num_tasks=few,
            **schedule,
        )
        others["fine_tuned"], chosen = _fine_tuned(subject, evaluate, choose, test_data, num_ways)
        fine_tuning = {"fine_tuned_steps": chosen.num_steps, "fine_tuned_rate": chosen.rate}
    return Tested(learner, int(steps["transductive"].mean.argmax()), others, fine_tuning)


def draw_learning_curve(run_dir: Path, *, title: str) -> None:
    """Draws the `metrics.jsonl` of a run into its `learning_curve.png`."""
    path = run_dir / "learning_curve.png"
    plots.plot_learning_curve(
        read_metrics(run_dir),
        path,
        title=title,
        loss_label="Loss (nats)",
        accuracy_label="Accuracy (%), validation: transductive",
    )
    print(f"the picture of the training is {path}")


def _fine_tuned(
    subject: Subject, evaluate: Callable, choose: Callable, test_data: ClassData, num_ways: int
) -> tuple[Row, baselines.FineTuning]:
    """The pretrained classifier, fine-tuned as it does best on validation classes, and how."""
    fine_tune = functools.partial(
        baselines.fine_tune_predict, cross_entropy_loss(subject.apply), num_ways=num_ways
    )
    tried = fine_tune(transductive(subject.apply), num_steps=FINE_TUNING_STEPS, every_step=True)
    chosen = choose(tried, subject.pretrained)
    # Compiled once more, but without the predictions of the other steps.
    tuned = evaluate(
        fine_tune(both_modes(subject.apply), num_steps=chosen.num_steps),
        MetaParams(subject.pretrained, jnp.float32(chosen.rate)),
        test_data,
        TEST_SEED,
    )
    steps = f"{chosen.num_steps} (rate {chosen.rate:g})"
    return Row("pretrained, fine-tuned", steps, tuned), chosen


def _nearest_neighbour(evaluate: Callable, test_data: ClassData, num_ways: int) -> Row:
    """Nearest neighbours in pixels."""
    nearest = evaluate(baselines.nearest_neighbour_predict(num_ways), (), test_data, TEST_SEED)
    return Row("nearest neighbour in pixels", "none", dict.fromkeys(MODES, nearest))


def _is_shown(step: int, best: int, num_rows: int) -> bool:
    """Whether the table has a line for a number of steps: all of few, the round ones of many."""
    return num_rows <= 8 or step in (0, 1, 2, 5, 10, 20, 50, best, num_rows - 1)


def _at_step(accuracies: Mapping[str, Estimate], step: int) -> dict[str, Estimate]:
    """The accuracies after so many steps."""
    return {mode: accuracy.at(step) for mode, accuracy in accuracies.items()}


def _numbers(name: str, row: Row, suffix: str) -> dict[str, float]:
    """`{name}_accuracy`, `{name}_interval` and the same of the inductive mode."""
    numbers = {}
    for mode, tail in zip(MODES, ("", "_inductive"), strict=True):
        numbers[f"{name}_accuracy{tail}{suffix}"] = float(row.accuracies[mode].mean)
        numbers[f"{name}_interval{tail}{suffix}"] = float(row.accuracies[mode].interval)
    return numbers


def _print_table(title: str, rows: list[Row], *, chosen: Row | None) -> None:
    caption = (
        "mean ± 95 % interval; transductive: queries normalised together; inductive: each by itself"
    )
    if chosen is not None:
        caption += "; *: the number of steps that validated best"
    table = rich.table.Table(title=f"Accuracy on {title}", caption=caption)
    table.add_column("method")
    table.add_column("steps on the support set")
    for mode in MODES:
        table.add_column(mode, justify="right")
    for row in rows:
        cells = [percent(row.accuracies[mode]) for mode in MODES]
        if row is chosen:
            table.add_row(row.method, f"{row.steps} *", *cells, style="bold")
        else:
            table.add_row(row.method, row.steps, *cells)
    rich.console.Console(width=100).print(table)


def _draw_adaptation(name: str, tested: Tested, num_ways: int, title: str, path: Path) -> None:
    """Accuracy against steps, with the baselines as lines."""
    curves = {f"{name}, {mode}": tested.learner[mode] for mode in MODES}
    curves |= {
        f"{row.method}{' (transductive)' * (key == 'fine_tuned')}": row.accuracies[MODES[0]]
        for key, row in tested.others.items()
    }
    plots.plot_adaptation(curves, path, title=title, chance=1 / num_ways)


def _draw_episode(subject: Subject, sample: Sample, data: ClassData, best: int, path: Path) -> None:
    """The first test episode, with what the learner says of its queries."""
    episode_key, predict_key = jax.random.split(jax.random.fold_in(jax.random.key(TEST_SEED), 0))
    episode = jax.jit(sample)(episode_key, data)
    logits = jax.jit(subject.predict)(
        subject.params, episode.support, episode.query[0], predict_key
    )["transductive"][best]
    plots.plot_episode(
        jax.tree.map(np.asarray, episode), np.asarray(logits.argmax(-1)), path, ink="high"
    )
