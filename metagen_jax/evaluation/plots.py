"""Pictures of a run: its learning curve, a test episode, accuracy against steps of adaptation."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from metagen_jax.errors import UserError
from metagen_jax.evaluation.estimates import Estimate
from metagen_jax.evaluation.figures import (
    COLOURS,
    QUIET,
    File,
    finish,
    label_right,
    new_figure,
    save,
    write,
)
from metagen_jax.types import Episode

_RIGHT, _WRONG = "#009E73", "#C8102E"
# Lengths of an episode's picture, in inches.
_WIDTH, _MARGIN, _TOP, _BETWEEN, _GAP = 8.9, 0.25, 0.86, 0.35, 0.04
_NUM_COLUMNS = 11


def plot_learning_curve(
    records: Iterable[Mapping[str, Any]],
    path: File,
    *,
    title: str = "Learning curve",
    loss_label: str = "Loss",
    accuracy_label: str = "Accuracy (%)",
) -> None:
    """Training and validation against steps: a panel for the loss, one for the accuracy.

    Training is drawn as logged, faintly, and as its moving average over a 25th of the run;
    validation as points, the best of them named. A panel without records is left out.

    Args:
      records: lines of `metrics.jsonl`: `{"step": 100, "loss": 0.7, "accuracy": 0.8}` of training,
        `{"step": 100, "validation_accuracy": 0.75}` of validation. Accuracies are fractions.
      path: the picture to write; its suffix is the format.
      title: of the picture.
      loss_label: of the panel of `loss`; name the unit.
      accuracy_label: of the panel of `accuracy`.

    Raises:
      UserError: if no record has a loss or an accuracy.
    """
    records = list(records)
    panels = []
    for name, label, scale in (("loss", loss_label, 1), ("accuracy", accuracy_label, 100)):
        training = _series(records, name, scale)
        validation = _series(records, f"validation_{name}", scale)
        if training.size or validation.size:
            panels.append((name, label, training, validation))
    if not panels:
        raise UserError(
            f"none of the {len(records)} records has a loss or an accuracy; give the lines of a "
            "run's metrics.jsonl"
        )
    figure = new_figure(9.0 if len(panels) > 1 else 6.5, 3.6, title)
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        _draw_learning_curve(axes, *panel)
    save(figure, path)


def plot_adaptation(
    curves: Mapping[str, Estimate],
    path: File,
    *,
    title: str = "Accuracy on test episodes",
    chance: float | None = None,
) -> None:
    """Accuracy against the number of steps on the support set, with 95 % intervals.

    Args:
      curves: accuracies by the name of the learner, after 0, 1, 2, ... steps; one without an axis
        of steps, which does not adapt, is drawn as a level.
      path: the picture to write; its suffix is the format.
      title: of the picture.
      chance: the accuracy of guessing, drawn as a dotted line.

    Raises:
      UserError: if there are no curves.
    """
    if not curves:
        raise UserError("curves is empty; give at least one Estimate by its name")
    figure = new_figure(9.0, 4.2, title)
    axes = figure.subplots()
    last = max([np.size(a.mean) - 1 for a in curves.values() if np.ndim(a.mean)] or [1])
    labels = []
    for i, (name, accuracy) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        mean, interval = 100 * np.asarray(accuracy.mean), 100 * np.asarray(accuracy.interval)
        if mean.ndim:
            axes.errorbar(
                range(len(mean)), mean, interval, color=colour, marker="o", ms=4, capsize=3
            )
        else:
            axes.axhspan(
                float(mean - interval), float(mean + interval), color=colour, alpha=0.15, lw=0
            )
            axes.axhline(float(mean), color=colour, ls="--")
        end, width = mean.reshape(-1)[-1], interval.reshape(-1)[-1]
        labels.append((float(end), f"{name}  {end:.1f} ± {width:.1f} %", colour))
    if chance is not None:
        axes.axhline(100 * chance, color=QUIET, ls=":")
        labels.append((100 * chance, f"guessing  {100 * chance:.0f} %", QUIET))
    axes.set_xlim(-0.1, last + 0.1)
    axes.set_xticks(range(0, last + 1, math.ceil(last / 10) or 1))
    finish(
        axes,
        "steps on the support set (0: before adaptation; at the right: after the last)",
        "Accuracy (%), mean over tasks with 95 % interval",
    )
    label_right(axes, labels)
    save(figure, path)


def plot_episode(
    episode: Episode,
    predicted: Int[np.ndarray, " queries"],
    path: File,
    *,
    class_names: Sequence[str] | None = None,
    what: str = "classes never seen in training",
    ink: Literal["low", "high"] = "low",
    max_classes: int = 10,
    max_shots: int = 5,
) -> None:
    """A test episode: a row for each class, its support examples, then its queries.

    Queries answered right have a green frame; the others a red one and the words "predicted
    2, is 1". The title counts all queries; what is not drawn is said below.

    Args:
      episode: `((images, labels), (images, labels))`, images `(n, h, w, 1 or 3)` as bytes or as
        floats, labels 0..ways-1.
      predicted: the predicted labels of the queries.
      path: the picture to write; its suffix is the format.
      class_names: of the labels; None numbers them 1, 2, 3, ...
      what: the classes are, for the title.
      ink: whether ink is the low or the high value of one-channel images; it is drawn dark.
      max_classes: rows to draw; of more classes first those with errors.
      max_shots: support examples of a class to draw; queries take the rest of the 11 columns.

    Raises:
      UserError: if there is not one prediction for each query.
    """
    (images, labels), (queries, query_labels) = (map(np.asarray, part) for part in episode)
    predicted = np.asarray(predicted)
    if predicted.shape != query_labels.shape:
        raise UserError(
            f"predicted has shape {predicted.shape} for {len(query_labels)} queries; give the "
            f"predicted label of each, shape ({len(query_labels)},)"
        )
    rows = _choose_rows(labels, query_labels, predicted, class_names, max_classes, max_shots)
    grid = _lay_out(rows)
    note = _what_is_drawn(rows, labels, query_labels)
    right = f"{(predicted == query_labels).sum()} of {len(predicted)} right"
    title = f"{_kind(labels)} episode of {what}: {right}"
    height = grid.tops[-1] + (0.35 if note else 0.15)
    figure = new_figure(max(grid.width, 0.115 * len(title)), height)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, figure.get_figwidth()), ylim=(height, 0))
    axes.axis("off")
    axes.autoscale(False)
    write(axes, _MARGIN, 0.3, title, size=12, weight="bold")
    write(axes, grid.support_left + _GAP, 0.7, "learns from", color=QUIET)
    asked = "is then asked to name (green frame: right, red frame: wrong)"
    write(axes, grid.query_left + _GAP, 0.7, asked, color=QUIET)
    pictures = _to_pictures([images, queries], ink)
    for row, top in zip(rows, grid.tops, strict=False):
        _draw_row(axes, row, top, grid, *pictures)
    write(axes, _MARGIN, height - 0.2, note, color=QUIET)
    save(figure, path)


class _Row(NamedTuple):
    """A class, which of its examples are drawn, and what is to be said below some queries."""

    label: int
    heading: str
    support: list[int]
    queries: list[int]
    errors: dict[int, str]


class _Grid(NamedTuple):
    """Where an episode's pictures stand, in inches."""

    cell: float
    support_left: float
    query_left: float
    width: float
    tops: list[float]


