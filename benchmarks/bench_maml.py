"""The second-order MAML step against the same mathematics on `flax.linen.Conv`.

    python -m benchmarks.bench_maml [--smoke]

Conv4-64 strided, 5-way 1-shot, 5 queries a class, 32 tasks, 1 inner step, float32. First all
variants must give the same loss and meta-gradient; then they are timed in turns, several rounds,
and the table holds medians. Writes `benchmarks/results/bench_maml.json`.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

from experiments.program import provenance
from metagen_jax.gradients import gradients, mean_over_tasks
from metagen_jax.meta.maml import maml_loss
from metagen_jax.nets.conv4 import BatchNorm, Conv4
from metagen_jax.parallel import data_parallel
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.types import Episode, GradFn


class FlaxConv4(nn.Module):
    """`Conv4(5)` with `flax.linen.Conv`, same parameters."""

    num_filters: int

    @nn.compact
    def __call__(self, x):
        for block in range(4):
            x = nn.Conv(self.num_filters, (3, 3), strides=(2, 2), name=f"conv{block}")(x)
            x = nn.relu(BatchNorm(name=f"norm{block}")(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


def make_tasks(num_tasks: int, num_queries: int) -> Episode:
    """Random images in 5-way 1-shot episodes."""
    rng = np.random.default_rng(0)

    def part(shots: int):
        images = rng.random((num_tasks, 5 * shots, 28, 28, 1), np.float32)
        return jnp.asarray(images), jnp.tile(jnp.repeat(jnp.arange(5), shots), (num_tasks, 1))

    return Episode(part(1), part(num_queries))


def variants(num_filters: int) -> dict[str, GradFn]:
    """Every way of taking the step, by name."""

    def meta_gradient(apply, chunk: int | None) -> GradFn:
        loss_fn = maml_loss(cross_entropy_loss(apply), inner_optimizer=optax.sgd(0.4), num_steps=1)
        return mean_over_tasks(gradients(loss_fn), chunk=chunk)

    ours, flaxes = Conv4(5, num_filters).apply, FlaxConv4(num_filters).apply
    one_device = jax.devices()[:1]
    return {
        f"metagen_jax, one task at a time, {jax.device_count()} devices": data_parallel(
            meta_gradient(ours, 1)
        ),
        "metagen_jax, one task at a time": data_parallel(
            meta_gradient(ours, 1), devices=one_device
        ),
        "metagen_jax, vmap": data_parallel(meta_gradient(ours, None), devices=one_device),
        "flax.linen.Conv, one task at a time": data_parallel(
            meta_gradient(flaxes, 1), devices=one_device
        ),
        f"flax.linen.Conv, one task at a time, {jax.device_count()} devices": data_parallel(
            meta_gradient(flaxes, 1)
        ),
        "flax.linen.Conv, vmap": data_parallel(meta_gradient(flaxes, None), devices=one_device),
    }


def check_equal(steps: dict[str, Callable], params, batch: Episode, key) -> float:
    """The largest distance of a meta-gradient from the first variant's, relative to its norm."""
    results = [jax.device_get(step(params, batch, key)) for step in steps.values()]
    (reference, metrics), *others = results
    worst = 0.0
    for direction, other_metrics in others:
        np.testing.assert_allclose(other_metrics["loss"], metrics["loss"], rtol=1e-4)
        difference = jax.tree.map(jnp.subtract, direction, reference)
        worst = max(worst, float(optax.global_norm(difference) / optax.global_norm(reference)))
    # At ReLU's kink any two implementations differ in float32 (tests compare in float64).
    assert worst < 2e-2, f"the meta-gradients differ by {worst:.1e} of their norm"
    return worst


def seconds(step: Callable, *arguments) -> float:
    start = time.perf_counter()
    jax.block_until_ready(step(*arguments))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few filters and tasks, one round")
    smoke = parser.parse_args().smoke
    num_tasks, num_filters, rounds = (4, 8, 1) if smoke else (32, 64, 7)

    batch, key = make_tasks(num_tasks, num_queries=1 if smoke else 5), jax.random.key(0)
    params = Conv4(5, num_filters).init(key, batch.support[0][0])
    steps, compile_seconds, temporaries = {}, {}, {}
    for name, grad_fn in variants(num_filters).items():
        start = time.perf_counter()
        steps[name] = jax.jit(grad_fn).lower(params, batch, key).compile()
        compile_seconds[name] = time.perf_counter() - start
        temporaries[name] = steps[name].memory_analysis().temp_size_in_bytes / 2**20
    difference = check_equal(steps, params, batch, key)
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, params, batch, key))
    medians = {name: statistics.median(values) for name, values in times.items()}
    best_flax = min(value for name, value in medians.items() if name.startswith("flax"))

    print(f"meta-gradients agree to {difference:.1e} of their norm; medians of {rounds} rounds")
    print(
        f"{'variant':50} {'step':>8} {'tasks/s':>8} {'compile':>8} {'temporaries':>11} {'ratio':>6}"
    )
    for name, median in medians.items():
        print(
            f"{name:50} {median:6.3f} s {num_tasks / median:8.1f} {compile_seconds[name]:6.1f} s "
            f"{temporaries[name]:7.0f} MiB {best_flax / median:6.2f}"
        )
    print("ratio: how many times as fast as the best of the flax.linen.Conv variants")
    if not smoke:
        result = {
            "medians_seconds": medians,
            "all_seconds": times,
            "compile_seconds": compile_seconds,
            "temporaries_mib": temporaries,
            "num_tasks": num_tasks,
            "relative_difference": difference,
            **provenance(),
        }
        path = Path(__file__).parent / "results" / "bench_maml.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
