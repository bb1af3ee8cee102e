"""The table and the picture of `experiments.learned_optimizer`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.table

from experiments.learned_optimizer_tasks import LEARNED, NUM_RATES, RIVALS, Comparison
from metagen_jax.evaluation import figures
from metagen_jax.evaluation.estimates import Estimate, estimate

# Losses below are not drawn.
_LOWEST = 1e-6


def margin(comparison: Comparison, rival: str, step: int) -> Estimate:
    """How much higher a rival's loss is than the learned optimiser's, task by task."""
    learned, other = (comparison.curves[name].per_task for name in (LEARNED, rival))
    return estimate(other[:, step] - learned[:, step])


def numbers(comparisons: Mapping[str, Comparison], end: int, beyond: int) -> dict[str, Any]:
    """The numbers of the table by name, and the share of tasks that the last steps made worse."""
    named: dict[str, Any] = {}
    for kind, comparison in comparisons.items():
        for name, curve in comparison.curves.items():
            for step in (end, beyond):
                named[f"{kind}: {name}, loss after {step}"] = float(curve.mean[step])
                named[f"{kind}: {name}, interval after {step}"] = float(curve.interval[step])
        for name in RIVALS:
            over = margin(comparison, name, end)
            named[f"{kind}: margin over {name}"] = float(over.mean)
            named[f"{kind}: margin over {name}, interval"] = float(over.interval)
        for name, rate in comparison.rates.items():
            named[f"{kind}: {name}, best rate"] = rate
        learned = comparison.curves[LEARNED].per_task
        worse = np.mean(learned[:, beyond] > learned[:, end])
        named[f"{kind}: learned, share worsened from {end} to {beyond}"] = float(worse)
    return named


def show_table(
    comparisons: Mapping[str, Comparison], end: int, beyond: int, *, num_tasks: int
) -> None:
    """Prints mean losses after the steps of the comparison and after many more."""
    table = rich.table.Table(
        title=f"Training loss on {num_tasks} held-out tasks of each kind\n"
        f"± 95 % interval; rivals at the best of {NUM_RATES} rates on these tasks",
        box=rich.box.SIMPLE_HEAD,
    )
    table.add_column("tasks")
    table.add_column("optimiser")
    for column in (f"after {end} steps", "learned is lower by", f"after {beyond} steps"):
        table.add_column(column, justify="right")
    for kind, comparison in comparisons.items():
        for name, curve in comparison.curves.items():
            rate = comparison.rates.get(name)
            table.add_row(
                kind if name == LEARNED else "",
                name if rate is None else f"{name}, rate {rate:.2g}",
                _cell(curve.at(end)),
                "" if name == LEARNED else _cell(margin(comparison, name, end)),
                _cell(curve.at(beyond)),
            )
    rich.console.Console(width=110).print(table)


def _cell(loss: Estimate) -> str:
    return f"{float(loss.mean):.4g} ± {float(loss.interval):.2g}"


def draw(
    comparisons: Mapping[str, Comparison], path: Path, *, horizon: int, num_tasks: int
) -> None:
    """Draws the mean curves and the middle 80 % of the tasks, a panel for each kind."""
    title = f"Training loss, mean and middle 80 % of {num_tasks} held-out tasks of each kind"
    figure = figures.new_figure(4.4 * len(comparisons), 4.2, title)
    panels = np.atleast_1d(figure.subplots(1, len(comparisons)))
    for axes, (kind, (curves, rates)) in zip(panels, comparisons.items(), strict=True):
        for (name, curve), colour in zip(curves.items(), figures.COLOURS, strict=False):
            label = f"{name}, rate {rates[name]:.2g}" if name in rates else name
            low, high = np.quantile(curve.per_task, (0.1, 0.9), axis=0)
            steps = np.arange(len(low))
            axes.plot(steps, curve.mean, color=colour, label=label)
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
        axes.axvline(horizon, color=figures.QUIET, ls=":", lw=1)
        axes.set_yscale("log")
        axes.set_ylim(bottom=_LOWEST)
        figures.finish(axes, f"steps; dotted: {horizon}, the runs of meta-training", kind)
        axes.legend(fontsize="small", frameon=False)
    figures.save(figure, path)
