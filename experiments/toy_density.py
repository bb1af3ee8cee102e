"""Densities of two numbers: how near a model comes to one that is known, in nats and as a picture.

    python -m experiments.toy_density                                  # two moons, a spline flow
    python -m experiments.toy_density --preset checkerboard --model flow_matching

Each step draws fresh points from the density. Reports the negative log-likelihood of test points,
exact but for the integration of flow matching, beside that by the true density, whose mean
difference estimates the Kullback-Leibler divergence; and what the model's density integrates to
over the square that is drawn. Writes `result.json`, `density.png`, `learning_curve.png`, metrics
and checkpoints.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table
from jaxtyping import Array, Float

from experiments import program
from metagen_jax.data import toy_densities
from metagen_jax.data.toy_densities import ToyDensity
from metagen_jax.evaluation import figures, plots
from metagen_jax.evaluation.estimates import estimate
from metagen_jax.generative import flows
from metagen_jax.generative.flow_matching import (
    flow_matching_log_prob,
    flow_matching_loss,
    flow_matching_sample,
)
from metagen_jax.generative.maximum_likelihood import LogProb, negative_log_likelihood_loss
from metagen_jax.gradients import gradients, task_keys
from metagen_jax.nets.velocity import VelocityMLP
from metagen_jax.parallel import data_parallel, replicate
from metagen_jax.runs.log import read_metrics
from metagen_jax.training import FitResult, fit, init_state, train_step
from metagen_jax.types import LossFn, Params, PRNGKey

ModelName = Literal["realnvp", "glow", "maf", "spline", "flow_matching"]
DensityName = Literal["two_moons", "eight_gaussians", "checkerboard"]

DENSITIES: dict[DensityName, ToyDensity] = {
    "two_moons": toy_densities.TWO_MOONS,
    "eight_gaussians": toy_densities.EIGHT_GAUSSIANS,
    "checkerboard": toy_densities.CHECKERBOARD,
}
# Of the points of validation and test and of the samples drawn, the same for every --seed.
VALIDATION_SEED, TEST_SEED, SAMPLE_SEED = 1_000_000_001, 1_000_000_002, 3
INTEGRATION_STEPS = 40
# Half the side of the square that is drawn, and points by which flows set their first scales.
BOUND, NUM_INIT = 5.0, 1000


@dataclass(frozen=True)
class Config:
    density: DensityName = "two_moons"
    """What the points are drawn from."""
    model: ModelName = "spline"
    """What is trained: a flow, by maximum likelihood, or a velocity field by flow matching."""
    num_layers: int = 6
    """Couplings, steps or autoregressive layers of a flow."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Units of each hidden layer of every net."""

    steps: int = 5000
    """Steps of training."""
    batch_size: int = 256
    """Points in a step."""
    rate: float = 2e-3
    """Learning rate of Adam, which decays to zero along a cosine."""
    validate_every: int = 500
    """Steps between validations."""
    num_validation: int = 2000
    """Points of a validation; the parameters that validate best are the result."""

    num_test: int = 10_000
    """Points of the test, and samples in the picture."""
    grid: int = 256
    """Points along a side of the square over which the density is drawn and integrated."""

    seed: int = 0
    """Fixes initialisation and training points; test points are the same for every seed."""
    num_devices: int | None = 1
    """Devices to use; a step here is too small to gain from more than one."""
    run_dir: Path = Path("runs/toy_density")
    """Where everything of the run is written."""
    resume: bool = False
    """Go on from the last checkpoint of the run's folder."""


PRESETS = {
    "two-moons": Config(),
    "eight-gaussians": Config(density="eight_gaussians"),
    "checkerboard": Config(density="checkerboard"),
    "smoke": Config(num_layers=2, steps=4, batch_size=16, num_validation=20, num_test=50, grid=16),
}


def with_model(preset: Config, line: Config) -> Config:
    """The preset's settings with those that the model of the command line brings."""
    run_dir = preset.run_dir.with_name(f"{preset.run_dir.name}-{line.model}")
    sizes = (128, 128, 128) if line.model == "flow_matching" else preset.hidden_sizes
    return replace(preset, model=line.model, run_dir=run_dir, hidden_sizes=sizes)