def _choose_rows(
    labels: np.ndarray,
    query_labels: np.ndarray,
    predicted: np.ndarray,
    class_names: Sequence[str] | None,
    max_classes: int,
    max_shots: int,
) -> list[_Row]:
    # Numbers, as letters would be taken for the characters in the pictures.
    names = list(class_names or map(str, range(1, 2 + max(labels.max(), predicted.max()))))
    rows = []
    wrong = np.unique(query_labels[predicted != query_labels])
    # If not all can be drawn, first those with errors; always in the order of their numbers.
    first = sorted(np.unique(labels).tolist(), key=lambda label: label not in wrong)[:max_classes]
    for label in sorted(first):
        support = np.flatnonzero(labels == label)[:max_shots].tolist()
        queries = np.flatnonzero(query_labels == label)[: _NUM_COLUMNS - len(support)].tolist()
        errors = {
            i: _describe_error(names[int(predicted[i])], names[label])
            for i in queries
            if predicted[i] != label
        }
        heading = _shorten(names[label]) if class_names else f"class {names[label]}"
        rows.append(_Row(label, heading, support, queries, errors))
    return rows


def _lay_out(rows: list[_Row]) -> _Grid:
    num_support = max(len(row.support) for row in rows)
    num_queries = max(len(row.queries) for row in rows)
    support_left = _MARGIN + 0.2 + 0.095 * max(len(row.heading) for row in rows)
    free = _WIDTH - support_left - _BETWEEN - _MARGIN
    cell = min(max(free / (num_support + num_queries), 0.68), 1.0)
    query_left = support_left + num_support * cell + _BETWEEN
    heights = [cell + (0.3 if row.errors else 0.04) for row in rows]
    tops = np.cumsum([_TOP, *heights]).tolist()
    return _Grid(cell, support_left, query_left, query_left + num_queries * cell + _MARGIN, tops)


def _describe_error(predicted: str, truth: str) -> str:
    """Two lines as wide as a picture; a long truth can be read at the left of the row."""
    if max(len(predicted), len(truth)) <= 2:
        return f"predicted {predicted},\nis {truth}"
    return f"predicted\n{_shorten(predicted, 11)}"


