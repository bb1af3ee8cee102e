"""Features of images without labels, and what they are worth when labels are few.

    python -m experiments.representation                                 # embedded letters, SimCLR
    python -m experiments.representation --preset omniglot --data-dir DIR --method byol
    python -m experiments.representation --preset cifar10 --data-dir DIR --method cpc --seeds 3
    python -m experiments.few_shot --preset omniglot-5w1s --data-dir DIR \
        --init-from runs/representation-omniglot-simclr     # MAML from what has been learned there

Learns features by a self-supervised method and judges them frozen: characters by episodes of unseen
characters, their quarter turns being classes of their own, by the nearest class mean and, of
several shots, by logistic regression; "cifar10" by a linear probe and nearest neighbours, and with
`--fine-tuning`, as SimCLR's preset has it, not frozen by training on 1, 10 and 100 % of the labels.
Beside them stand the features of the same net as it is initialised, fine-tuned likewise, raw
pixels, and the same net trained with labels for about as many multiplications. Writes to the run's
folder: `result.json`, `learning_curve.png`, `neighbours.png`, `map.png`, of methods that compare
views `views.png`, of those that draw or see pairs of patches `drawings.png`, the parameters of the
net under `net/`, metrics, checkpoints.

Results, with command, machine, minutes and seeds, stand in experiments/README.md.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
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
    make_views,
    mild_view,
    view_of,
)
from experiments.representation_method import Features, Method, goes_by_batch, rate_of
from experiments.representation_methods import METHODS
from metagen_jax.evaluation.fine_tuning import fine_tune
from metagen_jax.evaluation.probes import extract_features, fingerprint
from metagen_jax.gradients import gradients, task_keys
from metagen_jax.parallel import data_parallel, replicate
from metagen_jax.runs.checkpoints import BEST, save_checkpoint, saved_steps, to_host
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.training import FitResult, fit, init_state, train_step
from metagen_jax.types import Batch, LossFn, Params, PRNGKey

# Images by which nets are initialised; of training, by which a norm by the batch takes statistics;
# and of the test, two views of which are compared.
NUM_INIT, NUM_REFERENCE, NUM_ALIGNED = 2, 256, 500
FRACTIONS = (0.01, 0.1, 1.0)


def train(config: Config, method: Method, part: Part, params: Params) -> FitResult:
    """Learns features without labels."""

    def sample(key: PRNGKey, data: tuple[Array, Array]) -> Array:
        return draw_batch(key, data, batch_size=config.batch_size)[0]

    optimizer = method.optimizer(_adam(config, config.steps))
    return _fit(config, method.grad_fn, optimizer, sample, part, params, method=method)


def train_supervised(config: Config, method: Method, part: Part, params: Params) -> FitResult:
    """The same net by classification of views of the same kind; `method` are its parameters."""
    logits, params = with_classes(config, method, part, params)
    sample = functools.partial(draw_batch, batch_size=config.batch_size)
    loss_fn = _of_views(config, cross_entropy_loss(logits))
    optimizer = _adam(config, _supervised_steps(config))
    return _fit(config, gradients(loss_fn), optimizer, sample, part, params)


def with_classes(
    config: Config, method: Method, part: Part, params: Params
) -> tuple[Callable[[Params, Array], Array], Params]:
    """Logits of a new linear map of the features, and its parameters beside the method's."""
    head = nn.Dense(int(part.labels.max()) + 1)

    def logits(params: Params, images: Array) -> Array:
        outputs = head.apply(params["classes"], method.features(params["method"], images))
        assert isinstance(outputs, jax.Array)
        return outputs

    of_one = functools.partial(method.features, num_reference=1)
    width = jax.eval_shape(of_one, params, _first(part)).shape[1]
    head_key = jax.random.fold_in(jax.random.key(config.seed), 2)
    return logits, {"method": params, "classes": head.init(head_key, jnp.zeros((1, width)))}


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
        num_steps=_supervised_steps(config) if method is None else config.steps,
        run_dir=config.run_dir / "supervised" if method is None else config.run_dir,
        resume=config.resume,
    )


def _supervised_steps(config: Config) -> int:
    return max(1, round(config.supervised_factor * config.steps))


def _adam(config: Config, steps: int) -> optax.GradientTransformation:
    return optax.adamw(rate_of(config, steps=steps), weight_decay=config.weight_decay)


def _of_views(config: Config, loss_fn: LossFn) -> LossFn:
    """The loss of one view of each image."""
    view = view_of(config)

    def of_views(params: Params, batch: Batch, key: Array):
        images, labels = batch
        keys = task_keys(key, len(images)) if key.ndim == 0 else key
        return loss_fn(params, (jax.vmap(view)(keys, images), labels), keys[0])

    return of_views


def judge(
    config: Config, features: Features, params: Params, splits: Splits
) -> tuple[dict[str, Any], np.ndarray]:
    """The numbers of frozen features, and the features of the test images."""
    extract = functools.partial(features_of, config, features, splits.train, params)
    test = extract(splits.test.images)
    if is_characters(config):
        numbers = report.judge_by_few_shots(config, splits.test, test)
    else:
        train, val = ((extract(part.images), part.labels) for part in splits[:2])
        numbers = report.judge_by_probes(train, val, (test, splits.test.labels))
    whole = replace(config, view_size=None)
    some = jnp.asarray(splits.test.images[:NUM_ALIGNED]) / 255.0
    views = make_views(whole, some, num_views=2)
    pair = [extract(255 * np.asarray(views[:, i])) for i in range(2)]
    return {**numbers, **report.measure(test, *pair)}, test


