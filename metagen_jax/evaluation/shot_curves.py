"""A picture of a figure against the number of examples that a model has seen."""

from collections.abc import Mapping

import numpy as np

from metagen_jax.evaluation.estimates import Estimate
from metagen_jax.evaluation.figures import (
    COLOURS,
    QUIET,
    File,
    finish,
    label_right,
    new_figure,
    save,
)


def plot_nll_by_shots(
    curves: Mapping[str, Mapping[int, Estimate]],
    path: File,
    *,
    title: str,
    unit: str = "nats",
    seen: str = "examples of the class seen",
    published: Mapping[str, Mapping[int, float]] | None = None,
) -> None:
    """The negative log-likelihood of the next example against the examples seen, with intervals.

    Args:
      curves: by name, the estimate for each number of shots.
      path: the picture to write; its suffix is the format.
      title: of the picture.
      unit: of the estimates.
      seen: what is counted from left to right.
      published: by name, figures of others without an interval, drawn dashed.
    """
    figure = new_figure(8.5, 4.2, title)
    axes = figure.subplots()
    labels = []
    for i, (name, by_shots) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        shots = sorted(by_shots)
        mean = np.array([by_shots[n].mean for n in shots])
        interval = np.array([by_shots[n].interval for n in shots])
        axes.errorbar(shots, mean, interval, color=colour, marker="o", ms=4, capsize=3)
        labels.append((float(mean[-1]), f"{name}  {mean[-1]:.4g} ± {interval[-1]:.2g}", colour))
    for name, figures in (published or {}).items():
        shots = sorted(figures)
        axes.plot(shots, [figures[n] for n in shots], color=QUIET, ls="--", marker=".")
        labels.append((figures[shots[-1]], f"{name}  {figures[shots[-1]]:.1f}", QUIET))
    axes.set_xticks(sorted({n for by_shots in curves.values() for n in by_shots}))
    finish(
        axes,
        seen,
        f"Negative log-likelihood of the next one ({unit}), mean over episodes with 95 % interval",
    )
    label_right(axes, labels)
    save(figure, path)