def check(config: Config) -> None:
    """Raises a UserError for settings that would fail only after training, or without sense."""
    least = {"num_layers": 1, "steps": 1, "batch_size": 1, "validate_every": 1}
    # An interval needs two.
    least |= {"num_validation": 2, "num_test": 2, "grid": 2}
    program.require(
        *(
            (getattr(config, name) >= low, f"{name} is {getattr(config, name)}; give {low} or more")
            for name, low in least.items()
        ),
        (config.rate > 0, f"rate is {config.rate}; give more than 0"),
        (
            min(config.hidden_sizes, default=1) >= 1,
            f"hidden_sizes is {config.hidden_sizes}; give 1 or more units for each hidden layer",
        ),
    )


class Model(NamedTuple):
    """What the experiment needs of a model of points `(2,)`.

    Attributes:
      init: `(key, points) -> params`.
      loss: over batches of points.
      log_prob: of one point.
      sample: `(params, key) -> point`.
      kind: what `log_prob` is.
    """

    init: Callable[[PRNGKey, Array], Params]
    loss: LossFn
    log_prob: LogProb
    sample: Callable[[Params, PRNGKey], Array]
    kind: str


def make_model(config: Config) -> Model:
    """The model that the settings name."""
    if config.model == "flow_matching":
        return _flow_matching(config)
    builders = {
        "realnvp": flows.realnvp,
        "glow": flows.glow,
        "maf": flows.maf,
        "spline": flows.spline_flow,
    }
    bijector = builders[config.model](
        num_layers=config.num_layers, hidden_sizes=config.hidden_sizes
    )
    log_prob = flows.flow_log_prob(bijector)
    draw = flows.flow_sample(bijector, (2,))
    return Model(
        init=bijector.init,
        loss=negative_log_likelihood_loss(log_prob),
        log_prob=log_prob,
        sample=lambda params, key: draw(key, params),
        kind="exact",
    )


def _flow_matching(config: Config) -> Model:
    net = VelocityMLP(config.hidden_sizes)
    velocity: Callable[..., Array] = net.apply  # pyright: ignore[reportAssignmentType]
    loss = flow_matching_loss(velocity)
    log_prob = flow_matching_log_prob(velocity, num_steps=INTEGRATION_STEPS)
    return Model(
        init=lambda key, points: net.init(key, points[0], 0.0),
        loss=lambda params, points, key: loss(params, (points, None), key),
        log_prob=lambda params, point, key: log_prob(params, (point, None), key),
        sample=lambda params, key: flow_matching_sample(
            key, velocity, params, shape=(2,), num_steps=INTEGRATION_STEPS
        ),
        kind=f"exact trace, {INTEGRATION_STEPS} steps of integration",
    )


def draw_points(density: ToyDensity, key: PRNGKey, count: int) -> Float[Array, "n 2"]:
    """So many points of a density."""
    return jax.vmap(density.sample)(task_keys(key, count))


def train(config: Config, model: Model) -> FitResult:
    """Trains the model; the parameters that validate best are the result."""
    density = DENSITIES[config.density]
    val = draw_points(density, jax.random.key(VALIDATION_SEED), config.num_validation)
    log_probs = _of_points(model.log_prob)

    def validate(params: Params) -> dict[str, float]:
        return {"nll": -float(log_probs(params, val).mean())}

    optimizer = optax.adam(optax.cosine_decay_schedule(config.rate, config.steps))
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(model.init)(init_key, draw_points(density, init_key, NUM_INIT))
    devices = program.devices_for(config.num_devices, config.batch_size)
    grad_fn = data_parallel(gradients(model.loss), devices=devices)

    def sample(key: PRNGKey, _: tuple) -> Array:
        return draw_points(density, key, config.batch_size)

    return fit(
        train_step(grad_fn, optimizer, sample),
        replicate(init_state(params, optimizer, train_key), devices=devices),
        (),
        num_steps=config.steps,
        run_dir=config.run_dir,
        validate=validate,
        validate_every=config.validate_every,
        best_metric=("nll", "min"),
        resume=config.resume,
    )


def _of_points(log_prob: LogProb) -> Callable[[Params, Array], Array]:
    """`(params, points) -> log-densities`; no model here makes use of a key."""

    def log_probs(params: Params, points: Float[Array, "n 2"]) -> Float[Array, " n"]:
        def of_one(point: Array) -> Array:
            return log_prob(params, point, jax.random.key(0))

        return jax.lax.map(of_one, points, batch_size=2048)

    return jax.jit(log_probs)


