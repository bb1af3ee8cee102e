"""A mean over tasks and how far it is known."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Real

from metagen_jax.errors import UserError


class Estimate(NamedTuple):
    """A mean over tasks with its 95 % interval.

    Attributes:
      mean: over tasks, of the shape that the value of one task has, such as `(steps + 1,)`.
      interval: half width of the 95 % interval of the mean, `1.96 s / sqrt(tasks)`.
      per_task: `(tasks, *mean.shape)`. Of two learners that saw the same tasks the difference of
        these has a narrower interval than the means have.
    """

    mean: np.ndarray
    interval: np.ndarray
    per_task: np.ndarray

    def at(self, index: int | tuple[int, ...]) -> "Estimate":
        """One entry, such as that after one of several steps."""
        return Estimate(self.mean[index], self.interval[index], self.per_task[:, index])


def estimate(per_task: Float[Array | np.ndarray, "tasks *shape"]) -> Estimate:
    """Mean and 95 % interval, `1.96 s / sqrt(tasks)`, s with `tasks - 1` degrees of freedom.

    Where the value of a task is not finite, such as an error that diverged, both are infinite.
    """
    per_task = np.asarray(per_task, np.float64)
    finite = np.isfinite(per_task).all(axis=0)
    shown = np.where(finite, per_task, 0)
    interval = 1.96 * shown.std(axis=0, ddof=1) / np.sqrt(len(per_task))
    return Estimate(
        mean=np.where(finite, shown.mean(axis=0), np.inf),
        interval=np.where(finite, interval, np.inf),
        per_task=per_task,
    )


def estimate_ratio(
    totals: Float[np.ndarray, " tasks"], counts: Real[np.ndarray, " tasks"]
) -> Estimate:
    """`sum_i totals_i / sum_i counts_i`, such as bits a sample over recordings of any length.

    The interval takes tasks, and not what they count, to be independent (Cochran: Sampling
    Techniques, 1977, equation 6.13): that of the mean of `per_task`, which is `R + (totals_i - R
    counts_i) / mean(counts)`. Of two models of the same tasks `estimate` of the difference of these
    tells whether one is better.

    Args:
      totals: of each task, such as bits.
      counts: of each task, how many things that is a sum over; not all 0.

    Raises:
      UserError: if nothing is counted.
    """
    totals, counts = np.asarray(totals, np.float64), np.asarray(counts, np.float64)
    if not counts.sum() > 0:
        raise UserError(f"counts sum to {counts.sum():g}; a ratio needs something counted")
    ratio = totals.sum() / counts.sum()
    return estimate(ratio + (totals - ratio * counts) / counts.mean())


def percent(accuracy: Estimate) -> str:
    """An accuracy as it stands in a table, such as "98.02 ± 0.21 %"."""
    return f"{100 * accuracy.mean:.2f} ± {100 * accuracy.interval:.2f} %"
