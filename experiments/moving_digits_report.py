"""The table and the pictures of `experiments.moving_digits`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table
from jaxtyping import Array, Float

from metagen_jax.evaluation import plots
from metagen_jax.evaluation.estimates import estimate
from metagen_jax.evaluation.figures import COLOURS, finish, label_right, new_figure, save
from metagen_jax.evaluation.image_grids import plot_image_grid
from metagen_jax.runs.log import read_metrics
from metagen_jax.self_supervised.temporal import PredictNext, roll_out
from metagen_jax.types import Params

_SHOWN = 2
_KINDS = {
    "next_frame": "the next one, of frames as they are",
    "future": "all that follow, of frames as predicted",
}


def print_table(loss: str, numbers: Mapping[str, float], *, num_films: int, num_seen: int) -> None:
    """The errors of the net beside those of copying, and by how much it is better."""
    table = rich.table.Table(
        title=f"1000 times the mean squared error of frames after the first {num_seen}",
        caption=f"mean ± 95 % interval over {num_films} films of unseen pictures, which are from 0 "
        f"to 1; the net was trained by {loss}",
    )
    for column in ("what is predicted", "net", "last frame copied", "better by"):
        table.add_column(column, justify="left" if column.startswith("what") else "right")
    for name, kind in _KINDS.items():
        cells = [
            f"{1000 * numbers[name + what]:.2f} ± {1000 * numbers[f'{name}{what}_interval']:.2f}"
            for what in ("", "_copied", "_gain")
        ]
        table.add_row(kind, *cells)
    rich.console.Console(width=110).print(table)


def draw(
    folder: Path, predict: PredictNext, params: Params, films: Array, errors: Any, *, num_seen: int
) -> None:
    """Draws the learning curve, two films with their predictions, and the errors by frame."""
    plots.plot_learning_curve(
        read_metrics(folder),
        folder / "learning_curve.png",
        title="Moving digits: training",
        loss_label="Mean squared error",
    )
    _draw_films(folder / "films.png", predict, params, films[:_SHOWN], num_seen)
    _draw_errors(folder / "errors.png", errors)
    print(f"pictures are in {folder}: learning_curve.png, films.png, errors.png")


def _draw_films(
    path: Path, predict: PredictNext, params: Params, films: Array, num_seen: int
) -> None:
    num_frames = films.shape[1] - num_seen
    following = jax.jit(predict)(params, films[:, :-1])[:, num_seen - 1 :]
    rolled = jax.jit(lambda p, x: roll_out(predict, p, x, num_frames=num_frames))(
        params, films[:, :num_seen]
    )
    first = max(0, num_seen - 4)
    rows = []
    for film, of_next, of_future in zip(films, following, rolled, strict=True):
        seen = film[first:num_seen]
        rows += [np.concatenate([seen, x]) for x in (film[num_seen:], of_next, of_future)]
    plot_image_grid(
        np.stack(rows),
        path,
        title="Films of the test, and what the net makes of them",
        row_labels=["as it is", "next frame", "all that follow"] * len(films),
        note=f"The first {num_seen - first} frames of each row are the last ones that were seen.",
    )


def _draw_errors(path: Path, errors: Any) -> None:
    figure = new_figure(6.5, 3.6, "Frames that follow, predicted from predicted ones")
    axes, labels = figure.subplots(), []
    of_kinds: tuple[tuple[str, Float[np.ndarray, "n frames"]], ...] = (
        ("net", errors.future),
        ("last frame\ncopied", errors.future_copied),
    )
    for colour, (name, values) in zip(COLOURS, of_kinds, strict=False):
        value = estimate(values)
        ahead = np.arange(1, len(value.mean) + 1)
        axes.plot(ahead, value.mean, color=colour, marker="o", ms=3.5, lw=1.5)
        axes.fill_between(
            ahead,
            value.mean - value.interval,
            value.mean + value.interval,
            color=colour,
            alpha=0.2,
            lw=0,
        )
        labels.append((float(value.mean[-1]), name, colour))
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(1, errors.future.shape[1] + 1))
    finish(axes, "frames ahead", "Mean squared error")
    label_right(axes, labels)
    save(figure, path)
