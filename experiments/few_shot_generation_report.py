"""The table and the pictures of `experiments.few_shot_generation`."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from jaxtyping import Array

from experiments.few_shot_generation_compare import Other, save_figures
from experiments.few_shot_generation_config import Config
from experiments.few_shot_generation_learners import Learner
from metagen_jax.data.episodes import ClassData
from metagen_jax.data.set_episodes import first_shots
from metagen_jax.evaluation import plots
from metagen_jax.evaluation.estimates import Estimate, estimate
from metagen_jax.evaluation.few_shot import Sample
from metagen_jax.evaluation.image_grids import plot_image_grid
from metagen_jax.evaluation.shot_curves import plot_nll_by_shots
from metagen_jax.gradients import task_keys
from metagen_jax.runs.log import has_log, read_metrics
from metagen_jax.types import Params

# Bartunov and Vetrov 2018, table 1; 1000 importance samples, queries may be among the examples.
PUBLISHED = {
    "GMN, published": {0: 90.9, 1: 82.8, 2: 78.8, 3: 76.4, 4: 74.2, 9: 64.6},
    "averaging GMN": {0: 91.3, 1: 83.9, 2: 82.3, 3: 81.8, 4: 81.1, 9: 80.3},
}
NUM_ROWS, NUM_SUPPORT, NUM_SAMPLES = 6, 4, 4


class Row(NamedTuple):
    """A number of shots: the figure, if any, the steps and the rate chosen, what was tested."""

    nll: Estimate | None
    num_steps: int
    rate: str | None
    params: Params


def report(
    config: Config,
    learner: Learner,
    rows: Mapping[int, Row],
    *,
    title: str,
    other: Other | None = None,
) -> dict[str, Any]:
    """Prints the table, draws figures against shots, keeps those of each episode.

    Args:
      config: settings.
      learner: what was tested.
      rows: the test by number of shots, the first without any.
      title: of model, learner and data.
      other: the run to compare with, if any.

    Returns:
      `nll_by_shots`, and `against`, the other run's name.
    """
    figures = {n: row.nll for n, row in rows.items() if row.nll is not None}
    by_shots: dict[str, Any] = {}
    for num_shots, nll in figures.items():
        # The same episodes and queries, so that the difference is better known than the means.
        gain = estimate(figures[0].per_task - nll.per_task)
        by_shots[str(num_shots)] = {
            "nats": float(nll.mean),
            "interval": float(nll.interval),
            "gain": float(gain.mean),
            "gain_interval": float(gain.interval),
            "steps": rows[num_shots].num_steps,
            "rate": rows[num_shots].rate,
        }
    curves = {f"{config.model} by {config.learner}": figures}
    if other is not None:
        curves[other.name] = other.figures
        for num_shots in figures.keys() & other.figures.keys():
            less = estimate(other.figures[num_shots].per_task - figures[num_shots].per_task)
            by_shots[str(num_shots)] |= {
                "less_than_other": float(less.mean),
                "less_than_other_interval": float(less.interval),
            }
    _print_table(config, learner, by_shots, title, other)
    save_figures(config, figures)
    plot_nll_by_shots(
        curves,
        config.run_dir / "nll_by_shots.png",
        title=title,
        published=PUBLISHED if as_published(config) else None,
    )
    return {"nll_by_shots": by_shots} | ({} if other is None else {"against": other.name})


def as_published(config: Config) -> bool:
    """Whether pixels, classes and draws are those of the published figures."""
    lake = config.dataset == "omniglot" and config.split == "lake"
    pixels = config.image_size, config.resampling, config.values
    whole = config.num_test_classes is None and config.sets_of == "characters"
    return lake and whole and pixels == (28, "corner", "stored") and config.replacement != "never"


def draw(
    config: Config,
    learner: Learner,
    rows: Mapping[int, Row],
    test: ClassData,
    sample_test: Sample,
    *,
    title: str,
    test_seed: int,
) -> None:
    """Draws the learning curve, and support images beside samples without and with them.

    Args:
      config, learner, rows, title: as in `report`.
      test: images of the test classes.
      sample_test: its episodes.
      test_seed: of these.
    """
    _draw_samples(config, learner, rows, test, sample_test, title, test_seed)
    drawn = ["samples.png"]
    if learner.log_probs is not None:
        drawn.append("nll_by_shots.png")
    if has_log(config.run_dir):
        _draw_learning_curve(config.run_dir, f"{title}: training")
        drawn.append("learning_curve.png")
    print(f"pictures are in {config.run_dir}: {', '.join(drawn)}")


def _print_table(
    config: Config,
    learner: Learner,
    by_shots: Mapping[str, Any],
    title: str,
    other: Other | None,
) -> None:
    chosen = "; steps and rate chosen on validation classes" if learner.takes_steps else ""
    table = rich.table.Table(
        title=f"{title}: nats of the next image of an unseen class",
        caption=f"{learner.kind}; {config.num_test_tasks} episodes, ± 95 % interval" + chosen,
    )
    columns = ["shots", "nats", "less than without", "steps", "rate"]
    if other is not None:
        columns.append(f"less than {other.name}")
    for column in columns:
        table.add_column(column, justify="right")
    for num_shots, row in by_shots.items():
        rate = row["rate"]
        table.add_row(
            num_shots,
            f"{row['nats']:.2f} ± {row['interval']:.2f}",
            f"{row['gain']:.2f} ± {row['gain_interval']:.2f}" if num_shots != "0" else "",
            str(row["steps"]) if learner.takes_steps else "",
            rate or "",
            *_than_other(row, other),
        )
    rich.console.Console(width=100).print(table)


def _than_other(row: Mapping[str, Any], other: Other | None) -> list[str]:
    if other is None:
        return []
    if "less_than_other" not in row:
        return [""]
    return [f"{row['less_than_other']:.2f} ± {row['less_than_other_interval']:.2f}"]


def _draw_samples(
    config: Config,
    learner: Learner,
    rows: Mapping[int, Row],
    test: ClassData,
    sample_test: Sample,
    title: str,
    seed: int,
) -> None:
    """Rows of support images, samples without them and samples with them."""
    num_shots = max(n for n in rows if n <= NUM_SUPPORT)

    @functools.partial(jax.jit, static_argnames=("num_steps", "num_shots"))
    def samples(keys: Array, data: ClassData, params: Params, num_steps: int, num_shots: int):
        draw_new = learner.draw(num_steps)

        def of_episode(key: Array) -> tuple[Array, Array]:
            episode_key, sample_key = jax.random.split(key)
            support = first_shots(sample_test(episode_key, data), num_shots).support
            keys = task_keys(sample_key, NUM_SAMPLES)
            return support, draw_new(params, support, keys)

        return jax.lax.map(of_episode, keys)

    keys, chosen = task_keys(jax.random.key(seed), NUM_ROWS), rows[num_shots]
    _, before = samples(keys, test, rows[0].params, 0, 0)
    support, after = samples(keys, test, chosen.params, chosen.num_steps, num_shots)
    support = support.astype(jnp.float32)
    between = jnp.ones((NUM_ROWS, 1, *support.shape[2:]))
    images = jnp.concatenate([support, between, before, between, after], axis=1)
    plot_image_grid(
        np.asarray(images, np.float32),
        config.run_dir / "samples.png",
        title=title,
        note=f"support images of an unseen class; {NUM_SAMPLES} samples without them; "
        f"{NUM_SAMPLES} with them",
    )


def _draw_learning_curve(run_dir: Path, title: str) -> None:
    plots.plot_learning_curve(
        read_metrics(run_dir, validation_loss="validation_nll", loss="generator_loss"),
        run_dir / "learning_curve.png",
        title=title,
        loss_label="Loss of the query; validation: with 1 and 4 shots (nats)",
    )
