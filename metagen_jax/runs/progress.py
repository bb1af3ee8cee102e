"""How far a run is: a live bar in a terminal, elsewhere a plain line now and then."""

import math
import time
from collections import deque
from typing import NamedTuple

from metagen_jax.errors import import_extra

# The bar shows means over its last refreshes, some five seconds; a plain line since the last line.
_BAR_SECONDS, _BAR_WINDOW = 0.2, 25
_LINE_SECONDS, _LINE_WINDOW = 10.0, 1


class _Refresh(NamedTuple):
    step: int
    seconds: float
    sums: dict[str, float]


class ProgressBar:
    """`step 1200/2000 ━━━━━  loss 0.4213  accuracy 86.1 %  251 tasks/s  1:23 left` on stderr."""

    def __init__(self, num_steps: int, *, tasks_per_step: int | None, enabled: bool):
        self._num_steps = num_steps
        self._tasks, self._unit = (
            (1, "steps") if tasks_per_step is None else (tasks_per_step, "tasks")
        )
        self._console = self._bar = None
        if enabled:
            self._console = import_extra("rich.console").Console(stderr=True, highlight=False)
            if self._console.is_terminal and not self._console.is_dumb_terminal:
                self._bar = self._make_bar()
        self._pause, window = (
            (_BAR_SECONDS, _BAR_WINDOW) if self._bar else (_LINE_SECONDS, _LINE_WINDOW)
        )
        self._window: deque[_Refresh] = deque(maxlen=window + 1)
        self._sums: dict[str, float] = {}
        self._last_refresh = -math.inf
        self._metrics = self._pace = ""

    def __enter__(self):
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_):
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line, above the bar."""
        if self._console:
            self._console.print(text, markup=False, soft_wrap=True)
        if self._bar:
            self._bar.update(0, text=f"{self._metrics}  {self._pace}", refresh=True)

    def wait(self, step: int, what: str) -> None:
        """Shows in the bar what is going on until the next line or step."""
        if self._bar:
            text = f"{self._metrics}  {what}".strip()
            self._bar.update(0, completed=step, text=text, refresh=True)
        elif not self._window:
            self.say(what)

    def update(
        self, step: int, metrics: dict[str, float], seconds: float, pause_seconds: float
    ) -> None:
        """Counts a step and now and then shows it.

        Args:
          step: of the run.
          metrics: of this step.
          seconds: of training so far.
          pause_seconds: what is still to come beside training.
        """
        if not self._console:
            return
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        now = time.perf_counter()
        if now - self._last_refresh < self._pause and step < self._num_steps:
            return
        self._last_refresh = now
        self._window.append(_Refresh(step, seconds, self._sums))
        self._sums = {}
        self._describe(metrics, pause_seconds)
        text = f"{self._metrics}  {self._pace}"
        if self._bar:
            self._bar.update(0, completed=step, text=text, refresh=True)
        else:
            self.say(f"step {step}/{self._num_steps}  {text}".rstrip())

    def _describe(self, metrics: dict[str, float], pause_seconds: float) -> None:
        """Puts the window into words."""
        first, *others = self._window
        if not others:
            self._metrics = describe_metrics(metrics)
            return
        last = others[-1]
        steps, seconds = last.step - first.step, last.seconds - first.seconds
        self._metrics = describe_metrics(
            {name: sum(refresh.sums[name] for refresh in others) / steps for name in metrics}
        )
        left = seconds / steps * (self._num_steps - last.step) + pause_seconds
        done = last.step == self._num_steps
        self._pace = f"{_three_digits(steps * self._tasks / seconds)} {self._unit}/s  " + (
            f"{_clock(last.seconds)} in all" if done else f"{_clock(left)} left"
        )

    def _make_bar(self):
        rich = import_extra("rich.progress")
        # In a narrow terminal the text is cut and not the step.
        digits = len(str(self._num_steps))
        step = import_extra("rich.table").Column(min_width=len("step /") + 2 * digits)
        bar = rich.Progress(
            rich.TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=step),
            rich.BarColumn(bar_width=None),
            rich.TextColumn("{task.fields[text]}", markup=False),
            console=self._console,
            auto_refresh=False,
            expand=True,
        )
        bar.add_task("", total=self._num_steps, text="")
        return bar


def describe_metrics(metrics: dict[str, float]) -> str:
    """Loss first, accuracies in per cent, four at most: `loss 0.4213  accuracy 86.1 %`."""
    names = sorted((n for n in metrics if n != "gradient_norm"), key=lambda n: (n != "loss", n))
    return "  ".join(
        f"{name} {100 * metrics[name]:.1f} %"
        if "accuracy" in name
        else f"{name} {metrics[name]:.4g}"
        for name in names[:4]
    )


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
