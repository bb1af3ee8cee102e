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

import dataclasses

import jax
import jax.numpy as jnp
import optax

from benchmarks.flax_conv4 import FlaxConv4
from benchmarks.rows import Row, make_example, make_net, small
from metagen_jax.gradients import gradients, mean_over_tasks
from metagen_jax.meta.maml import maml_loss
from metagen_jax.parallel import data_parallel
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.types import GradFn

ROW = Row(asked=5, num_steps=1, queries=5, rate=0.4, rounds=7)


def variants(row: Row) -> dict[str, GradFn]:
    """Every way of taking the step, by name."""

    def meta_gradient(apply, chunk: int | None) -> GradFn:
        loss_fn = maml_loss(
            cross_entropy_loss(apply), inner_optimizer=optax.sgd(row.rate), num_steps=row.num_steps
        )
        return mean_over_tasks(gradients(loss_fn), chunk=chunk)

    ours = make_net(row).apply
    flaxes = FlaxConv4(row.ways, row.num_filters, strided=True).apply
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
    row = small(ROW) if smoke else ROW

    params, batch = make_example(row, jnp.float32)
    key = jax.random.key(0)
    timings = harness.time_compiled(variants(row), params, batch, key, rounds=row.rounds)
    difference = timings.difference
    print(f"meta-gradients agree to {difference:.1e} of their norm; medians of {row.rounds} rounds")
    harness.print_timings(timings.of, per_step=row.num_tasks, unit="tasks", best="flax")
    if not smoke:
        about = {"row": dataclasses.asdict(row), "relative_difference": difference}
        harness.write_result("bench_maml", {**harness.as_numbers(timings.of), **about})


if __name__ == "__main__":
    main()
