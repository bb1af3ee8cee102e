"""A learned optimiser against Adam and SGD with momentum, on tasks unlike those of its training.

    python -m experiments.learned_optimizer

Meta-trains a coordinate-wise network (`metagen_jax.meta.learned_optimizer`) to bring down the
training loss of small classifiers: of 10 letters of the embedded glyphs at 7x7 pixels, and of 10
classes of Gaussian points under a random teacher. Tests it on letters of the test classes at 14x14
pixels and on new teachers, with classifiers several times as wide, beside rivals that see the same
mini-batches at the best of 20 rates *on the test's own tasks*, which favours them; then goes on to
five times the steps of meta-training. Losses are means over the whole training set of a task.
Writes `result.json`, `learned_optimizer.png`, metrics and checkpoints.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from experiments import program
from experiments.learned_optimizer_report import draw, numbers, show_table
from experiments.learned_optimizer_tasks import (
    LEARNED,
    NUM_EXAMPLES,
    RIVALS,
    Comparison,
    Family,
    compare,
    draw_batch,
    loss_curves,
    sample_task,
    task_data,
)
from metagen_jax.chunks import Chunk, check_chunk
from metagen_jax.data.classes import ClassSplit
from metagen_jax.data.episodes import ClassData
from metagen_jax.data.sources import load_images
from metagen_jax.evaluation.estimates import estimate
from metagen_jax.gradients import task_keys
from metagen_jax.meta.learned_optimizer import init_learned_optimizer, learned_optimizer
from metagen_jax.meta.unrolls import (
    CarriedGradFn,
    InnerState,
    PESState,
    pes_gradients,
    restart,
    start_inner,
    start_pes,
    truncated_gradients,
    truncated_unroll,
)
from metagen_jax.parallel import map_over_tasks, replicate
from metagen_jax.training import FitResult, StepFn, TrainState, fit, init_state
from metagen_jax.types import Metrics, Params, PRNGKey

TRAINING = (Family("train", (16,)), Family("train", (32, 32)), Family("teacher", (32,)))
VALIDATION = Family("val", (48,), side=14)
TEST = (
    Family("test", (64,), side=14),
    Family("test", (64, 64), side=14),
    Family("teacher", (96,)),
)
# The test goes on to so many times the steps of an inner run in meta-training.
BEYOND = 5
# Of the tasks of validation and test, the same for every --seed and unlike any likely one.
VALIDATION_SEED, TEST_SEED = 1_000_000_001, 1_000_000_002


@dataclass(frozen=True)
class Config:
    horizon: int = 100
    """Steps of an inner run in meta-training."""
    unroll_steps: int = 20
    """Inner steps of an unroll, between two steps of meta-training."""
    batch_size: int = 40
    """Examples of an inner step, of the 200 of a task."""
    estimator: Literal["truncated", "pes"] = "truncated"
    """Backpropagation through the unroll, or persistent evolution strategies."""
    second_order: bool = False
    """Backpropagate through the inner gradients too."""
    log_loss: bool = True
    """Meta-train on the logarithm of the loss."""
    std: float = 0.01
    """Of the perturbations of persistent evolution strategies."""
    hidden_sizes: tuple[int, ...] = (32, 32)
    """Units of each hidden layer of the optimiser's network."""

    steps: int = 2000
    """Steps of meta-training."""
    num_tasks: int = 4
    """Inner runs of each kind that a step of meta-training takes forward."""
    outer_rate: float = 1e-3
    """Learning rate of the outer Adam, which decays to zero along a cosine."""
    test_steps: int = 50
    """Steps after which optimisers are compared, and rivals at their best rate."""
    num_validation_tasks: int = 24
    """Tasks that choose the best checkpoint."""
    num_test_tasks: int = 40
    """Tasks of each kind in the test."""

    seed: int = 0
    """Fixes initialisation and training tasks; test tasks are the same for every seed."""
    num_devices: int | None = None
    """Devices to use; by default as many of all as divide the tasks of a kind."""
    chunk: Chunk = "auto"
    """Inner runs that a device takes forward at once, or "auto"."""
    run_dir: Path = Path("runs/learned_optimizer")
    """Where everything of the run is written."""
    resume: bool = False
    """Go on from the last checkpoint of the run's folder."""


PRESETS = {
    "default": Config(),
    "smoke": Config(
        horizon=6,
        test_steps=6,
        unroll_steps=3,
        hidden_sizes=(8,),
        steps=6,
        num_tasks=2,
        num_validation_tasks=4,
        num_test_tasks=20,
    ),
}


