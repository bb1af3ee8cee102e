"""Few-shot regression of sinusoids: MAML against a pretrained network and an oracle.

    python -m experiments.sinusoid                       # 5 shots, two inner steps, cosine rate
    python -m experiments.sinusoid --preset published    # 10 shots, 70,000 steps, constant rate

Finn et al. 2017, section 5.1. A task is a sinusoid of amplitude U[0.1, 5] and phase U[0, pi], seen
at a few x of U[-5, 5]; the error is the mean squared error of the adapted network at 100 x spread
evenly over [-5, 5], on tasks never trained on. The pretrained network is trained on all tasks as
one data set and adapts at the rate that is best on validation tasks; the oracle is given amplitude
and phase and does not adapt. Writes `result.json`, `sinusoid.png`, metrics and checkpoints.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
import rich.console
import rich.table
from jaxtyping import Array, Float

from experiments import program
from metagen_jax.data.sinusoid import (
    AMPLITUDES,
    INPUTS,
    SinusoidTask,
    oracle_episode,
    sample_sinusoid_task,
    sinusoid,
)
from metagen_jax.evaluation import figures
from metagen_jax.evaluation.estimates import Estimate, estimate
from metagen_jax.gradients import gradients, mean_over_tasks, task_keys
from metagen_jax.meta.maml import maml_loss, maml_predict
from metagen_jax.nets.mlp import MLP
from metagen_jax.parallel import data_parallel, replicate
from metagen_jax.supervised import squared_error_loss
from metagen_jax.training import FitResult, fit, init_state, train_step
from metagen_jax.types import Episode, Params

TEST_QUERIES = 100
PRETRAINED_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
COLUMNS = (0, 1, 2, 5, 10)
# Of the tasks of validation and test, the same for every --seed and unlike any likely one.
VALIDATION_SEED, TEST_SEED = 1_000_000_001, 1_000_000_002
# A network with an error above this has diverged: twice the largest amplitude, squared.
DIVERGED = (2 * AMPLITUDES[1]) ** 2


@dataclass(frozen=True)
class Config:
    num_shots: int = 5
    """Support points of a task, in training."""
    num_queries: int = 10
    """Query points of a task, in training."""
    hidden_sizes: tuple[int, ...] = (40, 40)
    """Units of each hidden layer of the network; ReLU."""
    inner_steps: int = 2
    """Steps of the inner SGD, in training."""
    inner_rate: float = 0.01
    """Learning rate of the inner SGD, in training and at test."""
    every_step: bool = False
    """Train on the mean of the query errors after each inner step, or on that after the last."""

    steps: int = 100_000
    """Outer steps, of each of the three networks."""
    num_tasks: int = 25
    """Tasks in an outer step."""
    outer_rate: float = 1e-3
    """Learning rate of the outer Adam."""
    cosine: bool = True
    """Let the outer rate decay to zero along a cosine; otherwise keep it."""
    num_validation_tasks: int = 1000
    """Tasks that choose MAML's best checkpoint and the rate of the pretrained network."""

    test_shots: int = 5
    """Support points of a task, at validation and test."""
    test_steps: int = 10
    """Inner steps at validation and test."""
    num_test_tasks: int = 4000
    """Tasks of the test."""

    seed: int = 0
    """Fixes initialisation and training tasks; test tasks are the same for every seed."""
    num_devices: int | None = 1
    """Devices to use; a step here is too small to gain from more than one."""
    run_dir: Path = Path("runs/sinusoid")
    """Where everything of the run is written."""
    resume: bool = False
    """Go on from the last checkpoint of the run's folder."""


PRESETS = {
    "default": Config(),
    "published": Config(num_shots=10, inner_steps=1, steps=70_000, cosine=False),
    "smoke": Config(steps=20, num_validation_tasks=20, num_test_tasks=50),
}


def check(config: Config) -> None:
    """Raises a UserError for settings that would fail only after training, or without sense."""
    counts = ("num_shots", "num_queries", "num_tasks", "test_shots")
    steps = ("steps", "inner_steps", "test_steps")
    least = {name: 1 for name in (*counts, *steps)}
    # An interval needs two.
    least |= {"num_validation_tasks": 2, "num_test_tasks": 2}
    program.require(
        *(
            (getattr(config, name) >= low, f"{name} is {getattr(config, name)}; give {low} or more")
            for name, low in least.items()
        ),
        *(
            (getattr(config, name) > 0, f"{name} is {getattr(config, name)}; give more than 0")
            for name in ("inner_rate", "outer_rate")
        ),
        (
            min(config.hidden_sizes, default=1) >= 1,
            f"hidden_sizes is {config.hidden_sizes}; give 1 or more units for each hidden layer",
        ),
    )


