"""The shortcut of context prediction: colour fringes tell directions, unless colours are dropped.

    python -m experiments.representation_shortcut

A lens shifts colours against one another by where they lie in the picture. Synthetic pictures show
that and nothing else: each channel by itself is noise, and two of them agree by row or by column. A
small residual net learns from which of eight directions a patch comes, with colours dropped from no
patch, from every second one, as `experiments.representation` has it, and from all, as published.
Each net is then asked about fresh pairs with all colours and with dropped ones; chance is 12.5 %.
Writes `result.json`, metrics and checkpoints.

Doersch, Gupta, Efros: Unsupervised Visual Representation Learning by Context Prediction, 2015.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table
from jaxtyping import Array, Float

from experiments import program
from experiments.representation_method import apply_to
from metagen_jax.gradients import gradients
from metagen_jax.nets.mlp import MLP
from metagen_jax.nets.resnet import ResNet
from metagen_jax.parallel import data_parallel, replicate
from metagen_jax.self_supervised.context_prediction import (
    DIRECTIONS,
    context_prediction_loss,
    drop_colours,
)
from metagen_jax.training import fit, init_state, train_step
from metagen_jax.types import LossFn, Params, PRNGKey

# Those of "cifar10" in `experiments.representation`.
SIZE, PLACES = 32, {"patch_size": 7, "gap": 2, "jitter": 2}
PROBABILITIES = (0.0, 0.5, 1.0)
# Of the pairs of the test, the same for every --seed; and how many are asked about at once.
TEST_SEED, BLOCK = 1_000_000_002, 500


@dataclass(frozen=True)
class Config:
    num_filters: int = 16
    """Channels of the first of three stages of residual blocks."""
    num_hidden: int = 128
    """Hidden units of the head."""
    steps: int = 300
    """Steps of training."""
    batch_size: int = 256
    """Pairs in a step, each of a picture of its own."""
    rate: float = 2e-3
    """Learning rate of Adam, which decays to zero along a cosine."""
    num_test_blocks: int = 20
    """Test pairs, in blocks of 500."""

    seed: int = 0
    """Fixes initialisation and training pairs; test pairs are the same for every seed."""
    num_devices: int | None = None
    """Devices to use; without it all, and on a CPU one for each core."""
    run_dir: Path = Path("runs/representation_shortcut")
    """Where everything of the run is written."""
    resume: bool = False
    """Go on from the last checkpoint of the run's folder."""


PRESETS = {
    "default": Config(),
    "smoke": Config(num_filters=8, num_hidden=8, steps=2, batch_size=8, num_test_blocks=1),
}


def check(config: Config) -> None:
    """Raises a UserError for settings that would fail only after training, or without sense."""
    least = {"num_hidden": 1, "steps": 1, "batch_size": 1, "num_test_blocks": 1}
    program.require(
        *(
            (getattr(config, name) >= low, f"{name} is {getattr(config, name)}; give {low} or more")
            for name, low in least.items()
        ),
        (config.rate > 0, f"rate is {config.rate}; give more than 0"),
        (
            config.num_filters > 0 and config.num_filters % 8 == 0,
            f"num_filters is {config.num_filters}; give a multiple of 8",
        ),
    )


def fringed_pictures(key: PRNGKey, num_images: int) -> Float[Array, "n h w 3"]:
    """`cos(u)`, `cos(u + pi row / size)` and `cos(u + pi column / size)`, u uniform in a circle.

    One channel alone, or two pixels, are independent of place; red and green together tell the row,
    red and blue the column.
    """
    phase = jax.random.uniform(key, (num_images, SIZE, SIZE), maxval=2 * jnp.pi)
    angle = jnp.pi * jnp.arange(SIZE) / SIZE
    return jnp.cos(jnp.stack([phase, phase + angle[:, None], phase + angle], axis=-1))


def train(config: Config, net: ResNet, head: MLP, probability: float) -> Params:
    """Learns directions of patches whose colours are dropped with a probability."""
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    patches = jnp.zeros((2, PLACES["patch_size"], PLACES["patch_size"], 3))
    z, of_net = net.init_with_output(init_key, patches)
    pairs = jnp.concatenate([z, z], 1)
    params = {"net": of_net, "head": head.init(jax.random.fold_in(init_key, 1), pairs)}
    optimizer = optax.adam(optax.cosine_decay_schedule(config.rate, config.steps))
    devices = program.devices_for(config.num_devices, config.batch_size)
    grad_fn = gradients(loss_of(net, head, probability))
    return fit(
        train_step(
            data_parallel(grad_fn, devices=devices),
            optimizer,
            lambda key, _: fringed_pictures(key, config.batch_size),
        ),
        replicate(init_state(params, optimizer, train_key), devices=devices),
        (),
        num_steps=config.steps,
        run_dir=config.run_dir / f"dropped{round(100 * probability)}",
        resume=config.resume,
    ).best_params


def loss_of(net: ResNet, head: MLP, probability: float) -> LossFn:
    """The cross-entropy of the direction, and its accuracy."""
    return context_prediction_loss(
        apply_to(net, "net"),
        apply_to(head, "head"),
        augment=functools.partial(drop_colours, probability=probability),
        **PLACES,
    )


def ask(config: Config, loss_fn: LossFn, params: Params) -> float:
    """The accuracy on fresh pairs."""

    @jax.jit
    def of_block(key: PRNGKey) -> Array:
        image_key, pair_key = jax.random.split(key)
        _, metrics = loss_fn(params, fringed_pictures(image_key, BLOCK), pair_key)
        return metrics["accuracy"]

    keys = jax.random.split(jax.random.key(TEST_SEED), config.num_test_blocks)
    return float(np.mean([of_block(key) for key in keys]))


def main(config: Config) -> dict[str, Any]:
    """Trains and asks three nets and prints the table; gives the numbers by name."""
    check(config)
    net = ResNet(None, tuple(factor * config.num_filters for factor in (1, 2, 4)))
    head = MLP((config.num_hidden,), len(DIRECTIONS))
    rows = []
    for probability in PROBABILITIES:
        print(f"training with colours dropped with probability {probability}")
        params = train(config, net, head, probability)
        row: dict[str, float] = {"probability": probability}
        for name, asked in (("with_colours", 0.0), ("dropped", 1.0)):
            row[name] = ask(config, loss_of(net, head, asked), params)
        rows.append(row)
    print_table(config, rows)
    return {"num_test_pairs": config.num_test_blocks * BLOCK, "chance": 1 / 8, "rows": rows}


def print_table(config: Config, rows: list[dict[str, float]]) -> None:
    """A row for each probability."""
    num_pairs = config.num_test_blocks * BLOCK
    table = rich.table.Table(
        title="Directions told by colour fringes alone",
        caption=f"accuracy in % on {num_pairs:,} pairs, ± 95 % interval; chance is 12.5",
    )
    for column in ("colours dropped in training", "asked with colours", "asked without"):
        table.add_column(column, justify="right")
    for row in rows:
        asked = [row["with_colours"], row["dropped"]]
        cells = [f"{100 * a:.1f} ± {196 * np.sqrt(a * (1 - a) / num_pairs):.1f}" for a in asked]
        table.add_row(f"{100 * row['probability']:.0f} %", *cells)
    rich.console.Console(width=110).print(table)


if __name__ == "__main__":
    program.run("representation_shortcut", main, PRESETS, default="default")
