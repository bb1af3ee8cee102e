"""The table and the pictures of `experiments.density`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from jaxtyping import Array

from experiments.density_config import Config
from experiments.density_data import to_grey
from experiments.density_model import Model
from metagen_jax.evaluation import plots
from metagen_jax.evaluation.image_grids import plot_image_grid
from metagen_jax.generative.editing import attribute_direction
from metagen_jax.gradients import task_keys
from metagen_jax.runs.log import read_metrics
from metagen_jax.types import Params

SAMPLE_SEED, NUM_OF_ATTRIBUTE = 3, 1000
_VALUES = {
    "static": "values 0 and 1, fixed",
    "dynamic": "values 0 and 1, drawn from the grey values",
    "levels": "256 levels",
}


def print_table(config: Config, numbers: Mapping[str, Any]) -> None:
    """Prints the test figures with what they are."""
    nats = f"{numbers['test_nll_nats']:.2f} ± {numbers['test_nll_interval']:.2f}"
    bits = f"{numbers['test_bits_per_dim']:.4f} ± {numbers['test_bits_per_dim_interval']:.4f}"
    table = rich.table.Table(
        title=f"Negative log-likelihood of {numbers['num_test']:,} test images of {config.dataset}",
        caption=f"mean ± 95 % interval over images; {_VALUES[config.values]}",
    )
    table.add_column("model")
    table.add_column("what it is")
    table.add_column("nats an image", justify="right")
    table.add_column("bits per dimension", justify="right")
    table.add_row(config.model, numbers["kind"], nats, bits)
    rich.console.Console(width=100).print(table)


def draw(config: Config, model: Model, params: Params, test: Array) -> None:
    """Draws the learning curve, samples and, of models with latents, what they make of images."""
    folder, what = config.run_dir, f"{config.model} of {config.dataset}"
    plots.plot_learning_curve(
        read_metrics(folder, validation_loss="validation_nll", loss="generator_loss"),
        folder / "learning_curve.png",
        title=f"{what}: training",
        loss_label=model.loss_label,
    )
    keys = task_keys(jax.random.key(SAMPLE_SEED), 80)
    samples = jax.jit(jax.vmap(model.sample, in_axes=(None, 0)))(params, keys)
    shape = test.shape[1:]
    means = f", {model.samples_are}" if model.samples_are else ""
    plot_image_grid(
        np.asarray(samples).reshape(8, 10, *shape),
        folder / "samples.png",
        title=f"{what}: samples{means}",
    )
    drawn = ["learning_curve.png", "samples.png"]
    if model.reconstruct is not None:
        _draw_reconstructions(config, model.reconstruct, params, test[:30], what)
        drawn.append("reconstructions.png")
    if model.interpolate is not None:
        _draw_interpolations(config, model.interpolate, params, test[:12], what)
        drawn.append("interpolations.png")
    if model.latents is not None:
        _draw_attribute(config, model, params, test, what)
        drawn.append("attribute.png")
    print(f"pictures are in {folder}: {', '.join(drawn)}")


def _draw_reconstructions(
    config: Config, reconstruct: Callable, params: Params, images: Array, what: str
) -> None:
    made = jax.jit(jax.vmap(reconstruct, in_axes=(None, 0)))(params, images)
    shape = images.shape[1:]
    rows = [np.asarray(to_grey(config, images)), np.asarray(made)]
    pairs = np.stack([x.reshape(3, 10, *shape) for x in rows], axis=1)
    plot_image_grid(
        pairs.reshape(6, 10, *shape),
        config.run_dir / "reconstructions.png",
        title=f"{what}: test images and their reconstructions",
        row_labels=["image", "again"] * 3,
    )


def _draw_interpolations(
    config: Config, interpolate: Callable, params: Params, images: Array, what: str
) -> None:
    weights = jnp.linspace(0, 1, 8)
    along = jax.vmap(jax.vmap(interpolate, (None, None, None, 0)), (None, 0, 0, None))
    first, last = images[::2], images[1::2]
    made = np.asarray(jax.jit(along)(params, first, last, weights))
    ends = (np.asarray(to_grey(config, x))[:, None] for x in (first, last))
    start, stop = ends
    plot_image_grid(
        np.concatenate([start, made, stop], axis=1),
        config.run_dir / "interpolations.png",
        title=f"{what}: from one test image to another, in latent space",
        note="first and last column: test images",
    )


def _draw_attribute(config: Config, model: Model, params: Params, test: Array, what: str) -> None:
    """Test images with less and with more of what every image has some of: ink."""
    latents, decode = model.latents, model.decode_grey
    assert latents is not None
    assert decode is not None
    images = test[:NUM_OF_ATTRIBUTE]
    of_images = jax.jit(jax.vmap(latents, in_axes=(None, 0)))(params, images)
    ink = np.asarray(to_grey(config, images)).mean((1, 2, 3))
    direction = attribute_direction(of_images, ink > np.median(ink))
    shares = jnp.linspace(-1.5, 1.5, 7)
    moved = of_images[:6, None] + shares[:, None] * direction
    made = jax.jit(jax.vmap(jax.vmap(decode, (None, 0)), (None, 0)))(params, moved)
    before = np.asarray(to_grey(config, images[:6]))[:, None]
    plot_image_grid(
        np.concatenate([before, np.asarray(made)], axis=1),
        config.run_dir / "attribute.png",
        title=f"{what}: less and more ink, by latent arithmetic",
        note="first: test images; then -1.5 to 1.5 times the difference of mean latents",
    )