def train(
    config: Config,
    name: str,
    net: MLP,
    show: Callable[[SinusoidTask], Episode],
    *,
    inner_steps: int,
    validate: Callable[[Params], dict[str, float]] | None = None,
) -> FitResult:
    """Trains one network on sinusoids, in the folder `name` of the run.

    Args:
      config: of the experiment.
      name: of the network, and of its folder.
      net: the network.
      show: what of a task the network sees.
      inner_steps: of MAML; with 0 the network learns all tasks as one data set.
      validate: chooses the best checkpoint by its `mse`; None takes the last.
    """
    uniform = jnp.full(inner_steps, 1 / max(1, inner_steps))
    task_loss = maml_loss(
        squared_error_loss(net.apply),
        inner_optimizer=optax.sgd(config.inner_rate),
        num_steps=inner_steps,
        query_loss_weights=uniform if config.every_step and inner_steps else None,
    )
    devices = jax.devices()[: config.num_devices]
    grad_fn = data_parallel(mean_over_tasks(gradients(task_loss)), devices=devices)
    rate = config.outer_rate
    optimizer = optax.adam(
        optax.cosine_decay_schedule(rate, config.steps) if config.cosine else rate
    )

    def sample_one(key) -> Episode:
        task = sample_sinusoid_task(key, num_shots=config.num_shots, num_queries=config.num_queries)
        return show(task)

    def sample(key, _) -> Episode:
        return jax.vmap(sample_one)(task_keys(key, config.num_tasks))

    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    params = net.init(init_key, sample_one(init_key).query[0])
    return fit(
        train_step(grad_fn, optimizer, sample),
        replicate(init_state(params, optimizer, train_key), devices=devices),
        (),
        num_steps=config.steps,
        run_dir=config.run_dir / name,
        tasks_per_step=config.num_tasks,
        validate=validate,
        best_metric=("mse", "min"),
        resume=config.resume,
    )


def sample_test_tasks(config: Config, seed: int, num_tasks: int) -> SinusoidTask:
    """A batch of tasks with queries spread evenly over the inputs."""
    sample = functools.partial(
        sample_sinusoid_task,
        num_shots=config.test_shots,
        num_queries=TEST_QUERIES,
        even_queries=True,
    )
    return jax.vmap(sample)(task_keys(jax.random.key(seed), num_tasks))


@functools.partial(jax.jit, static_argnames=("net", "num_steps"))
def predict(
    net: MLP, params: Params, episode: Episode, rate: float, *, num_steps: int
) -> Float[Array, "steps_and_1 queries 1"]:
    """Answers to the queries of one task before adaptation and after each step of SGD."""
    predict_fn = maml_predict(
        squared_error_loss(net.apply),
        lambda params, support, inputs: net.apply(params, inputs),
        inner_optimizer=optax.sgd(rate),
        num_steps=num_steps,
        every_step=True,
    )
    return predict_fn(params, episode.support, episode.query[0], jax.random.key(0))


@functools.partial(jax.jit, static_argnames=("net", "num_steps"))
def squared_errors(
    net: MLP, params: Params, episodes: Episode, rate: float, *, num_steps: int
) -> Float[Array, "tasks steps_and_1"]:
    """Mean squared error on the queries of each task, before adaptation and after each step."""

    def of_task(episode: Episode):
        predictions = predict(net, params, episode, rate, num_steps=num_steps)
        return jnp.square(predictions - episode.query[1]).mean((1, 2))

    errors = jax.lax.map(of_task, episodes, batch_size=50)
    return jnp.where(jnp.isfinite(errors), errors, jnp.inf)


def main(config: Config) -> dict[str, Any]:
    """Trains the three networks, tests them, prints the table and draws the figure."""
    check(config)
    net = MLP(config.hidden_sizes, 1)
    validation = sample_test_tasks(config, VALIDATION_SEED, config.num_validation_tasks)
    test = sample_test_tasks(config, TEST_SEED, config.num_test_tasks)

    def evaluate(params: Params, tasks: SinusoidTask, rate: float) -> Estimate:
        errors = squared_errors(net, params, tasks.episode, rate, num_steps=config.test_steps)
        return estimate(errors)

    def validate(params: Params) -> dict[str, float]:
        mean = evaluate(params, validation, config.inner_rate).mean
        return {"mse_after_1": mean[1], "mse": mean[-1]}

    def plain(task: SinusoidTask) -> Episode:
        return task.episode

    print("meta-training by MAML", flush=True)
    maml = train(config, "maml", net, plain, inner_steps=config.inner_steps, validate=validate)
    print("pretraining a network on all tasks as one data set", flush=True)
    pretrained = train(config, "pretrained", net, plain, inner_steps=0)
    print("training the oracle, which is given amplitude and phase", flush=True)
    oracle = train(config, "oracle", net, oracle_episode, inner_steps=0)

    pretrained_rate = min(
        PRETRAINED_RATES,
        key=lambda rate: evaluate(pretrained.best_params, validation, rate).mean[1:].mean(),
    )
    known = jax.vmap(oracle_episode)(test)
    curves = {
        "maml": evaluate(maml.best_params, test, config.inner_rate),
        "pretrained": evaluate(pretrained.best_params, test, pretrained_rate),
        "oracle": estimate(squared_errors(net, oracle.best_params, known, 0.0, num_steps=0)),
    }
    labels = {
        "maml": f"MAML, rate {config.inner_rate:g}",
        "pretrained": f"pretrained, best rate {pretrained_rate:g}",
        "oracle": "oracle, not adapted",
    }
    show_table(config, curves, labels)
    draw(config, net, maml.best_params, test, curves, labels)
    return {
        **{
            f"{name}_{what}_after_{step}": float(values[step])
            for name, curve in curves.items()
            for what, values in (("mse", curve.mean), ("interval", curve.interval))
            for step in range(len(values))
        },
        "maml_diverged": float((curves["maml"].per_task[:, -1] > DIVERGED).mean()),
        "pretrained_rate": pretrained_rate,
        "num_tasks": config.num_test_tasks,
        "num_queries_per_task": TEST_QUERIES,
        "best_step": maml.best_step,
        "train_seconds": round(maml.train_seconds, 1),
        "pretrained_train_seconds": round(pretrained.train_seconds, 1),
        "oracle_train_seconds": round(oracle.train_seconds, 1),
        "tasks_per_second": round(maml.steps_per_second * config.num_tasks, 1),
    }