class MetaState(NamedTuple):
    """What meta-training remembers: its optimiser, and the inner runs under way of each kind."""

    optimizer: optax.OptState
    runs: tuple[InnerState | PESState, ...]


def devices_of(config: Config) -> list[jax.Device]:
    return program.devices_for(config.num_devices, config.num_tasks)


def make_grad_fn(config: Config, family: Family) -> CarriedGradFn:
    """The direction of meta-training that one inner run gives."""
    unroll = truncated_unroll(
        family.loss_fn,
        rule=learned_optimizer,
        num_steps=config.unroll_steps,
        gradient="reverse" if config.second_order else "first_order",
        log_loss=config.log_loss,
        batch_at=lambda examples, step, key: draw_batch(examples, key, config.batch_size),
    )
    if config.estimator == "pes":
        return pes_gradients(unroll, std=config.std)
    return truncated_gradients(unroll)


def start_runs(
    config: Config,
    family: Family,
    data: ClassData | None,
    rule_params: Params,
    key: PRNGKey,
    *,
    out_of_step: bool = False,
) -> Any:
    """`num_tasks` inner runs before their first step, of random phases if out of step."""
    num_unrolls = config.horizon // config.unroll_steps

    def start(shared: PyTree, key: PRNGKey) -> InnerState | PESState:
        rule_params, data = shared
        task_key, phase_key = jax.random.split(key)
        params, task = sample_task(family, data, task_key)
        phase = config.unroll_steps * jax.random.randint(phase_key, (), 0, num_unrolls)
        phase = phase if out_of_step else 0
        run = start_inner(learned_optimizer, rule_params, params, task, step=phase)
        return start_pes(run, rule_params) if config.estimator == "pes" else run

    over_tasks = map_over_tasks(start, devices=devices_of(config), chunk=config.chunk)
    return over_tasks((rule_params, data), task_keys(key, config.num_tasks))


def clip(direction: Params) -> Params:
    """The direction, with a norm of 1 at most."""
    return optax.clip_by_global_norm(1.0).update(direction, optax.EmptyState())[0]


