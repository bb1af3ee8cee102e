"""Densities of images: how probable unseen images are to a model, and images that it makes.

    python -m experiments.density                                        # embedded letters, a VAE
    python -m experiments.density --preset binarized-mnist --data-dir DIR --model iwae
    python -m experiments.density --preset fashion-mnist --data-dir DIR --model conv_vae

Trains a model by maximum likelihood, or a bound, keeps the parameters that validate best, and
reports the negative log-likelihood of test images, in nats and bits per dimension, with what it is:
exact, or a bound and by how many importance samples. Writes to the run's folder: `result.json`,
`learning_curve.png`, `samples.png`, for models with latents `reconstructions.png`,
`interpolations.png` and `attribute.png`, for those that can complete what is hidden
`completions.png`, metrics, checkpoints.

Results, with command, machine, minutes and seeds, stand in experiments/README.md.
"""

from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array

from experiments import density_report, program
from experiments.density_config import PRESETS, Config, check, with_model
from experiments.density_data import draw_values, load_splits
from experiments.density_editing import complete_and_report
from experiments.density_model import Model
from experiments.density_models import MODELS
from experiments.density_quality import compare_and_report
from metagen_jax.evaluation.likelihood import evaluate_log_prob
from metagen_jax.generative.likelihoods import bits_per_dim
from metagen_jax.parallel import data_parallel, replicate
from metagen_jax.training import FitResult, fit, init_state, train_step
from metagen_jax.types import Params, PRNGKey

# Of the noise of validation and test, the same for every --seed and unlike any likely one.
VALIDATION_SEED, TEST_SEED = 1_000_000_001, 1_000_000_002
# Images by which flows set their first scales.
NUM_INIT = 500


def train(config: Config, model: Model, images: np.ndarray, val: Array) -> FitResult:
    """Trains the model; the parameters that validate best are the result."""

    def sample(key: PRNGKey, images: Array) -> Array:
        index_key, value_key = jax.random.split(key)
        chosen = jax.random.randint(index_key, (config.batch_size,), 0, len(images))
        return draw_values(config, value_key, images[chosen])

    def validate(params: Params) -> dict[str, float]:
        return {"nll": -float(evaluate(config, model.log_prob, params, val, VALIDATION_SEED).mean)}

    rate = optax.cosine_decay_schedule(config.rate, config.steps)
    adam = optax.adam(rate, eps=config.epsilon)
    if config.weight_decay > 0:
        adam = optax.adamw(rate, eps=config.epsilon, weight_decay=config.weight_decay)
    optimizer = model.optimizer or adam
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    first = draw_values(config, init_key, images[:NUM_INIT])
    params = jax.jit(model.init)(init_key, first)
    devices = program.devices_for(config.num_devices, config.batch_size)
    grad_fn = data_parallel(model.grad_fn, devices=devices)
    state, data = replicate((init_state(params, optimizer, train_key), images), devices=devices)
    return fit(
        train_step(grad_fn, optimizer, sample, update_slow=model.update_slow),
        state,
        data,
        num_steps=config.steps,
        run_dir=config.run_dir,
        validate=None if model.log_prob is None else validate,
        validate_every=config.validate_every,
        best_metric=("nll", "min"),
        resume=config.resume,
    )


def evaluate(config: Config, log_prob, params: Params, images: Array, seed: int):
    """Log-probabilities of images, in nats."""
    return evaluate_log_prob(
        log_prob,
        params,
        images,
        key=jax.random.key(seed),
        chunk=config.chunk,
        devices=jax.local_devices()[: config.num_devices],
    )


def main(config: Config) -> dict[str, Any]:
    """Trains, tests, prints the table, draws the pictures; gives the numbers by name."""
    check(config)
    splits = load_splits(config)
    shape = splits.train.shape[1:]
    # Drawn once, so that runs and models are compared on the same values.
    val, test = (
        draw_values(config, jax.random.key(seed), images)
        for seed, images in (
            (VALIDATION_SEED, splits.val),
            (TEST_SEED, splits.test[: config.num_test]),
        )
    )
    model = MODELS[config.model](config, shape)
    counts = " / ".join(f"{len(images):,}" for images in (splits.train, val, test))
    print(f"{config.dataset}: {counts} images for training / validation / test")
    print(f"training {config.model}")
    result = train(config, model, splits.train, val)
    params = result.best_params
    numbers: dict[str, Any] = {
        "values": config.values,
        "num_parameters": sum(x.size for x in jax.tree.leaves(params)),
        "validation_nll_nats": result.best_validation.get("nll"),
        "best_step": result.best_step,
        "train_seconds": round(result.train_seconds, 1),
        "validation_seconds": round(result.validation_seconds, 1),
        "images_per_second": round(result.steps_per_second * config.batch_size, 1),
    }
    if model.test_log_prob is not None:
        print(f"testing: {model.kind}")
        numbers |= report_likelihood(config, model, params, test)
    density_report.draw(config, model, params, test)
    if model.complete is not None:
        print("completing test images")
        numbers |= complete_and_report(config, model, params, splits.train, test)
    if config.quality:
        print("comparing samples with test images")
        numbers |= compare_and_report(config, model, params, splits)
    return numbers


def report_likelihood(config: Config, model: Model, params: Params, test: Array) -> dict[str, Any]:
    """Prints the negative log-likelihood of the test images; gives the numbers by name."""
    log_prob = evaluate(config, model.test_log_prob, params, test, TEST_SEED)
    num_dims = int(np.prod(test.shape[1:]))
    numbers = {
        "num_test": len(test),
        "kind": model.kind,
        "test_nll_nats": -float(log_prob.mean),
        "test_nll_interval": float(log_prob.interval),
        "test_bits_per_dim": float(bits_per_dim(log_prob.mean, num_dims=num_dims)),
        "test_bits_per_dim_interval": float(-bits_per_dim(log_prob.interval, num_dims=num_dims)),
    }
    density_report.print_table(config, numbers)
    return numbers


if __name__ == "__main__":
    program.run("density", main, PRESETS, default="glyphs", vary=with_model)
