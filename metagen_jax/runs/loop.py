"""The loop of a run: take steps, watch them, log, validate and save."""

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from metagen_jax.errors import TrainingError, UserError, import_extra, one_line
from metagen_jax.hosts import deadline
from metagen_jax.runs.checkpoints import (
    LATEST,
    RunState,
    State,
    restore_run,
    save_run,
    saved_steps,
    to_host,
)
from metagen_jax.runs.history import BestMetric, History
from metagen_jax.runs.log import RunLog, has_log
from metagen_jax.runs.progress import ProgressBar, describe_metrics
from metagen_jax.types import Metrics, Params

# Unless told otherwise a checkpoint is written once a minute, or less often where writing one takes
# so long that it would cost more than 2 % of the time.
_SAVE_SECONDS = 60.0
_SAVE_SHARE = 0.02


@dataclasses.dataclass(kw_only=True)
class Loop:
    """One call of `metagen_jax.training.fit`: its options, then what changes as it goes."""

    num_steps: int
    run_dir: Path | None
    validate: Callable[[Params], dict[str, float]] | None
    validate_every: int
    best_metric: BestMetric
    log_every: int
    save_every: int | None
    step_deadline: float | None
    bar: ProgressBar
    log: RunLog | None = None
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    history: History = dataclasses.field(default_factory=History)
    best_params: Params | None = None
    compiled: bool = False
    saved_step: int | None = None
    last_lap: float = 0.0
    last_save: float = 0.0
    seconds_to_save: float = 0.0
    seconds_to_validate: float = 0.0

    def begin(self, state: State, resume: bool) -> State:
        """The state to begin with: the one given, or that of the latest checkpoint."""
        if self.run_dir is None:
            if resume:
                raise UserError("resume is True without a run_dir; give that of the run to resume")
            return state
        import_extra("orbax.checkpoint")
        if not resume:
            if saved_steps(self.run_dir / LATEST) or has_log(self.run_dir):
                raise TrainingError(
                    f"{self.run_dir} already holds a run; continue it (--resume) or give another "
                    "folder (--run-dir)"
                )
            return state
        restored = restore_run(self.run_dir, state)
        if restored is None:
            self.bar.say(f"{self.run_dir} holds no checkpoint: starting from the beginning")
            return state
        state, self.best_params, record = restored
        self.history = History(**record)
        step = self.saved_step = int(state.step)
        done = ": nothing is left to do" if step >= self.num_steps else ""
        self.bar.say(f"resuming {self.run_dir} at step {step} of {self.num_steps}{done}")
        return state

    def take_steps(
        self, step_fn: Callable[[State, PyTree], tuple[State, Metrics]], state: State, data: PyTree
    ) -> State:
        """The loop, in which the host is one step behind the device."""
        start, unread = int(state.step), None
        self.bar.wait(start, "compiling the first step ...")
        self.last_lap = self.last_save = time.perf_counter()
        for step in range(start + 1, self.num_steps + 1):
            with self.watch(step):
                state, metrics = step_fn(state, data)
            if unread is not None:
                self.observe(*unread)
            unread = step, metrics
            last, stopping = step == self.num_steps, self.stop.is_set()
            validating = self.validate and (last or step % self.validate_every == 0)
            saving = last or stopping or self.save_is_due(step)
            if validating or saving or not self.compiled:
                self.observe(*unread)
                unread = None
            if validating:
                saving |= self.validate_params(step, state.params)
            if saving:
                self.save(step, state)
            if stopping:
                break
        self.history.train_seconds += self.lap()
        return state

    def observe(self, step: int, metrics: Metrics) -> None:
        """Reads the metrics of a step once it is done; stops the run if it went wrong."""
        if not self.compiled:
            _check_scalars(metrics)
        with self.watch(step):
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(values.get(name, 0.0)):
                raise TrainingError(f"{name} is {values[name]} at step {step}; {self.advice()}")
        self.history.add_step(values, self.lap(), compiled=not self.compiled)
        self.compiled = True
        seconds = self.history.train_seconds
        if step % self.log_every == 0 or step == self.num_steps:
            means = self.history.end_interval()
            if self.log:
                self.log.write(step, means, train_seconds=seconds, kind="train")
        validations = -(-self.num_steps // self.validate_every) - step // self.validate_every
        self.bar.update(step, values, seconds, validations * self.seconds_to_validate)

    @contextlib.contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Ends the run with an error where a step fails or hangs because another process does."""
        # The first step is compiled, which takes as long as it takes.
        seconds = self.step_deadline if self.compiled else None

        def describe(what: str) -> str:
            kept = self.last_checkpoint()
            return f"step {step} {what}; {kept}; start all processes again, to resume (--resume)"

        with deadline(seconds, lambda: describe(f"takes more than {seconds} s")):
            try:
                yield
            except jax.errors.JaxRuntimeError as error:
                if jax.process_count() == 1:
                    raise
                others = f"another of the {jax.process_count()} processes has gone"
                what = f"failed, as when {others} ({one_line(error)})"
                raise TrainingError(describe(what)) from error

    def validate_params(self, step: int, params: Params) -> bool:
        """Validates, and keeps the parameters if they are the best so far; says whether."""
        assert self.validate is not None
        history = self.history
        history.train_seconds += self.lap()
        self.bar.wait(step, "validating ...")
        numbers = {name: float(value) for name, value in self.validate(params).items()}
        self.seconds_to_validate = self.lap()
        history.validation_seconds += self.seconds_to_validate
        if self.best_metric[0] not in numbers:
            raise UserError(
                f"best_metric is {self.best_metric[0]!r} and validate gives {sorted(numbers)}; "
                "name one of them"
            )
        if self.log:
            self.log.write(step, numbers, train_seconds=history.train_seconds, kind="validation")
        better = history.add_validation(step, numbers, self.best_metric)
        if better:
            self.best_params = to_host(params)
        verdict = "best so far" if better else f"best: step {history.best_step}"
        self.bar.say(
            f"step {step}/{self.num_steps}  validation: {describe_metrics(numbers)}  ({verdict})"
        )
        return better

    def save_is_due(self, step: int) -> bool:
        """Whether it is time for a checkpoint that nothing else calls for."""
        if self.save_every is not None:
            return step % self.save_every == 0
        pause = max(_SAVE_SECONDS, self.seconds_to_save / _SAVE_SHARE)
        return time.perf_counter() - self.last_save > pause

    def save(self, step: int, state: RunState) -> None:
        """Writes a checkpoint, unless the parameters are not worth it."""
        begin = time.perf_counter()
        host = to_host(state)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(host.params)):
            raise TrainingError(f"the parameters are not finite at step {step}; {self.advice()}")
        if self.validate is None and step == self.num_steps:
            self.history.best_step, self.best_params = step, host.params
        if self.run_dir is None:
            return
        if self.log:
            self.log.sync()
        self.history.train_seconds += self.lap()
        record = dataclasses.asdict(self.history)
        save_run(self.run_dir, step, host, record, self.best_params)
        self.saved_step = step
        self.last_save = time.perf_counter()
        self.seconds_to_save = self.last_save - begin

    def lap(self) -> float:
        """The seconds since the last lap."""
        now = time.perf_counter()
        elapsed, self.last_lap = now - self.last_lap, now
        return elapsed

    def advice(self) -> str:
        """What to do about a run that has gone wrong."""
        return f"{self.last_checkpoint()}; lower the learning rate or clip the gradient"

    def last_checkpoint(self) -> str:
        """What there is to resume from, in words; without a look at the disk, which may hang."""
        if self.saved_step is None:
            return "no checkpoint was saved"
        return f"the checkpoint of step {self.saved_step} is kept"

    def farewell(self, step: int) -> str:
        """What to tell whoever has stopped the run."""
        where = f"stopped at step {step} of {self.num_steps}"
        if self.run_dir is None:
            return f"{where}; without a run_dir nothing is kept"
        return f"{where}, which is saved in {self.run_dir}; continue with --resume"


def _check_scalars(metrics: Metrics) -> None:
    for name, value in metrics.items():
        if value.shape != ():
            raise UserError(
                f"metric {name!r} has shape {value.shape}; give scalars, such as its mean"
            )
