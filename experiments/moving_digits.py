"""Films of digits that move and bounce: what the next frame will be, and those after it.

    python -m experiments.moving_digits                                     # embedded letters
    python -m experiments.moving_digits --preset mnist --data-dir DIR
    python -m experiments.moving_digits --preset mnist --data-dir DIR --loss future

Trains a net to draw the next frame of films that are made anew for each step, or a number of frames
one after the other, keeps the parameters that validate best, and reports the mean squared error on
films of digits that it has not seen: of the next frame, and of those that follow when it sees its
own frames. Beside both stands the last frame that was seen, copied. Writes to the run's folder:
`result.json`, `learning_curve.png`, `films.png`, `errors.png`, metrics, checkpoints.

Results, with command, machine, minutes and seeds, stand in experiments/README.md.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from experiments import moving_digits_report as report
from experiments import program
from experiments.decoding import decoding
from metagen_jax.data.moving_digits import sample_film
from metagen_jax.data.sources import load_images
from metagen_jax.evaluation.estimates import estimate
from metagen_jax.gradients import gradients, task_keys
from metagen_jax.nets.next_frame import NextFrame
from metagen_jax.parallel import data_parallel, replicate
from metagen_jax.self_supervised.temporal import (
    PredictNext,
    future_prediction_loss,
    next_frame_loss,
    roll_out,
)
from metagen_jax.training import FitResult, fit, init_state, train_step
from metagen_jax.types import AnyArray, LossFn, Params, PRNGKey

# Of the films of validation and test, the same for every --seed and unlike any likely one.
VALIDATION_SEED, TEST_SEED = 1_000_000_001, 1_000_000_002
NUM_VALIDATION = 64
# Films that are predicted at once.
BLOCK = 16


@dataclass(frozen=True)
class Config:
    dataset: Literal["glyphs", "mnist"] = "glyphs"
    """"glyphs" is embedded; "mnist" is a set of TFDS. The test is on letters, or drawings of
    digits, that no film of training shows."""
    data_dir: Path | None = None
    """Folder of TFDS data sets; without it $TFDS_DATA_DIR, then TFDS's own default."""
    size: int = 32
    """Pixels of a film, a multiple of 16; a digit has 7/16 of them. Published: 64."""
    num_digits: int = 2
    """Digits in a film."""
    num_frames: int = 20
    """Frames of a film."""
    num_seen: int = 10
    """Frames after which the others are to be predicted."""

    loss: Literal["next_frame", "future"] = "next_frame"
    """What is trained: the next frame after each, or all that follow the first `num_seen`, from its
    own frames."""
    num_features: int = 32
    """Channels of the net at half of the resolution."""
    num_past: int = 4
    """Frames that the net sees at once."""

    steps: int = 1500
    """Steps of training."""
    batch_size: int = 8
    """Films in a step."""
    rate: float = 2e-3
    """Learning rate of Adam, which decays to zero along a cosine."""
    validate_every: int = 250
    """Steps between validations, on 64 films; the parameters that validate best are the result."""
    num_test: int = 500
    """Films of the test."""

    seed: int = 0
    """Fixes initialisation and films; those of the test are the same for every seed."""
    num_devices: int | None = None
    """Devices to use; without it all, and on a CPU one for each core."""
    run_dir: Path = Path("runs/moving_digits")
    """Where everything of the run is written."""
    resume: bool = False
    """Go on from the last checkpoint of the run's folder."""

    @property
    def past(self) -> int:
        """Frames that the net sees of those that are seen."""
        return min(self.num_past, self.num_seen)


PRESETS = {
    "glyphs": Config(),
    "smoke": Config(
        size=16,
        num_frames=6,
        num_seen=3,
        num_features=4,
        num_past=2,
        steps=2,
        batch_size=4,
        validate_every=1,
        num_test=8,
    ),
    "mnist": Config(dataset="mnist", steps=3000),
    "mnist-published": Config(dataset="mnist", size=64, num_features=64, steps=100_000),
}

