"""Features of series and sounds without labels, and what they are worth when labels are few.

    python -m experiments.time_series                                          # embedded waves
    python -m experiments.time_series --preset ucr --data-dir DIR --method order_verification
    python -m experiments.time_series --preset digits --data-dir DIR           # spoken digits
    python -m experiments.time_series --preset new-speakers --data-dir DIR

Learns features by contrastive predictive coding, by the order of pieces or by the arrow of time,
from the training part of each set alone, and judges them frozen on the official test part by a
linear probe and by few shots. Beside them stand the series as they are by their nearest neighbour,
or of sounds log-mel statistics; the features of the same net as it is initialised; and the same net
trained with labels for as many steps. Writes to the run's folder: `result.json`, `accuracies.png`,
and for each set `learning_curve.png`, `examples.png`, `map.png`, metrics, checkpoints.

Results, with command, machine, minutes and seeds, stand in experiments/README.md.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from experiments import program
from experiments import time_series_report as report
from experiments.time_series_config import PRESETS, Config, DatasetName, check, with_method
from experiments.time_series_data import (
    Dataset,
    Part,
    draw_excerpts,
    load,
    longest,
    padded,
)
from experiments.time_series_methods import (
    METHODS,
    Method,
    Net,
    check_length,
    features,
    make_net,
    supervised,
)
from metagen_jax.evaluation.probes import extract_features, fingerprint
from metagen_jax.parallel import data_parallel, replicate
from metagen_jax.training import FitResult, fit, init_state, train_step
from metagen_jax.types import Params

# Sequences of which features are taken at once: sounds of a second are large.
BLOCK = 32


def train(
    config: Config,
    method: Method,
    part: Part,
    labels: np.ndarray,
    params: Params,
    *,
    length: int,
    run_dir: Path,
) -> FitResult:
    """Trains on excerpts of so many entries."""
    optimizer = optax.adam(optax.cosine_decay_schedule(config.rate, config.steps))
    _, train_key = jax.random.split(jax.random.key(config.seed))
    devices = program.devices_for(config.num_devices, config.batch_size)
    state = init_state(params, optimizer, train_key)
    state, data = replicate((state, (part.sequences, labels)), devices=devices)
    return fit(
        train_step(
            data_parallel(method.grad_fn, devices=devices),
            optimizer,
            functools.partial(draw_excerpts, count=config.batch_size, length=length),
        ),
        state,
        data,
        num_steps=config.steps,
        run_dir=run_dir,
        resume=config.resume,
    )


def make_extract(net: Net, length: int) -> Callable[[Params, Part], np.ndarray]:
    """`extract(params, part)`: frozen features of every sequence, of its first entries."""

    def of_rows(of: tuple[Params, Array, Array], rows: Array) -> Array:
        params, values, lengths = of
        return features(net, params, (values[rows], lengths[rows]))

    def extract(params: Params, part: Part) -> np.ndarray:
        values, lengths = padded(part.sequences, length)
        data = params, jnp.asarray(values), jnp.asarray(lengths)
        return extract_features(of_rows, data, np.arange(len(values)), block_size=BLOCK)

    return extract


def of_parts(data: Dataset, of: Callable[[Part], np.ndarray]) -> report.Features:
    """What `of` gives of each part, of parts that are the same one once."""
    once: dict[int, np.ndarray] = {}
    parts = {name: part for name, part in data._asdict().items() if isinstance(part, Part)}
    for part in parts.values():
        if id(part) not in once:
            once[id(part)] = of(part)
    return {name: once[id(part)] for name, part in parts.items()}


def learn_and_judge(
    config: Config, name: DatasetName, data: Dataset
) -> tuple[report.Judged, dict[str, Any]]:
    """All that is done with one set: accuracies, and numbers of the training."""
    whole, length = longest(config, name, data.learned.sequences)
    net = make_net(config, name, length)
    method, extract = METHODS[config.method](config, net), make_extract(net, whole)
    init_key, _ = jax.random.split(jax.random.key(config.seed))
    first = jnp.zeros((1, length, data.learned.sequences.values.shape[1]))
    start = jax.jit(method.init)(init_key, first)
    folder = config.run_dir / name
    any_labels = next(iter(data.learned.labels.values()))
    print(f"{name}: training by {config.method}")
    result = train(config, method, data.learned, any_labels, start, length=length, run_dir=folder)
    before = fingerprint(result.best_params)
    kinds = {
        report.RAW: of_parts(data, lambda part: part.raw),
        "random initialisation": of_parts(data, lambda part: extract(start, part)),
        config.method: of_parts(data, lambda part: extract(result.best_params, part)),
    }
    judged: report.Judged = {}
    for target, labels in data.learned.labels.items():
        print(f"{name}: training the same net with labels, {target}")
        with_labels = supervised(config, net, int(labels.max()) + 1)
        params = train(
            config,
            with_labels,
            data.learned,
            labels,
            jax.jit(with_labels.init)(init_key, first),
            length=length,
            run_dir=folder / f"supervised-{target}",
        ).best_params
        of_labels = of_parts(data, lambda part, params=params: extract(params, part))
        print(f"{name}: judging frozen features, {target}")
        judged |= report.judge(config, name, data, target, {**kinds, "supervised": of_labels})
    program.require(
        (fingerprint(result.best_params) == before, "judging features has changed the net")
    )
    report.draw_set(config, name, data, kinds[config.method]["test"])
    return judged, {
        "num_parameters": sum(x.size for x in jax.tree.leaves(result.best_params)),
        "train_seconds": round(result.train_seconds, 1),
        "excerpts_per_second": round(result.steps_per_second * config.batch_size, 1),
        "net": before,
    }


def main(config: Config) -> dict[str, Any]:
    """Trains, judges, prints the table, draws the pictures; gives the numbers by name."""
    check(config)
    sets: dict[DatasetName, Dataset] = {name: load(config, name) for name in config.datasets}
    for name, data in sets.items():
        check_length(config, name, longest(config, name, data.learned.sequences)[1])
    judged: report.Judged = {}
    trainings = {}
    for name, data in sets.items():
        counts = " / ".join(f"{len(part.raw):,}" for part in (data.learned, data.train, data.test))
        print(f"{name}: {counts} sequences to learn from / to fit probes to / to test")
        more, trainings[name] = learn_and_judge(config, name, data)
        judged |= more
    numbers = report.summarise(config, judged)
    report.print_table(config, sets, judged, numbers["average_over_sets"])
    report.draw_accuracies(config, judged)
    return {**numbers, "trainings": trainings}


if __name__ == "__main__":
    program.run("time_series", main, PRESETS, default="waves", vary=with_method)
