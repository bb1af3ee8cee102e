"""The look of all pictures: colours, figures, axes, words.

Matplotlib is imported when a picture is drawn, and used without pyplot: no window, no global state.
"""

import os
from pathlib import Path

from metagen_jax.errors import writing

# Okabe and Ito's palette, which the colour-blind tell apart; the greys are for what stands aside.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
TEXT, QUIET, RULE = "#222222", "#666666", "#DDDDDD"
_DOTS_PER_INCH = 150

File = str | os.PathLike[str]


def new_figure(width: float, height: float, title: str | None = None):
    """A figure without pyplot, its title at the left in bold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    if title:
        figure.set_layout_engine("constrained", h_pad=0.1)
        figure.suptitle(title, x=0.01, ha="left", size=12, weight="bold", color=TEXT)
    return figure


def save(figure, path: File) -> None:
    """Writes a figure; a full disk or a missing folder is a UserError."""
    with writing(Path(path)):
        figure.savefig(path, dpi=_DOTS_PER_INCH)


def finish(axes, x_label: str, y_label: str) -> None:
    """Labels a panel, the y axis above it, and leaves only the lines that help to read."""
    axes.set_xlabel(x_label, color=TEXT)
    axes.set_title(y_label, loc="left", size=10, color=TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=QUIET)
    axes.grid(axis="y", color=RULE, lw=0.7)
    axes.set_axisbelow(True)


def label_right(axes, labels: list[tuple[float, str, str]]) -> None:
    """Names lines at the right of the panel, at the height of their ends, not over one another."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    labels = sorted(labels)
    line = 0.065 * (high - low)
    halves = [line * (1 + text.count("\n")) / 2 for _, text, _ in labels]
    centres = [y for y, _, _ in labels]
    for i in range(1, len(labels)):  # Upwards, until none overlaps the one below ...
        centres[i] = max(centres[i], centres[i - 1] + halves[i - 1] + halves[i])
    ceiling = high + line
    for i in reversed(range(len(labels))):  # ... and down again from the panel's top.
        centres[i] = min(centres[i], ceiling - halves[i])
        ceiling = centres[i] - halves[i]
    for centre, (_, text, colour) in zip(centres, labels, strict=True):
        axes.annotate(
            text,
            xy=(1, centre),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            size=9,
            color=colour,
            annotation_clip=False,
        )


def write(axes, x: float, y: float, text: str, *, size: float = 9.5, color=TEXT, **style) -> None:
    """Text at a place, centred on its line."""
    axes.text(x, y, text, size=size, color=color, va="center_baseline", linespacing=1.1, **style)
