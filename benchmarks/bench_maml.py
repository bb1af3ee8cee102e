"""The second-order MAML step against the same mathematics on `flax.linen.Conv`.

    python -m benchmarks.bench_maml [--smoke]

Conv4-64 strided, 5-way 1-shot, 5 queries a class, 32 tasks, 1 inner step, float32. First all
variants must give the same loss and meta-gradient; then they are timed in turns, several rounds,
and the table holds medians. Writes `benchmarks/results/bench_maml.json`.
"""

import argparse

from benchmarks import harness

if __name__ == "__main__":
    harness.one_device_per_core()

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few filters and tasks, one round")
    smoke = parser.parse_args().smoke
    num_tasks, num_filters, rounds = (4, 8, 1) if smoke else (32, 64, 7)

    batch, key = make_tasks(num_tasks, num_queries=1 if smoke else 5), jax.random.key(0)
    params = Conv4(5, num_filters).init(key, batch.support[0][0])
    timings = harness.time_compiled(variants(num_filters), params, batch, key, rounds=rounds)
    difference = timings.difference
    print(f"meta-gradients agree to {difference:.1e} of their norm; medians of {rounds} rounds")
    harness.print_timings(timings.of, per_step=num_tasks, unit="tasks", best="flax")
    if not smoke:
        numbers = harness.as_numbers(timings.of)
        harness.write_result(
            "bench_maml", {**numbers, "num_tasks": num_tasks, "relative_difference": difference}
        )


if __name__ == "__main__":
    main()
