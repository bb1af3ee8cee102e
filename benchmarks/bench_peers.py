"""Our outer steps against those of PyTorch's libraries and of jax-meta.

    python -m benchmarks.bench_peers [--rows 5-steps 1-step ...] [--float64] [--smoke]

The same weights, tasks and mathematics for all. First losses and directions are compared: in
float32 losses to 1e-3 and directions to 3e-2 of their norm (ReLU's kinks; `--float64` compares to
1e-8 and times nothing). Then all variants are timed in turns in one process, and the table holds
medians. Ours run on one device a core, in the chunks that `mean_over_tasks` chooses. Peers that are
not installed are left out (README.md says how to install them). Writes
`benchmarks/results/bench_peers_ROW.json`.
"""

import argparse

from benchmarks import harness

if __name__ == "__main__":
    harness.one_device_per_core()

import dataclasses
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.flax_conv4 import FlaxConv4
from benchmarks.rows import ROWS, Row, make_example, make_net, small
from metagen_jax.gradients import gradients, mean_over_tasks
from metagen_jax.meta.maml import maml_loss
from metagen_jax.meta.metric import prototypical_loss
from metagen_jax.meta.reptile import reptile_gradients
from metagen_jax.parallel import data_parallel
from metagen_jax.supervised import cross_entropy_loss, squared_error_loss
from metagen_jax.types import Episode, GradFn, Metrics, Params

PACKAGES = ("torch", "higher", "torchopt", "learn2learn", "jax_meta")
OURS = "metagen_jax"
# One step of a grouped convolution can take a minute; it is not called again.
PATIENCE = 20.0

Call = Callable[[], tuple[Params, Metrics]]


class Compiled(NamedTuple):
    """A call of a compiled step, and what compiling it took."""

    call: Call
    timing: harness.Timing


def our_steps(row: Row) -> dict[str, GradFn]:
    """Our ways of taking the step: as a user gets it, and saving all for the outer gradient."""
    net = make_net(row)
    make_loss = squared_error_loss if row.net == "mlp" else cross_entropy_loss
    loss_fn, sgd = make_loss(net.apply), optax.sgd(row.rate)
    if row.learner == "prototypical":
        one = {OURS: gradients(prototypical_loss(net.apply, num_ways=row.ways))}
    elif row.learner == "reptile":

        def batch_at(support, step, key):
            del key
            start, size = step * row.inner_batch, row.inner_batch
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), support)

        learner = functools.partial(reptile_gradients, num_steps=row.num_steps, batch_at=batch_at)
        one = {OURS: learner(loss_fn, inner_optimizer=sgd)}
    else:
        learner = functools.partial(maml_loss, loss_fn, inner_optimizer=sgd)
        one = {
            OURS: gradients(learner(num_steps=row.num_steps)),
            f"{OURS}, reverse": gradients(learner(num_steps=row.num_steps, gradient="reverse")),
        }
    return {name: data_parallel(mean_over_tasks(grad_fn)) for name, grad_fn in one.items()}


def jax_meta_step(row: Row) -> GradFn:
    """The gradient of jax-meta's MAML, whose tasks are all vmapped."""
    metalearners: Any = importlib.import_module("jax_meta.metalearners")
    net = FlaxConv4(row.ways, row.num_filters, row.net == "strided")

    class Model(NamedTuple):
        init: Callable = net.init
        apply: Callable = staticmethod(lambda params, state, x: (net.apply(params, x), state))

    class Part(NamedTuple):
        inputs: jax.Array
        targets: jax.Array

    maml = metalearners.MAML(Model(), num_steps=row.num_steps, alpha=row.rate)

    def grad_fn(params: Params, batch: Episode, key: jax.Array) -> tuple[Params, Metrics]:
        del key
        support, query = Part(*batch.support), Part(*batch.query)
        loss_fn = jax.value_and_grad(maml.batch_outer_loss, has_aux=True)
        (loss, _), direction = loss_fn(params, {}, support, query, ())
        return direction, {"loss": loss}

    return grad_fn


