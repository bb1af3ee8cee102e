"""Features of images without labels, and what they are worth when labels are few.

    python -m experiments.representation                                 # embedded letters, SimCLR
    python -m experiments.representation --preset omniglot --data-dir DIR --method byol
    python -m experiments.representation --preset cifar10 --data-dir DIR --method context_prediction

Learns features by a self-supervised method and judges them frozen: characters by episodes of unseen
characters, their quarter turns being classes of their own, by the nearest class mean and by
logistic regression; "cifar10" by a linear probe and nearest neighbours. Beside them stand the
features of the same net as it is initialised, raw pixels, and the same net trained with labels for
as many steps. Writes to the run's folder: `result.json`, `learning_curve.png`, `views.png`,
`neighbours.png`, `map.png`, of methods that draw `drawings.png`, metrics, checkpoints.

Results, with command, machine, minutes and seeds, stand in experiments/README.md.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array

from experiments import program
from experiments import representation_report as report
from experiments.representation_config import PRESETS, Config, check, with_method
from experiments.representation_data import (
    Part,
    Splits,
    draw_batch,
    is_characters,
    load_splits,
    view_of,
)
from experiments.representation_method import Method
from experiments.representation_methods import METHODS
from metagen_jax.evaluation.probes import extract_features, fingerprint
from metagen_jax.gradients import gradients, task_keys
from metagen_jax.parallel import data_parallel, replicate
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.training import FitResult, fit, init_state, train_step
from metagen_jax.types import Batch, LossFn, Params, PRNGKey

# Images by which nets are initialised.
NUM_INIT = 2


def train(config: Config, method: Method, part: Part, params: Params) -> FitResult:
    """Learns features without labels."""

    def sample(key: PRNGKey, data: tuple[Array, Array]) -> Array:
        return draw_batch(key, data, batch_size=config.batch_size)[0]

    optimizer = method.optimizer(_adam(config))
    return _fit(config, method.grad_fn, optimizer, sample, part, params, method=method)


def train_supervised(config: Config, method: Method, part: Part, params: Params) -> Params:
    """The same net by as many steps of classification, on the same views; gives its parameters."""
    head = nn.Dense(int(part.labels.max()) + 1)
    width = jax.eval_shape(method.features, params, _first(part)).shape[1]

    def logits(params: Params, images: Array) -> Array:
        outputs = head.apply(params["classes"], method.features(params["method"], images))
        assert isinstance(outputs, jax.Array)
        return outputs

    sample = functools.partial(draw_batch, batch_size=config.batch_size)
    both = {"method": params, "classes": head.init(jax.random.key(0), jnp.zeros((1, width)))}
    loss_fn = _of_views(config, cross_entropy_loss(logits))
    return _fit(config, gradients(loss_fn), _adam(config), sample, part, both).best_params["method"]


def _fit(config, grad_fn, optimizer, sample, part: Part, params, *, method=None) -> FitResult:
    _, train_key = jax.random.split(jax.random.key(config.seed))
    devices = program.devices_for(config.num_devices, config.batch_size)
    state = init_state(params, optimizer, train_key)
    state, data = replicate((state, (part.images, part.labels)), devices=devices)
    return fit(
        train_step(
            data_parallel(grad_fn, devices=devices),
            optimizer,
            sample,
            update_slow=None if method is None else method.update_slow,
        ),
        state,
        data,
        num_steps=config.steps,
        run_dir=config.run_dir if method is not None else config.run_dir / "supervised",
        resume=config.resume,
    )


def _adam(config: Config) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(config.rate, config.steps))


def _of_views(config: Config, loss_fn: LossFn) -> LossFn:
    """The loss of one view of each image."""
    view = view_of(config)

    def of_views(params: Params, batch: Batch, key: Array):
        images, labels = batch
        keys = task_keys(key, len(images)) if key.ndim == 0 else key
        return loss_fn(params, (jax.vmap(view)(keys, images), labels), keys[0])

    return of_views


def judge(
    config: Config, features: Callable[[Params, Array], Array], params: Params, splits: Splits
) -> tuple[dict[str, Any], np.ndarray]:
    """The numbers of frozen features, and the features of the test images."""

    def of_bytes(params: Params, images: Array) -> Array:
        return features(params, images / 255.0)

    test = extract_features(of_bytes, params, splits.test.images)
    if is_characters(config):
        numbers = report.judge_by_few_shots(config, splits.test, test)
    else:
        train, val = (
            (extract_features(of_bytes, params, part.images), part.labels) for part in splits[:2]
        )
        numbers = report.judge_by_probes(train, val, (test, splits.test.labels))
    return {**numbers, **report.measure(test)}, test


def raw_pixels(params: Params, images: Array) -> Array:
    """What there is without any net."""
    del params
    return images.reshape(len(images), -1)


def main(config: Config) -> dict[str, Any]:
    """Trains, judges, prints the table, draws the pictures; gives the numbers by name."""
    check(config)
    splits = load_splits(config)
    counts = " / ".join(f"{len(part.images):,}" for part in splits)
    print(f"{config.dataset}: {counts} images to learn from / to choose by / to test")
    method = METHODS[config.method](config)
    init_key, _ = jax.random.split(jax.random.key(config.seed))
    start = jax.jit(method.init)(init_key, _first(splits.train))
    print(f"training by {config.method}")
    result = train(config, method, splits.train, start)
    params = result.best_params
    print("training the same net with labels")
    supervised = train_supervised(config, method, splits.train, start)
    print("judging frozen features")
    before = fingerprint(params)
    results, features = {}, {}
    for name, of, some in (
        ("raw pixels", raw_pixels, params),
        ("random initialisation", method.features, start),
        (config.method, method.features, params),
        ("supervised", method.features, supervised),
    ):
        results[name], features[name] = judge(config, of, some, splits)
    program.require((fingerprint(params) == before, "judging features has changed the net"))
    report.print_table(config, results)
    report.draw(config, method, params, splits, features[config.method])
    return {
        "num_parameters": sum(x.size for x in jax.tree.leaves(params)),
        "train_seconds": round(result.train_seconds, 1),
        "images_per_second": round(result.steps_per_second * config.batch_size, 1),
        "net": before,
        "features": results,
    }


def _first(part: Part) -> Array:
    return jnp.asarray(part.images[:NUM_INIT]) / 255.0


if __name__ == "__main__":
    program.run("representation", main, PRESETS, default="glyphs", vary=with_method)
