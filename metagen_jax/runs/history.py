"""What a run remembers beside its state: its times, its best validation, its running means."""

import dataclasses
import math
from typing import Literal

BestMetric = tuple[str, Literal["max", "min"]]
"""The number of a validation to go by, and whether high or low is good."""


@dataclasses.dataclass
class History:
    """Kept as JSON in every checkpoint, so that a resumed run goes on as if it had not stopped."""

    train_seconds: float = 0.0
    compile_seconds: float = 0.0
    validation_seconds: float = 0.0
    timed_steps: int = 0
    best_step: int | None = None
    best_validation: dict[str, float] = dataclasses.field(default_factory=dict)
    interval_steps: int = 0
    interval_sums: dict[str, float] = dataclasses.field(default_factory=dict)

    def add_step(self, metrics: dict[str, float], seconds: float, *, compiled: bool) -> None:
        """Counts a step; the one that `compiled` is left out of the speed."""
        self.train_seconds += seconds
        self.compile_seconds += seconds if compiled else 0.0
        self.timed_steps += not compiled
        self.interval_steps += 1
        for name, value in metrics.items():
            self.interval_sums[name] = self.interval_sums.get(name, 0.0) + value

    def end_interval(self) -> dict[str, float]:
        """The means of the metrics over the steps since the last interval ended."""
        means = {name: x / self.interval_steps for name, x in self.interval_sums.items()}
        self.interval_sums, self.interval_steps = {}, 0
        return means

    def add_validation(self, step: int, numbers: dict[str, float], best_metric: BestMetric) -> bool:
        """Remembers a validation if it is the best so far, and says whether it is."""
        name, direction = best_metric
        value = numbers[name]
        best = self.best_validation.get(name)
        better = math.isfinite(value) and (
            best is None or (value > best if direction == "max" else value < best)
        )
        if better:
            self.best_step, self.best_validation = step, numbers
        return better

    @property
    def steps_per_second(self) -> float:
        """Of all steps but those that compiled."""
        seconds = self.train_seconds - self.compile_seconds
        return self.timed_steps / seconds if self.timed_steps else math.nan