def _what_is_drawn(rows: list[_Row], labels: np.ndarray, query_labels: np.ndarray) -> str:
    """Which part of the episode the picture shows; empty if all of it."""
    parts = []
    if len(rows) < len(np.unique(labels)):
        parts.append(f"{len(rows)} of {len(np.unique(labels))} classes, those with errors first")
    for name, of, drawn in (
        ("support examples", labels, [len(row.support) for row in rows]),
        ("queries", query_labels, [len(row.queries) for row in rows]),
    ):
        total = [int((of == row.label).sum()) for row in rows]
        if sum(drawn) < sum(total):
            parts.append(f"{max(drawn)} of {max(total)} {name} of each class")
    return f"Drawn: {', '.join(parts)}." if parts else ""


def _kind(labels: np.ndarray) -> str:
    """Such as "5-way 1-shot"."""
    counts = np.unique(labels, return_counts=True)[1]
    low, high = counts.min(), counts.max()
    return f"{len(counts)}-way {low if low == high else f'{low}-to-{high}'}-shot"


def _draw_row(axes, row: _Row, top: float, grid: _Grid, images, queries) -> None:
    write(axes, _MARGIN, top + grid.cell / 2, row.heading, size=11, weight="bold")
    for column, i in enumerate(row.support):
        _draw_picture(axes, images[i], grid.support_left + column * grid.cell, top, grid.cell)
    for column, i in enumerate(row.queries):
        left = grid.query_left + column * grid.cell
        colour, line = (_WRONG, 3.0) if i in row.errors else (_RIGHT, 1.5)
        _draw_picture(axes, queries[i], left, top, grid.cell, colour, line)
        write(
            axes, left + _GAP, top + grid.cell + 0.1, row.errors.get(i, ""), size=7.5, color=_WRONG
        )


def _draw_picture(axes, image, left: float, top: float, cell: float, colour=QUIET, line=0.8):
    low, high = _GAP, cell - _GAP
    box = (left + low, left + high, top + high, top + low)
    axes.imshow(image, extent=box, aspect="auto")
    xs, ys = [box[i] for i in (0, 1, 1, 0, 0)], [box[i] for i in (2, 2, 3, 3, 2)]
    axes.plot(xs, ys, color=colour, lw=line, solid_joinstyle="miter")


def _to_pictures(sets: list[np.ndarray], ink: str) -> list[np.ndarray]:
    """Images of any range as floats `(n, h, w, 3)` in [0, 1], with ink dark."""
    low, high = min(x.min() for x in sets), max(x.max() for x in sets)
    if sets[0].dtype == np.uint8:
        low, high = 0, 255
    elif low >= 0 and high <= 1:
        low, high = 0, 1
    pictures = [(x.astype(np.float32) - low) / max(high - low, 1e-12) for x in sets]
    if sets[0].shape[-1] == 3:
        return pictures
    return [np.repeat(1 - x if ink == "high" else x, 3, axis=-1) for x in pictures]


def _shorten(name: str, length: int = 12) -> str:
    return name if len(name) <= length else f"{name[: length - 1].rstrip()}…"


def _series(records: Iterable[Mapping[str, Any]], name: str, scale: float) -> np.ndarray:
    """The steps and values, `(2, n)`, of the records that have them."""
    pairs = [(r["step"], scale * r[name]) for r in records if r.get(name) is not None]
    return np.array(pairs, float).reshape(-1, 2).T


def _draw_learning_curve(axes, name: str, label: str, training, validation) -> None:
    labels = []
    if training.size:
        steps, values = training
        smooth = _moving_average(values, len(values) // 25)
        axes.plot(steps, values, color=COLOURS[0], alpha=0.2, lw=0.8)
        axes.plot(steps, smooth, color=COLOURS[0], lw=1.8)
        labels.append((smooth[-1], "training\n(smoothed)", COLOURS[0]))
    if validation.size:
        steps, values = validation
        axes.plot(steps, values, color=COLOURS[1], marker="o", ms=3.5, lw=1.2)
        best = values.argmax() if name == "accuracy" else values.argmin()
        axes.plot(steps[best], values[best], "o", ms=9, mfc="none", color=COLOURS[1])
        figure = f"{values[best]:.1f} %" if name == "accuracy" else f"{values[best]:.3g}"
        labels.append((values[-1], f"validation\nbest {figure}", COLOURS[1]))
    finish(axes, "training steps", label)
    label_right(axes, labels)


def _moving_average(values: Float[np.ndarray, " n"], width: int) -> Float[np.ndarray, " n"]:
    """The mean of the values within `width // 2` places, fewer at the ends."""
    window = np.ones(2 * (width // 2) + 1)

    def total(x):
        return np.convolve(x, window)[width // 2 :][: len(x)]

    return total(values) / total(np.ones(len(values)))
