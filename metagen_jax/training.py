"""Training: one compiled step, and the loop around it that shows, logs, validates and keeps.

Step `i` takes all its randomness from `fold_in(key, i)`, so that a run that was killed and resumed
passes through the same parameters, bit for bit, as one that was not.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32, PyTree

from metagen_jax.errors import TrainingInterrupted, UserError
from metagen_jax.gradients import count_tasks
from metagen_jax.runs.checkpoints import load_params as load_params
from metagen_jax.runs.checkpoints import place_like, to_host
from metagen_jax.runs.history import BestMetric
from metagen_jax.runs.interrupts import stop_requests
from metagen_jax.runs.log import RunLog
from metagen_jax.runs.loop import Loop
from metagen_jax.runs.progress import ProgressBar
from metagen_jax.types import Batch, GradFn, Metrics, Params, PRNGKey


class TrainState(NamedTuple):
    """All that a run needs to go on.

    Attributes:
      step: steps taken.
      params: what is trained.
      opt_state: of the optimiser.
      key: the seed of the run; it never changes.
    """

    step: Int32[Array, ""]
    params: Params
    opt_state: optax.OptState
    key: PRNGKey


StepFn = Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]
"""`step_fn(state, data) -> (next state, metrics)`; it may consume the state it is given."""


class FitResult(NamedTuple):
    """What a run has come to.

    Attributes:
      state: after the last step.
      best_params: those that validated best; without validation the last.
      best_step: the step after which they were.
      best_validation: what `validate` said of them; empty without validation.
      train_seconds: wall-clock time of the loop since the run began, over all its resumptions: with
        compilation, logs and checkpoints, without validation and without steps lost to a kill.
      compile_seconds: the part of `train_seconds` that the first step of each resumption took.
      validation_seconds: wall-clock time of validation.
      steps_per_second: of all steps but those first ones; not a number if there were no others.
    """

    state: TrainState
    best_params: Params
    best_step: int
    best_validation: dict[str, float]
    train_seconds: float
    compile_seconds: float
    validation_seconds: float
    steps_per_second: float


def init_state(params: Params, optimizer: optax.GradientTransformation, key: PRNGKey) -> TrainState:
    """The state before the first step. Everything is copied: a step may donate it.

    For a step over several devices place it with `metagen_jax.parallel.replicate`, or the second
    step is compiled anew.
    """
    params = jax.tree.map(lambda x: jnp.array(x, jnp.result_type(x)), params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # Optimisers may put the parameters themselves into their state.
        opt_state=jax.tree.map(jnp.copy, optimizer.init(params)),
        key=jnp.copy(key),
    )


def train_step(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    sample: Callable[[PRNGKey, PyTree], Batch],
    *,
    schedule: Callable[[Int32[Array, ""]], PyTree] | None = None,
    update_slow: Callable[[Params, Batch, PRNGKey], Params] | None = None,
) -> StepFn:
    """The compiled step: draw a batch, take its direction, update.

    `theta_{i+1} = theta_i + U(grad_fn(theta_i, sample(k, data), k'))` with k, k' = the halves of
    `fold_in(key, i)` and U the optimiser's update.

    Args:
      grad_fn: over a whole batch, already lifted over tasks and devices.
      optimizer: any optax transformation.
      sample: `(key, data) -> batch`, compiled into the step. `data` are arrays on the device, an
        argument of the step: closed over they would be constants of the program.
      schedule: `step -> values` that change in the course of training, such as the annealed weights
        of a loss. Every task then comes with them, as `(task, values)`.
      update_slow: `(params, batch, k'') -> params`, after the optimiser's update, for leaves that
        follow others, such as moving averages; k'' is `fold_in(fold_in(key, i), 2)`. See that
        neither a gradient nor the optimiser (weight decay!) moves them.

    Returns:
      `step(state, data) -> (state, metrics)`, which donates its `state`; the metrics are those of
      `grad_fn` and `gradient_norm`, the global norm of the direction.
    """

    def step(state: TrainState, data: PyTree) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(state.key, state.step)
        sample_key, grad_key = jax.random.split(step_key)
        batch = sample(sample_key, data)
        if schedule is not None:
            values = jax.tree.map(jnp.asarray, schedule(state.step))
            num_tasks = count_tasks(batch)
            batch = (
                batch,
                jax.tree.map(lambda x: jnp.broadcast_to(x, (num_tasks, *x.shape)), values),
            )
        direction, metrics = grad_fn(state.params, batch, grad_key)
        updates, opt_state = optimizer.update(direction, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if update_slow is not None:
            params = update_slow(params, batch, jax.random.fold_in(step_key, 2))
        metrics = {**metrics, "gradient_norm": optax.tree.norm(direction)}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return jax.jit(step, donate_argnums=0)


def fit(
    step_fn: StepFn,
    state: TrainState,
    data: PyTree,
    *,
    num_steps: int,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    validate: Callable[[Params], dict[str, float]] | None = None,
    validate_every: int | None = None,
    best_metric: BestMetric = ("accuracy", "max"),
    log_every: int | None = None,
    save_every: int | None = None,
    step_deadline: float | None = None,
    tasks_per_step: int | None = None,
    progress: bool = True,
) -> FitResult:
    """Takes steps until `num_steps`, and shows, logs, validates and saves as it goes.

    In `run_dir` it keeps `metrics.jsonl` (each line the means of the steps since the last, or one
    validation), TensorBoard events, and under `checkpoints/` the two latest states and the best
    parameters. The host reads the metrics of a step while the device takes the next.

    Args:
      step_fn: from `train_step`, or any other. Its metrics are scalars.
      state: from `init_state`. It is consumed.
      data: what `step_fn` takes.
      num_steps: the step at which to stop, counted from the very first.
      run_dir: a folder without a run, or with the run to resume; None keeps nothing.
      resume: continue from the latest checkpoint in `run_dir`, from the beginning if it has none.
      validate: `params -> named numbers`, called every `validate_every` steps and at the end.
      validate_every: in steps; by default a tenth of the run.
      best_metric: the validation number by which the best parameters are chosen, and which way.
      log_every: in steps; by default a two-hundredth of the run.
      save_every: in steps; by default once a minute. New best parameters, Ctrl-C, SIGTERM and the
        last step save as well.
      step_deadline: in seconds. If a step but the first takes longer, the process ends with status
        75 and a line that says so: of several processes one that hangs leaves the others waiting
        for ever. Longer than a validation and a checkpoint, for which the others wait.
      tasks_per_step: to show tasks instead of steps per second.
      progress: whether to show progress, on the standard error stream.

    Raises:
      TrainingError: the loss or the gradient is no longer finite; `run_dir` holds a run and
        `resume` is False; a checkpoint can't be read or is of another model; or another process of
        the run has gone.
      TrainingInterrupted: Ctrl-C or SIGTERM; a checkpoint has been saved.
      UserError: an argument is out of range; the disk is full or can't be written; or, at the first
        validation, `validate` gives no number by the name of `best_metric`.
    """
    _check_positive(
        num_steps=num_steps,
        validate_every=validate_every,
        log_every=log_every,
        save_every=save_every,
        step_deadline=step_deadline,
        tasks_per_step=tasks_per_step,
    )
    if best_metric[1] not in ("max", "min"):
        raise UserError(f'best_metric is {best_metric}; give (name, "max") or (name, "min")')
    primary = jax.process_index() == 0
    loop = Loop(
        num_steps=num_steps,
        run_dir=None if run_dir is None else Path(run_dir),
        validate=validate,
        validate_every=validate_every or max(1, num_steps // 10),
        best_metric=best_metric,
        log_every=log_every or max(1, num_steps // 200),
        save_every=save_every,
        step_deadline=step_deadline,
        bar=ProgressBar(num_steps, tasks_per_step=tasks_per_step, enabled=progress and primary),
    )
    with contextlib.ExitStack() as stack:
        loop.stop = stack.enter_context(stop_requests())
        state = loop.begin(state, resume)
        if int(state.step) < num_steps:
            if loop.run_dir is not None and primary:
                log = RunLog(loop.run_dir, start_step=int(state.step))
                loop.log = stack.enter_context(log)
            stack.enter_context(loop.bar)
            state = loop.take_steps(step_fn, state, data)
        if loop.stop.is_set():
            raise TrainingInterrupted(loop.farewell(int(state.step)))
    history, best = loop.history, loop.best_params
    return FitResult(
        state=state,
        best_params=place_like(to_host(state.params) if best is None else best, state.params),
        best_step=int(state.step) if history.best_step is None else history.best_step,
        best_validation=history.best_validation,
        train_seconds=history.train_seconds,
        compile_seconds=history.compile_seconds,
        validation_seconds=history.validation_seconds,
        steps_per_second=history.steps_per_second,
    )


def _check_positive(**options: float | None) -> None:
    for name, value in options.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; give 1 or more")