def show_table(config: Config, curves: dict[str, Estimate], labels: dict[str, str]) -> None:
    """Prints mean squared errors and their 95 % intervals after some numbers of steps."""
    table = rich.table.Table(
        title=f"{config.test_shots}-shot mean squared error\n{config.num_test_tasks} test tasks, "
        f"{TEST_QUERIES} queries each, ± 95 % interval",
        box=rich.box.SIMPLE_HEAD,
    )
    table.add_column("gradient\nsteps", justify="right")
    for name in curves:
        table.add_column(labels[name].replace(", ", "\n"), justify="right")
    for step in COLUMNS:
        if step <= config.test_steps:
            table.add_row(str(step), *(cell(curve, step) for curve in curves.values()))
    rich.console.Console().print(table)


def cell(curve: Estimate, step: int) -> str:
    """An entry of the table; empty for steps that were not taken."""
    if step >= len(curve.mean):
        return ""
    return f"{curve.mean[step]:.3f} ± {curve.interval[step]:.3f}"


def draw(
    config: Config,
    net: MLP,
    params: Params,
    test: SinusoidTask,
    curves: dict[str, Estimate],
    labels: dict[str, str],
) -> None:
    """Draws adaptation curves and, beside them, MAML on one test task, as `sinusoid.png`."""
    title = f"Regression of sinusoids from {config.test_shots} points"
    figure = figures.new_figure(11.0, 5.0, title)
    left, right = figure.subplots(1, 2)
    draw_curves(left, config, curves, labels)
    last_errors = curves["maml"].per_task[:, -1]
    middle = int(np.argsort(last_errors)[len(last_errors) // 2])
    draw_task(right, config, net, params, jax.tree.map(lambda x: x[middle], test))
    for axes in (left, right):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
    path = config.run_dir / "sinusoid.png"
    figures.save(figure, path)
    print(f"the picture is {path}")


def draw_curves(axes, config: Config, curves: dict[str, Estimate], labels: dict[str, str]) -> None:
    """Errors against gradient steps; on a log scale, as the oracle's is a thousandth of others."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    steps = np.arange(config.test_steps + 1)
    for (name, curve), colour, style in zip(
        curves.items(), figures.COLOURS, ("o-", "s--", ":"), strict=False
    ):
        # The oracle does not adapt: one error for every number of steps.
        mean, interval = (np.resize(x, len(steps)) for x in curve[:2])
        # Errors that diverged are infinite, and not drawn.
        mean = np.where(np.isfinite(mean), mean, np.nan)
        axes.plot(steps, mean, style, color=colour, label=labels[name], markersize=4)
        axes.fill_between(steps, mean - interval, mean + interval, color=colour, alpha=0.2, lw=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yscale("log", subs=[])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    figures.finish(
        axes,
        f"gradient steps on {config.test_shots} points",
        f"mean squared error (log scale), {config.num_test_tasks} test tasks, band: 95 % interval",
    )


def draw_task(axes, config: Config, net: MLP, params: Params, task: SinusoidTask) -> None:
    """MAML on one task: its answers before, after one and after all gradient steps."""
    (support_x, support_y), (query_x, _) = task.episode
    answers = predict(net, params, task.episode, config.inner_rate, num_steps=config.test_steps)
    x = np.linspace(*INPUTS, 400)
    axes.plot(
        x, sinusoid(jnp.asarray(x), task.amplitude, task.phase), color="black", label="true curve"
    )
    final, before, after_1 = (figures.COLOURS[i] for i in (0, 3, 4))
    looks = {0: (before, ":"), 1: (after_1, "--"), config.test_steps: (final, "-")}
    for step, (colour, style) in looks.items():
        label = f"after {step} step{'s' * (step > 1)}" if step else "before adaptation"
        axes.plot(query_x, answers[step], style, color=colour, label=label)
    axes.plot(support_x, support_y, "k^", label=f"the {config.test_shots} points given")
    figures.finish(axes, "x", "MAML on the test task of median error")


if __name__ == "__main__":
    program.run("sinusoid", main, PRESETS, default="default")
