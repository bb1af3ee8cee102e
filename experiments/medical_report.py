"""The tables and the figure of `experiments.medical`."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import rich.box
import rich.console
import rich.table

from metagen_jax.errors import writing
from metagen_jax.evaluation.baselines import FineTuning
from metagen_jax.evaluation.estimates import Estimate

METRICS = {"balanced_accuracy": "balanced accuracy", "auc": "area under the ROC"}


class Row(NamedTuple):
    """A method in one mode at one number of shots: its metrics, and what was chosen for it."""

    metrics: dict[str, Estimate]
    choice: FineTuning | None = None


Columns = Mapping[int, Mapping[str, Row]]
"""By number of shots, and by name of the method and mode."""


def show_tables(columns: Columns, about: str) -> None:
    """Prints each metric in percent, with its 95 % interval, by method and number of shots."""
    first = next(iter(columns.values()))
    for metric, title in METRICS.items():
        table = rich.table.Table(
            title=f"{title}, %\n{about}, ± 95 % interval", box=rich.box.SIMPLE_HEAD
        )
        table.add_column("method")
        for num_shots in columns:
            table.add_column(f"{num_shots}-shot", justify="right")
        for name in first:
            values = [rows[name].metrics[metric] for rows in columns.values()]
            cells = [f"{100 * value.mean:.1f} ± {100 * value.interval:.1f}" for value in values]
            table.add_row(name.replace("_", " "), *cells)
        rich.console.Console().print(table)


def draw(columns: Columns, about: str, path: Path) -> None:
    """Draws each metric against the number of shots; dashed: transductive."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(METRICS), figsize=(11, 4.4), layout="constrained")
    shots, names = list(columns), list(next(iter(columns.values())))
    methods = list(dict.fromkeys(_without_mode(name) for name in names))
    for panel, (metric, title) in zip(panels, METRICS.items(), strict=True):
        for name in names:
            values = [rows[name].metrics[metric] for rows in columns.values()]
            panel.errorbar(
                shots,
                [value.mean for value in values],
                [value.interval for value in values],
                color=f"C{methods.index(_without_mode(name))}",
                linestyle="--" if name.endswith("_transductive") else "-",
                marker="o",
                markersize=4,
                capsize=2,
                label=name.replace("_", " "),
            )
        panel.axhline(0.5, color="0.6", linestyle=":", label="chance")
        panel.set(xscale="log", xlabel="examples of each class", ylabel=title)
        panel.set_xticks(shots, [str(num_shots) for num_shots in shots])
        panel.minorticks_off()
    panels[0].legend(fontsize="small")
    figure.suptitle(f"{about}, bars: 95 % interval")
    with writing(path):
        figure.savefig(path, dpi=120)
    plt.close(figure)


def _without_mode(name: str) -> str:
    return name.removesuffix("_transductive").removesuffix("_inductive")