def compile_step(grad_fn: GradFn, params: Params, tasks: Episode) -> Compiled:
    """A compiled step on these tasks."""
    key = jax.random.key(0)
    program, timing = harness.compile_timed(grad_fn, params, tasks, key)
    return Compiled(functools.partial(program, params, tasks, key), timing)


def make_variants(row: Row, params: Params, tasks: Episode) -> dict[str, Compiled]:
    """All steps of a row that can be taken here, ours first."""
    variants = {
        name: compile_step(grad_fn, params, tasks) for name, grad_fn in our_steps(row).items()
    }
    if importlib.util.find_spec("torch"):
        peers: Any = importlib.import_module("benchmarks.peers")
        for name, step in peers.make_steps(row, params, tasks).items():
            variants[name] = Compiled(step, harness.Timing([], None, None))
    # At full resolution a step of its grouped convolutions takes many minutes.
    if row.learner == "maml" and row.net == "strided" and importlib.util.find_spec("jax_meta"):
        variants["jax-meta"] = compile_step(jax_meta_step(row), params, tasks)
    return variants


def results_of(variants: dict[str, Compiled], row: Row, params: Params) -> dict[str, Any]:
    """Direction and loss of each variant, in our layout."""

    def as_ours(result):
        if not isinstance(result[1], dict) or "loss" not in result[1]:
            peers: Any = importlib.import_module("benchmarks.peers")
            loss, tensors = result
            turned = row.net == "strided"
            return peers.params_from_torch(tensors, params, turned), {"loss": loss.item()}
        return jax.device_get(result)

    return {name: as_ours(variant.call()) for name, variant in variants.items()}


def run_row(name: str, row: Row, *, float64: bool, keep: bool) -> None:
    """Compares, times, prints and keeps one row."""
    params, tasks = make_example(row, jnp.float64 if float64 else jnp.float32)
    variants = make_variants(row, params, tasks)
    tolerance, loss_tolerance = (1e-8, 1e-10) if float64 else (3e-2, 1e-3)
    results = results_of(variants, row, params)
    difference = harness.check_equal(results, tolerance=tolerance, loss_tolerance=loss_tolerance)
    print(f"\n{name}: {len(variants)} variants, directions agree to {difference:.1e} of their norm")
    if float64:
        return
    timings = {variant: compiled.timing for variant, compiled in variants.items()}
    calls = {variant: compiled.call for variant, compiled in variants.items()}
    harness.time_in_turns(calls, timings, rounds=row.rounds, patience=PATIENCE)
    harness.print_timings(timings, per_step=row.num_tasks, unit="tasks", best=OURS)
    numbers = {**harness.as_numbers(timings), "relative_difference": difference}
    for whose, against in ("asked", row.against), ("best_peer", ""):
        counted = {
            variant: timing.median
            for variant, timing in timings.items()
            if not variant.startswith(OURS) and variant.startswith(against)
        }
        if counted:
            best = min(counted, key=lambda variant: counted[variant])
            ratio = counted[best] / timings[OURS].median
            note = f"asked: {row.asked}" if whose == "asked" else "the fastest of all peers"
            print(f"{ratio:.2f} times as fast as {best}; {note}")
            numbers[whose] = {"peer": best, "times_as_fast": ratio}
    numbers["asked"] = {"at_least": row.asked, **numbers.get("asked", {})}
    if keep:
        peers = {p: _version(p) for p in PACKAGES}
        about = {"row": dataclasses.asdict(row), "peer_versions": peers}
        if importlib.util.find_spec("torch"):
            torch: Any = importlib.import_module("torch")
            about["torch_threads"] = torch.get_num_threads()
        harness.write_result(f"bench_peers_{name}", {**numbers, **about})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--float64", action="store_true", help="compare in float64, time nothing")
    parser.add_argument("--smoke", action="store_true", help="small nets and few tasks, one round")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", options.float64)
    missing = [package for package in PACKAGES if not importlib.util.find_spec(package)]
    if missing:
        print(f"not installed, and left out: {', '.join(missing)}")
    for name in options.rows:
        row = small(ROWS[name]) if options.smoke else ROWS[name]
        run_row(name, row, float64=options.float64, keep=not options.smoke)


if __name__ == "__main__":
    main()