_SPLITS = {
    "glyphs": ("train", "val", "test"),
    "mnist": ("train[:50000]", "train[50000:]", "test"),
}

Films = Float[Array, "n t s s 1"]


class Splits(NamedTuple):
    """Pictures, light on dark, to make films of for training, validation and test."""

    train: UInt8[np.ndarray, "n h w 1"]
    val: UInt8[np.ndarray, "m h w 1"]
    test: UInt8[np.ndarray, "k h w 1"]


def with_loss(preset: Config, line: Config) -> Config:
    """The preset's settings in a folder that is called after the loss, too."""
    run_dir = preset.run_dir.with_name(f"{preset.run_dir.name}-{line.loss}")
    return replace(preset, loss=line.loss, run_dir=run_dir)


def check(config: Config) -> None:
    """Raises a UserError for settings that would fail only after training, or without sense."""
    counts = (
        *("num_digits", "num_seen", "num_features", "num_past"),
        *("steps", "batch_size", "validate_every"),
    )
    least = {**dict.fromkeys(counts, 1), "num_test": 2}  # An interval needs two.
    program.require(
        *(
            (getattr(config, name) >= low, f"{name} is {getattr(config, name)}; give {low} or more")
            for name, low in least.items()
        ),
        (config.rate > 0, f"rate is {config.rate}; give more than 0"),
        (
            config.size >= 16 and config.size % 16 == 0,
            f"size is {config.size}; give a multiple of 16, so that halves of halves are whole",
        ),
        (
            config.num_seen < config.num_frames,
            f"num_seen is {config.num_seen} of {config.num_frames} frames; give fewer, so that "
            "there is something to predict",
        ),
    )


def load_splits(config: Config) -> Splits:
    """The pictures."""
    with decoding(config.dataset) as progress:
        images = [
            load_images(
                config.dataset,
                split,
                data_dir=config.data_dir,
                size=7 * config.size // 16,
                progress=progress,
            ).images
            for split in _SPLITS[config.dataset]
        ]
    return Splits(*(255 - x if config.dataset == "glyphs" else x for x in images))


def draw_films(key: PRNGKey, images: Array, *, config: Config, num_films: int) -> Films:
    """Films, each by a key of its own. Speeds go with the size: 2 to 5 pixels a frame of 64."""

    def draw(key: PRNGKey) -> Array:
        return sample_film(
            key,
            images,
            num_frames=config.num_frames,
            size=config.size,
            num_digits=config.num_digits,
            speeds=(2 * config.size / 64, 5 * config.size / 64),
        )

    return jax.vmap(draw)(task_keys(key, num_films))


class Errors(NamedTuple):
    """Mean squared errors of each film, `(n,)`, and of each frame that follows, `(n, frames)`.

    Attributes:
      next_frame: of each frame after the first `num_seen`, from the true ones before it.
      next_copied: of the frame before it.
      future: of each frame after those, from the predicted ones before it.
      future_copied: of the last frame that was seen.
    """

    next_frame: Float[AnyArray, " n"]
    next_copied: Float[AnyArray, " n"]
    future: Float[AnyArray, "n frames"]
    future_copied: Float[AnyArray, "n frames"]


def predict_by(net: NextFrame) -> PredictNext:
    """The net as a function of parameters and frames."""

    def predict(params: Params, frames: Array) -> Array:
        outputs = net.apply(params, frames)
        assert isinstance(outputs, jax.Array)
        return outputs

    return predict


def measure(
    predict: PredictNext, params: Params, films: Films, *, num_seen: int, num_past: int
) -> Errors:
    """The errors of a net that sees `num_past` frames at once, and of copying, film by film."""

    def of_film(film: Array) -> Errors:
        def errors(predictions: Array) -> Array:
            return jnp.square(predictions - film[num_seen:]).mean((1, 2, 3))

        following = predict(params, film[None, :-1])[0, num_seen - 1 :]
        seen = film[None, num_seen - num_past : num_seen]
        rolled = roll_out(predict, params, seen, num_frames=len(film) - num_seen)
        return Errors(
            errors(following).mean(),
            errors(film[num_seen - 1 : -1]).mean(),
            errors(rolled[0]),
            errors(film[num_seen - 1]),
        )

    errors = jax.jit(lambda films: jax.lax.map(of_film, films, batch_size=BLOCK))(films)
    return Errors(*map(np.asarray, errors))