def meta_step(config: Config, optimizer: optax.GradientTransformation) -> StepFn:
    """The compiled step: each inner run one unroll on, then the rule along the mean direction."""

    def go_on(family: Family, data, runs, rule_params: Params, key: PRNGKey):
        run_key, start_key = jax.random.split(key)
        grad_fn = make_grad_fn(config, family)
        over_tasks = map_over_tasks(
            lambda rule_params, task: grad_fn(rule_params, *task),
            devices=devices_of(config),
            chunk=config.chunk,
        )
        tasks = (runs, task_keys(run_key, config.num_tasks))
        directions, runs, metrics = over_tasks(rule_params, tasks)
        if config.estimator == "truncated":
            # One run that explodes must not drown the others.
            directions = jax.vmap(clip)(directions)
        direction, metrics = jax.tree.map(lambda x: x.mean(0), (directions, metrics))
        fresh = start_runs(config, family, data, rule_params, start_key)
        runs = jax.vmap(functools.partial(restart, horizon=config.horizon))(runs, fresh)
        # The estimates of evolution strategies are long and noisy: cut one by one, even their mean
        # would point elsewhere.
        return (clip(direction), metrics), runs

    def step(state: TrainState, data: PyTree) -> tuple[TrainState, Metrics]:
        keys = task_keys(jax.random.fold_in(state.key, state.step), len(TRAINING))
        meta: Any = state.opt_state
        means, runs = [], []
        for family, of_family, under_way, key in zip(TRAINING, data, meta.runs, keys, strict=True):
            mean, gone_on = go_on(family, of_family, under_way, state.params, key)
            means.append(mean)
            runs.append(gone_on)
        direction, metrics = jax.tree.map(lambda *x: sum(x) / len(x), *means)
        updates, opt_state = optimizer.update(direction, meta.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {**metrics, "gradient_norm": optax.tree.norm(direction)}
        meta = MetaState(opt_state, tuple(runs))
        return TrainState(state.step + 1, params, meta, state.key), metrics

    return jax.jit(step, donate_argnums=0)


def train(
    config: Config, glyphs: ClassSplit, validate: Callable[[Params], dict[str, float]]
) -> FitResult:
    """Meta-trains the learned optimiser."""
    init_key, start_key, train_key = jax.random.split(jax.random.key(config.seed), 3)
    optimizer = optax.adam(optax.cosine_decay_schedule(config.outer_rate, config.steps))
    params = init_learned_optimizer(init_key, hidden=config.hidden_sizes)
    data = tuple(task_data(glyphs, family) for family in TRAINING)
    state = init_state(params, optimizer, train_key)
    state, data = replicate((state, data), devices=devices_of(config))
    # Compiled, so that the runs are spread over the devices as a step will leave them.
    start = jax.jit(start_runs, static_argnames=("config", "family", "out_of_step"))
    runs = tuple(
        start(config, family, of_family, state.params, key, out_of_step=True)
        for family, of_family, key in zip(
            TRAINING, data, task_keys(start_key, len(TRAINING)), strict=True
        )
    )
    return fit(
        meta_step(config, optimizer),
        state._replace(opt_state=MetaState(state.opt_state, runs)),
        data,
        num_steps=config.steps,
        run_dir=config.run_dir,
        tasks_per_step=config.num_tasks * len(TRAINING),
        validate=validate,
        best_metric=("loss", "min"),
        resume=config.resume,
    )


def check(config: Config) -> None:
    """Raises a UserError for settings that would fail later, or without sense."""
    counts = ("horizon", "unroll_steps", "steps", "num_tasks")
    check_chunk(config.chunk)
    program.require(
        *(
            (getattr(config, name) >= 1, f"{name} is {getattr(config, name)}; give 1 or more")
            for name in (*counts, "test_steps")
        ),
        *(
            (getattr(config, name) >= 2, f"{name} is {getattr(config, name)}; give 2 or more")
            for name in ("num_validation_tasks", "num_test_tasks")
        ),
        *(
            (getattr(config, name) > 0, f"{name} is {getattr(config, name)}; give more than 0")
            for name in ("outer_rate", "std")
        ),
        (
            min(config.hidden_sizes, default=1) >= 1,
            f"hidden_sizes is {config.hidden_sizes}; give numbers of 1 or more",
        ),
        (
            1 <= config.batch_size <= NUM_EXAMPLES,
            f"batch_size is {config.batch_size}; give 1 to {NUM_EXAMPLES}, the examples of a task",
        ),
        (
            config.horizon % max(config.unroll_steps, 1) == 0,
            f"horizon is {config.horizon}; give a multiple of unroll_steps {config.unroll_steps}",
        ),
        (
            config.test_steps <= BEYOND * config.horizon,
            f"test_steps is {config.test_steps}; give at most {BEYOND * config.horizon}, "
            f"{BEYOND} times horizon {config.horizon}, where the test ends",
        ),
    )


def main(config: Config) -> dict[str, Any]:
    """Meta-trains, compares on held-out tasks, prints the table and draws the figure."""
    check(config)
    glyphs = ClassSplit(*(load_images("glyphs", part) for part in ClassSplit._fields))
    validation_data = task_data(glyphs, VALIDATION)

    def validate(params: Params) -> dict[str, float]:
        # On the host: training may use fewer devices than validation.
        losses = loss_curves(
            jax.device_get(params),
            validation_data,
            jax.random.key(VALIDATION_SEED),
            family=VALIDATION,
            rule=learned_optimizer,
            batch_size=config.batch_size,
            num_tasks=config.num_validation_tasks,
            num_steps=BEYOND * config.horizon,
        )
        # The worse of two, so that no checkpoint is kept that is fast and does not stay stable.
        means = np.asarray(losses).mean(0)
        return {"loss": float(max(means[config.test_steps], means[-1]))}

    trained = train(config, glyphs, validate)
    comparisons = {
        family.name: compare(
            jax.device_get(trained.best_params),
            task_data(glyphs, family),
            jax.random.key(TEST_SEED),
            family=family,
            batch_size=config.batch_size,
            num_tasks=config.num_test_tasks,
            num_steps=config.test_steps,
            beyond=BEYOND * config.horizon,
        )
        for family in TEST
    }
    every_curve = {
        name: estimate(np.concatenate([x.curves[name].per_task for x in comparisons.values()]))
        for name in (LEARNED, *RIVALS)
    }
    path = config.run_dir / "learned_optimizer.png"
    draw(comparisons, path, horizon=config.horizon, num_tasks=config.num_test_tasks)
    comparisons["all kinds"] = Comparison(every_curve, {})
    when = config.test_steps, BEYOND * config.horizon
    show_table(comparisons, *when, num_tasks=config.num_test_tasks)
    print(f"the picture is {path}")
    return {
        **numbers(comparisons, *when),
        "num_test_tasks_of_each_kind": config.num_test_tasks,
        "best_step": trained.best_step,
        "validation_loss": trained.best_validation["loss"],
        "train_seconds": round(trained.train_seconds, 1),
        "compile_seconds": round(trained.compile_seconds, 1),
        "steps_per_second": round(trained.steps_per_second, 2),
    }


if __name__ == "__main__":
    program.run("learned_optimizer", main, PRESETS, default="default")