def features_of(
    config: Config, features: Features, train: Part, params: Params, images: np.ndarray
) -> np.ndarray:
    """Features of images from 0 to 255, each from itself and, if need be, images of training."""
    num_reference = NUM_REFERENCE if goes_by_batch(config) else 0
    order = np.random.default_rng(0).permutation(len(train.images))
    reference = jnp.asarray(train.images[order[:num_reference]])
    return extract_features(_of_bytes(features), (params, reference), images)


# One function for all images of a kind of features, which is compiled once.
@functools.cache
def _of_bytes(features: Features) -> Callable[[tuple[Params, Array], Array], Array]:
    def of_bytes(params_and_reference: tuple[Params, Array], images: Array) -> Array:
        params, reference = params_and_reference
        both = jnp.concatenate([reference, images]) / 255.0
        return features(params, both, num_reference=len(reference) or None)[len(reference) :]

    return of_bytes


def tune(config: Config, method: Method, params: Params, splits: Splits) -> dict[str, Any]:
    """Accuracies of the whole net, trained on shares of the labels."""
    logits, params = with_classes(config, method, splits.train, params)

    def of_bytes(params: Params, images: Array) -> Array:
        return logits(params, images / 255.0)

    numbers = {}
    for fraction in FRACTIONS:
        tuned = fine_tune(
            of_bytes,
            params,
            splits.train,
            splits.val,
            splits.test,
            fraction=fraction,
            key=jax.random.fold_in(jax.random.key(config.seed), 3),
            num_steps=config.tuning_steps,
            augment=mild_view,
        )
        numbers[f"tuned_{round(100 * fraction)}_percent"] = tuned.accuracy
    return numbers


def raw_pixels(params: Params, images: Array, num_reference: int | None = None) -> Array:
    """What there is without any net."""
    del params, num_reference
    return images.reshape(len(images), -1)


def judge_pixels(config: Config, splits: Splits) -> dict[str, Any]:
    """The numbers of raw pixels, the same for every seed."""
    print("judging raw pixels")
    return judge(config, raw_pixels, (), splits)[0]


def run_seed(config: Config, splits: Splits, of_pixels: dict[str, Any]) -> dict[str, Any]:
    """Trains, judges, prints the table, draws the pictures; gives the numbers by name."""
    method = METHODS[config.method](config, splits.train.images)
    init_key, _ = jax.random.split(jax.random.key(config.seed))
    start = jax.jit(method.init)(init_key, _first(splits.train))
    print(f"training by {config.method}")
    result = train(config, method, splits.train, start)
    params = result.best_params
    keep_net(config, method.net(params))
    print("training the same net with labels")
    of_labels = train_supervised(config, method, splits.train, start)
    seconds = round(result.train_seconds, 1), round(of_labels.train_seconds, 1)
    seen = config.steps * config.batch_size, _supervised_steps(config) * config.batch_size
    for name, num_images, took in zip((config.method, "labels"), seen, seconds, strict=True):
        print(f"{name}: {num_images:,} images in {took:.0f} s")
    print("judging frozen features")
    before = fingerprint(params)
    results, features = {"raw pixels": of_pixels}, {}
    for name, some in (
        ("random initialisation", start),
        (config.method, params),
        ("supervised", of_labels.best_params["method"]),
    ):
        results[name], features[name] = judge(config, method.features, some, splits)
    program.require((fingerprint(params) == before, "judging features has changed the net"))
    if config.fine_tuning:
        print("fine-tuning")
        for name, some in (("random initialisation", start), (config.method, params)):
            results[name] |= tune(config, method, some, splits)
    report.print_table(config, results)
    report.draw(config, method, params, splits, features[config.method])
    return {
        "num_parameters": sum(x.size for x in jax.tree.leaves(params)),
        "train_seconds": seconds[0],
        "images_seen": seen[0],
        "images_per_second": round(result.steps_per_second * config.batch_size, 1),
        "supervised_train_seconds": seconds[1],
        "supervised_images_seen": seen[1],
        "net": before,
        "features": results,
    }


def keep_net(config: Config, net: Params) -> None:
    """For other programs, which then need not know what else the method has trained."""
    folder = config.run_dir / "net" / BEST
    if not saved_steps(folder):
        save_checkpoint(folder / str(config.steps), to_host(net), {})


def main(config: Config) -> dict[str, Any]:
    """The run of one seed, or those of several and their means."""
    check(config)
    splits = load_splits(config)
    counts = " / ".join(f"{len(part.images):,}" for part in splits)
    print(f"{config.dataset}: {counts} images to learn from / to choose by / to test")
    if is_characters(config):
        report.check_tasks(config, splits.test)
    if config.seeds == 1:
        return run_seed(config, splits, judge_pixels(config, splits))
    runs = []
    for i in range(config.seeds):
        seed = config.seed + i
        print(f"seed {seed}")
        one = replace(config, seed=seed, seeds=1, run_dir=config.run_dir / f"seed{seed}")
        file = one.run_dir / program.RESULT
        if not (config.resume and file.exists()):
            program.prepare_run_dir(one)
            known = runs[0]["features"]["raw pixels"] if runs else judge_pixels(one, splits)
            program.write_result(one.run_dir, run_seed(one, splits, known), {})
        runs.append(json.loads(file.read_text(encoding="utf-8")))
    features = report.over_seeds([run["features"] for run in runs])
    report.print_table(config, features)
    return {"runs": runs, "features": features}


def _first(part: Part) -> Array:
    return jnp.asarray(part.images[:NUM_INIT]) / 255.0


if __name__ == "__main__":
    program.run("representation", main, PRESETS, default="glyphs", vary=with_method)
