"""Completion in `experiments.density`: the lower half of test images, given the upper one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from jaxtyping import Array, Bool, Float

from experiments.density_config import Config
from experiments.density_data import to_grey
from experiments.density_model import Model
from metagen_jax.evaluation.baselines import squared_distances
from metagen_jax.evaluation.estimates import Estimate, estimate
from metagen_jax.evaluation.image_grids import plot_image_grid
from metagen_jax.gradients import task_keys
from metagen_jax.parallel import map_over_tasks, replicate
from metagen_jax.types import Params

NUM_COMPLETIONS, NUM_SHOWN = 10, 8
COMPLETION_SEED = 1_000_000_003


def complete_and_report(
    config: Config, model: Model, params: Params, train: np.ndarray, test: Array
) -> dict[str, Any]:
    """Completes test images, prints how far they are from the truth, draws the first ones.

    The error is the mean squared difference over the hidden pixels, grey values from 0 to 1, of one
    completion and of the mean of several, beside that of the mean training image and of the hidden
    half of the training image whose upper half is nearest.
    """
    test = test[: config.num_completed]
    truth = np.asarray(to_grey(config, test))
    known = np.ones(test.shape[1:], bool)
    known[known.shape[0] // 2 :] = False
    seen = train.astype(np.float32) / (1 if config.values == "static" else 255)
    mean = np.broadcast_to(seen.mean(0), truth.shape)
    made = np.asarray(to_grey(config, _complete(config, model, params, test, known, mean)))
    guesses = {
        "one completion": made[:, 0],
        f"mean of {NUM_COMPLETIONS} completions": made.mean(1),
        "mean training image": mean,
        "nearest training image": seen[_nearest(seen, truth, known)],
    }
    errors = {
        name: estimate(np.square(guess - truth)[:, ~known].mean(1))
        for name, guess in guesses.items()
    }
    _print_table(config, errors, len(test))
    _draw(config, truth, known, made, guesses)
    return {
        f"completion_error_{name.replace(' ', '_')}": float(error.mean)
        for name, error in errors.items()
    }


def _complete(
    config: Config,
    model: Model,
    params: Params,
    images: Array,
    known: Bool[np.ndarray, "h w c"],
    mean: np.ndarray,
) -> Array:
    """`(images, completions, h, w, c)`, begun with pixels that the mean image makes likely."""
    complete = model.complete
    assert complete is not None
    devices = jax.local_devices()[: config.num_devices]
    peak = 255 if config.values == "levels" else 1
    hidden = jnp.asarray(~known)

    def of_one(params: Params, task: tuple[Array, Array, Array]) -> Array:
        image, mean, key = task
        start_key, chain_key = jax.random.split(key)
        if peak == 1:
            filling = jax.random.bernoulli(start_key, mean).astype(image.dtype)
        else:
            filling = jnp.round(peak * mean).astype(image.dtype)
        begun = jnp.where(hidden, filling, image)
        run = jax.vmap(complete, in_axes=(None, None, None, 0))
        return run(params, begun, ~hidden, task_keys(chain_key, NUM_COMPLETIONS))

    tasks = (images, jnp.asarray(mean), task_keys(jax.random.key(COMPLETION_SEED), len(images)))
    run = jax.jit(map_over_tasks(of_one, devices=devices, chunk=min(config.chunk, len(images))))
    return run(replicate(params, devices=devices), tasks)


def _nearest(
    seen: Float[np.ndarray, "n h w c"],
    images: Float[np.ndarray, "m h w c"],
    known: Bool[np.ndarray, "h w c"],
) -> np.ndarray:
    """The training image whose known part is nearest, of each test image."""
    parts = (jnp.asarray(x[:, known]) for x in (images, seen))
    return np.asarray(squared_distances(*parts).argmin(1))


def _print_table(config: Config, errors: dict[str, Estimate], num_images: int) -> None:
    table = rich.table.Table(
        title=f"Lower halves of {num_images:,} test images, guessed",
        caption="grey values from 0 to 1; mean ± 95 % interval",
    )
    table.add_column(f"guess (completions by {config.model})")
    table.add_column("squared error of a pixel", justify="right")
    for name, error in errors.items():
        table.add_row(name, f"{error.mean:.4f} ± {error.interval:.4f}")
    rich.console.Console(width=100).print(table)


def _draw(
    config: Config,
    truth: np.ndarray,
    known: np.ndarray,
    made: np.ndarray,
    guesses: dict[str, np.ndarray],
) -> None:
    hidden = np.where(known, truth, 0.5)
    columns = (truth, hidden, *(made[:, i] for i in range(3)), guesses["nearest training image"])
    rows = np.stack([images[:NUM_SHOWN] for images in columns])
    plot_image_grid(
        rows,
        config.run_dir / "completions.png",
        title=f"{config.model} of {config.dataset}: the lower half, given the upper one",
        row_labels=["test image", "given", "completed", "completed", "completed", "nearest"],
        note="nearest: the training image whose upper half is nearest",
    )