def _loss(config: Config, predict: PredictNext) -> LossFn:
    if config.loss == "next_frame":
        return next_frame_loss(predict)
    # Frames before those that the net sees at once would only be computed.
    of_past = future_prediction_loss(predict, num_seen=config.past)
    first = config.num_seen - config.past
    return lambda params, films, key: of_past(params, films[:, first:], key)


def train(config: Config, net: NextFrame, splits: Splits) -> FitResult:
    """Trains the net; the parameters that validate best are the result."""
    make = functools.partial(draw_films, config=config)
    val = make(jax.random.key(VALIDATION_SEED), jnp.asarray(splits.val), num_films=NUM_VALIDATION)

    loss_fn = _loss(config, predict_by(net))
    # Films closed over would be constants, of which the compiler works out what it can.
    validate = jax.jit(lambda params, films: loss_fn(params, films, jax.random.key(0))[0])
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(net.init)(init_key, val[:1, :2])
    optimizer = optax.adam(optax.cosine_decay_schedule(config.rate, config.steps))
    devices = program.devices_for(config.num_devices, config.batch_size)
    state, data = replicate(
        (init_state(params, optimizer, train_key), splits.train), devices=devices
    )
    return fit(
        train_step(
            data_parallel(gradients(loss_fn), devices=devices),
            optimizer,
            functools.partial(make, num_films=config.batch_size),
        ),
        state,
        data,
        num_steps=config.steps,
        run_dir=config.run_dir,
        validate=lambda params: {"loss": float(validate(params, val))},
        validate_every=config.validate_every,
        best_metric=("loss", "min"),
        resume=config.resume,
    )


def main(config: Config) -> dict[str, Any]:
    """Trains, tests, prints the table, draws the pictures; gives the numbers by name."""
    check(config)
    splits = load_splits(config)
    counts = " / ".join(f"{len(images):,}" for images in splits)
    print(f"{config.dataset}: films of {counts} pictures for training / validation / test")
    net = NextFrame(config.num_features, config.num_past)
    print(f"training by {config.loss}")
    result = train(config, net, splits)
    params = result.best_params
    films = draw_films(
        jax.random.key(TEST_SEED),
        jnp.asarray(splits.test),
        config=config,
        num_films=config.num_test,
    )
    print(f"testing on {len(films)} films")
    predict = predict_by(net)
    errors = measure(predict, params, films, num_seen=config.num_seen, num_past=config.past)
    numbers = {}
    for name, ours, copied in (
        ("next_frame", errors.next_frame, errors.next_copied),
        ("future", errors.future.mean(1), errors.future_copied.mean(1)),
    ):
        for what, values in (("", ours), ("_copied", copied), ("_gain", copied - ours)):
            value = estimate(values)
            numbers[f"{name}{what}"] = float(value.mean)
            numbers[f"{name}{what}_interval"] = float(value.interval)
    report.print_table(config.loss, numbers, num_films=len(films), num_seen=config.num_seen)
    report.draw(config.run_dir, predict, params, films[:8], errors, num_seen=config.num_seen)
    return {
        "num_parameters": sum(x.size for x in jax.tree.leaves(params)),
        "best_step": result.best_step,
        "validation_loss": result.best_validation.get("loss"),
        "train_seconds": round(result.train_seconds, 1),
        "films_per_second": round(result.steps_per_second * config.batch_size, 1),
        "num_test": len(films),
        "mean_squared_errors": numbers,
    }


if __name__ == "__main__":
    program.run("moving_digits", main, PRESETS, default="glyphs", vary=with_loss)