def main(config: Config) -> dict[str, Any]:
    """Trains, tests, prints the table, draws the pictures; gives the numbers by name."""
    check(config)
    density, model = DENSITIES[config.density], make_model(config)
    print(f"training {config.model} on points of {config.density}")
    result = train(config, model)
    params, log_probs = result.best_params, _of_points(model.log_prob)
    test = draw_points(density, jax.random.key(TEST_SEED), config.num_test)
    of_model = np.asarray(log_probs(params, test))
    of_truth = np.asarray(jax.vmap(density.log_prob)(test))
    nll, truth, excess = (estimate(x) for x in (-of_model, -of_truth, of_truth - of_model))
    width = 2 * BOUND / config.grid
    on_grid = np.exp(np.float64(log_probs(params, _grid(config)))).reshape(2 * (config.grid,))
    numbers = {
        "kind": model.kind,
        "num_test": config.num_test,
        "test_nll_nats": float(nll.mean),
        "test_nll_interval": float(nll.interval),
        "true_nll_nats": float(truth.mean),
        "excess_nats": float(excess.mean),
        "excess_interval": float(excess.interval),
        "mass_in_square": float(on_grid.sum() * width**2),
        "num_parameters": sum(x.size for x in jax.tree.leaves(params)),
        "best_step": result.best_step,
        "train_seconds": round(result.train_seconds, 1),
        "points_per_second": round(result.steps_per_second * config.batch_size, 1),
    }
    print_table(config, numbers)
    keys = task_keys(jax.random.key(SAMPLE_SEED), config.num_test)
    samples = jax.jit(jax.vmap(model.sample, in_axes=(None, 0)))(params, keys)
    draw(config, np.asarray(test), np.asarray(samples), on_grid)
    return numbers


def _grid(config: Config) -> Float[Array, "n 2"]:
    """The middles of equal cells of the square, row by row."""
    middles = BOUND * ((2 * np.arange(config.grid) + 1) / config.grid - 1)
    pairs = np.stack(np.meshgrid(middles, middles), axis=-1)
    return jnp.asarray(pairs.reshape(-1, 2), jnp.float32)


def print_table(config: Config, numbers: dict[str, Any]) -> None:
    """Prints the test figures with what they are."""
    table = rich.table.Table(
        title=f"Negative log-likelihood of {config.num_test:,} test points of {config.density}",
        caption="nats a point; mean ± 95 % interval over points",
    )
    table.add_column("model")
    table.add_column("what it is")
    for column in ("here", "by the true density", "more than that", "mass in the square"):
        table.add_column(column, justify="right")
    table.add_row(
        config.model,
        numbers["kind"],
        f"{numbers['test_nll_nats']:.4f} ± {numbers['test_nll_interval']:.4f}",
        f"{numbers['true_nll_nats']:.4f}",
        f"{numbers['excess_nats']:.4f} ± {numbers['excess_interval']:.4f}",
        f"{numbers['mass_in_square']:.5f}",
    )
    rich.console.Console(width=110).print(table)


def draw(
    config: Config,
    points: Float[np.ndarray, "n 2"],
    samples: Float[np.ndarray, "n 2"],
    density: Float[np.ndarray, "grid grid"],
) -> None:
    """Draws points of the data, of the model and the model's density side by side."""
    folder, what = config.run_dir, f"{config.model} of {config.density}"
    # The loss of flow matching is a squared error, and no likelihood to put beside validation's.
    matching = config.model == "flow_matching"
    also = {} if matching else {"validation_loss": "validation_nll"}
    plots.plot_learning_curve(
        read_metrics(folder, **also),
        folder / "learning_curve.png",
        title=f"{what}: training",
        loss_label="Squared error of the velocity" if matching else "Nats a point",
    )
    figure = figures.new_figure(12.0, 4.6, what)
    left, middle, right = figure.subplots(1, 3)
    for axes, of, title in (
        (left, points, "points of the data"),
        (middle, samples, "samples of the model"),
    ):
        axes.plot(of[:, 0], of[:, 1], ".", ms=1.5, alpha=0.4, color=figures.COLOURS[0])
        figures.finish(axes, "x", title)
        axes.grid(False)
    box = (-BOUND, BOUND, -BOUND, BOUND)
    # Model densities have peaks; so that the rest shows, the highest hundredth is one colour.
    top = np.quantile(density[density > density.max() / 100], 0.99)
    right.imshow(density, extent=box, origin="lower", cmap="Blues", vmin=0, vmax=top)
    figures.finish(right, "x", "density of the model")
    right.grid(False)
    for axes in (left, middle, right):
        axes.set(xlim=box[:2], ylim=box[2:], aspect="equal")
    figures.save(figure, folder / "density.png")
    print(f"pictures are in {folder}: density.png, learning_curve.png")


if __name__ == "__main__":
    program.run("toy_density", main, PRESETS, default="two-moons", vary=with_model)
