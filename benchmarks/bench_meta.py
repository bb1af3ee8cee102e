"""What an outer step costs, by itself: memory, share of the peak, devices, compilation, the loop.

    python -m benchmarks.bench_meta [--parts memory modes peak ...] [--smoke]

Second-order MAML of Conv4-64, strided, 5-way 1-shot, 15 queries a class, 32 tasks, float32. Each
part first sees to it that what it compares gives the same numbers. Writes
`benchmarks/results/bench_meta_PART.json`.

memory   temporaries by the compiler's count, by inner steps and mode of the outer gradient
modes    time and temporaries by mode, of Conv4 and of layers that are scanned
peak     FLOPs of the step, on paper (`benchmarks.work`), over those of matrix products on all cores
chunks   time by chunk, for nets of several sizes: the ground of `chunk="auto"`
devices  one device a core over the best schedule on one device
compile  seconds until the step is ready, in a new process, and again with the persistent cache
loop     `fit`, with sampling, logs and checkpoints, over the compiled step on episodes that it has;
         with one inner step and 1 query a class, of which the rest has the largest share
"""

import argparse

from benchmarks import harness

if __name__ == "__main__":
    harness.one_device_per_core()

import dataclasses
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.bench_episodes import make_data, sample
from benchmarks.rows import ROWS, Row, make_example, make_net, small
from benchmarks.work import outer_step
from metagen_jax.chunks import Chunk
from metagen_jax.gradients import gradients, mean_over_tasks, task_keys
from metagen_jax.meta.adapt import Gradient
from metagen_jax.meta.maml import maml_loss
from metagen_jax.parallel import data_parallel, map_over_tasks, replicate
from metagen_jax.supervised import cross_entropy_loss, squared_error_loss
from metagen_jax.training import fit, init_state, train_step
from metagen_jax.types import Episode, GradFn

MODES: tuple[Gradient, ...] = ("reverse", "remat", "mixed")
STEPS = (1, 5, 20)
CHUNKS = (1, 4, 16, 64, None)
ROW, ONE_STEP = ROWS["5-steps"], ROWS["1-step"]


def meta_gradient(row: Row, *, gradient: Gradient = "remat", chunk: Chunk | None) -> GradFn:
    """The outer step of a row on one device."""
    make_loss = squared_error_loss if row.net == "mlp" else cross_entropy_loss
    loss_fn = maml_loss(
        make_loss(make_net(row).apply),
        inner_optimizer=optax.sgd(row.rate),
        num_steps=row.num_steps,
        gradient=gradient,
    )
    return mean_over_tasks(gradients(loss_fn), chunk=chunk)


def memory(shrink) -> dict[str, Any]:
    """Temporaries in MiB of one task after another, by mode and inner steps; nothing is run."""
    row, steps = shrink(ROW), STEPS[:1] if shrink is small else STEPS
    params, tasks = make_example(dataclasses.replace(row, num_tasks=2), jnp.float32)
    table: dict[str, dict[int, float]] = {}
    for mode in MODES:
        table[mode] = {}
        for num_steps in steps:
            grad_fn = meta_gradient(
                dataclasses.replace(row, num_steps=num_steps), gradient=mode, chunk=1
            )
            _, timing = harness.compile_timed(grad_fn, params, tasks, jax.random.key(0))
            table[mode][num_steps] = timing.temporaries or 0.0
    print(f"temporaries in MiB after {', '.join(map(str, steps))} inner steps, last over first:")
    growth = {mode: each[steps[-1]] / each[steps[0]] for mode, each in table.items()}
    for mode, each in table.items():
        print(f"{mode:8} {'  '.join(f'{x:7.1f}' for x in each.values())} {growth[mode]:7.2f}")
    return {"temporaries_mib": table, "growth": growth, "asked_growth_of_mixed": 1.3}


def modes(shrink) -> dict[str, Any]:
    """Seconds and temporaries by mode of the outer gradient, one task after another.

    Of Conv4, and of a residual MLP whose layers are one scanned layer: there a gradient keeps what
    each layer computes, and the gradient of it would keep that of the backward pass too.
    """
    depth, width, tasks, rounds = (3, 8, 2, 1) if shrink is small else (32, 256, 8, 7)

    def scanned(params, images):
        hidden, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), images, params)
        return hidden.mean(-1, keepdims=True)

    keys = jax.random.split(jax.random.key(0), 2)
    kernels = 0.1 / width**0.5 * jax.random.normal(keys[0], (depth, width, width))
    inputs = jax.random.normal(keys[1], (tasks, 64, width))
    part = inputs, inputs.mean(-1, keepdims=True) ** 2
    row = dataclasses.replace(shrink(ROW), num_tasks=tasks)
    examples: dict[str, tuple[Any, ...]] = {
        "Conv4": (make_net(row).apply, cross_entropy_loss, *make_example(row, jnp.float32)),
        "scanned layers": (scanned, squared_error_loss, kernels, Episode(part, part)),
    }
    if shrink is small:
        del examples["Conv4"]  # `memory` compiles it in all modes.
    table = {}
    for name, (apply, make_loss, params, batch) in examples.items():
        learner = functools.partial(
            maml_loss, make_loss(apply), inner_optimizer=optax.sgd(row.rate), num_steps=5
        )
        variants = {m: mean_over_tasks(gradients(learner(gradient=m)), chunk=1) for m in MODES}
        compared = harness.time_compiled(variants, params, batch, jax.random.key(0), rounds=rounds)
        print(f"{name}, {tasks} tasks, 5 inner steps:")
        harness.print_timings(compared.of, per_step=tasks, unit="tasks", best="reverse")
        table[name] = harness.as_numbers(compared.of)
    return table


def peak(shrink) -> dict[str, Any]:
    """The share of the peak of float32 matrix products that steps of 5 and 1 inner steps reach."""
    size, rounds = (64, 1) if shrink is small else (2048, 7)
    products = jnp.ones((jax.device_count(), size, size), jnp.float32)

    # The better of one product on each device, and one that all threads share.
    everywhere = map_over_tasks(lambda right, left: left @ right)
    programs: dict[str, Any] = {
        "products, one a device": (everywhere, products[0], products),
        "product of all threads": (lambda p, b: b @ p, products[0], products[0]),
    }
    rows = {"step, 5 inner steps": shrink(ROW), "step, 1 inner step": shrink(ONE_STEP)}
    for name, row in rows.items():
        example = make_example(row, jnp.float32)
        grad_fn = data_parallel(meta_gradient(row, chunk="auto"))
        programs[name] = (grad_fn, *example, jax.random.key(0))
    calls, timings = {}, {}
    for name, (function, *arguments) in programs.items():
        program, timings[name] = harness.compile_timed(function, *arguments)
        calls[name] = functools.partial(program, *arguments)
        jax.block_until_ready(calls[name]())
    harness.time_in_turns(calls, timings, rounds=rounds)
    flops = {
        "products, one a device": jax.device_count() * 2 * size**3,
        "product of all threads": 2 * size**3,
        **{name: outer_step(row).flops for name, row in rows.items()},
    }
    rates = {name: flops[name] / timings[name].median for name in programs}
    highest = max(rate for name, rate in rates.items() if name.startswith("product"))
    for name, rate in rates.items():
        print(f"{name:24} {rate / 1e9:8.1f} GFLOP/s {100 * rate / highest:6.1f} % of the peak")
    shares = {name: rates[name] / highest for name in rows}
    return {"flops_per_second": rates, "shares": shares, "asked": 0.5}


def chunks(shrink) -> dict[str, Any]:
    """Seconds a step by chunk, over one device a core."""
    rows = {
        "MLP of 40": dataclasses.replace(ROWS["sinusoid"], num_tasks=512),
        "MLP of 128": dataclasses.replace(
            ROWS["sinusoid"], num_tasks=128, hidden_sizes=(128, 128), rate=0.001
        ),
        "Conv4-8": dataclasses.replace(ONE_STEP, num_filters=8, queries=1),
        "Conv4-64": ONE_STEP,
    }
    if shrink is small:
        rows = {name: small(row) for name, row in rows.items() if name.startswith("MLP of 40")}
    table = {}
    for name, row in rows.items():
        params, tasks = make_example(row, jnp.float32)
        each = row.num_tasks // jax.device_count()
        sizes = [c for c in CHUNKS if c is None or c < each]
        variants = {
            f"chunks of {c or 'all'}": data_parallel(meta_gradient(row, chunk=c)) for c in sizes
        } | {"auto": data_parallel(meta_gradient(row, chunk="auto"))}
        compared = harness.time_compiled(
            variants, params, tasks, jax.random.key(0), rounds=1 if shrink is small else 5
        )
        print(f"{name}, {row.num_tasks} tasks, {row.num_steps} inner steps:")
        harness.print_timings(compared.of, per_step=row.num_tasks, unit="tasks", best="auto")
        table[name] = harness.as_numbers(compared.of)
    return table


def devices(shrink) -> dict[str, Any]:
    """The same program over one device a core and on one, in its best chunks."""
    row, one = shrink(ROW), jax.devices()[:1]
    variants = {f"{jax.device_count()} devices": data_parallel(meta_gradient(row, chunk="auto"))}
    for chunk in (None,) if shrink is small else (1, 4, 16, None):
        name = f"one device, chunks of {chunk or 'all'}"
        variants[name] = data_parallel(meta_gradient(row, chunk=chunk), devices=one)
    example = make_example(row, jnp.float32)
    rounds = 1 if shrink is small else 9
    compared = harness.time_compiled(variants, *example, jax.random.key(0), rounds=rounds)
    harness.print_timings(compared.of, per_step=row.num_tasks, unit="tasks", best="one")
    best = min(t.median for name, t in compared.of.items() if name.startswith("one"))
    gain = best / compared.of[f"{jax.device_count()} devices"].median
    return {**harness.as_numbers(compared.of), "gain": gain, "asked": 1.4}


def compile_once(cache: str, shrink) -> None:
    """Prints the seconds until the step is ready, with a persistent cache in that folder."""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    row = shrink(ROW)
    grad_fn = data_parallel(meta_gradient(row, chunk="auto"))
    arguments = (*make_example(row, jnp.float32), jax.random.key(0))
    jax.block_until_ready(arguments[0])
    _, timing = harness.compile_timed(grad_fn, *arguments)
    print(timing.compile_seconds)


def compilation(shrink) -> dict[str, Any]:
    """Tracing and compiling the step in a new process, then in another with the cache it left."""
    smoke = ["--smoke"] if shrink is small else []
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.bench_meta", "--compile-once", cache, *smoke]
        first, again = (
            float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(2)
        )
        assert any(Path(cache).iterdir()), "nothing was cached"
    print(f"ready after {first:.2f} s, and after {again:.2f} s with the persistent cache")
    return {"first_seconds": first, "cached_seconds": again, "asked": {"first": 8, "cached": 2}}


def loop(shrink) -> dict[str, Any]:
    """Seconds a step of `fit`, over those of the compiled step alone, on episodes that it has."""
    row = shrink(dataclasses.replace(ONE_STEP, queries=1))
    rounds, steps = (1, 3) if shrink is small else (5, 300)
    row = dataclasses.replace(row, ways=5)
    data = make_data(10 if shrink is small else 1028)
    grad_fn = data_parallel(meta_gradient(row, chunk="auto"))
    optimizer = optax.adam(1e-3)

    def draw(key, data):
        episodes = jax.vmap(sample, (0, None))(task_keys(key, row.num_tasks), data)
        return jax.tree.map(
            lambda x: x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x, episodes
        )

    bare, whole = (train_step(grad_fn, optimizer, s) for s in (lambda _, batch: batch, draw))
    params = make_net(row).init(jax.random.key(0), jnp.float32(data.examples[:1]))
    data, episodes = replicate((data, jax.jit(draw)(jax.random.key(2), data)))

    def fresh():
        return replicate(init_state(params, optimizer, jax.random.key(1)))

    def seconds_of_steps() -> float:
        state, latest = bare(fresh(), episodes)
        jax.block_until_ready(state)
        start = time.perf_counter()
        for _ in range(steps - 1):
            # Two steps in the queue, as in `fit`: with more, devices of a CPU wait for each other
            # in different steps, for ever.
            jax.block_until_ready(latest)
            state, latest = bare(state, episodes)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / (steps - 1)

    def seconds_of_loop() -> float:
        with tempfile.TemporaryDirectory() as run_dir:
            result = fit(
                whole,
                fresh(),
                data,
                num_steps=steps,
                run_dir=run_dir,
                save_every=max(1, steps // 2),  # Every 15 s; the default is once a minute.
                progress=False,
            )
        return (result.train_seconds - result.compile_seconds) / (steps - 1)

    seconds = {"bare": [], "loop": []}
    turns = [("bare", seconds_of_steps), ("loop", seconds_of_loop)]
    for _ in range(rounds):
        for name, measure in turns:
            seconds[name].append(measure())
        turns.reverse()
    medians = {name: statistics.median(of) for name, of in seconds.items()}
    more = medians["loop"] / medians["bare"] - 1
    print(
        f"{1000 * medians['bare']:.2f} ms a bare step, {1000 * medians['loop']:.2f} ms in the "
        f"loop: {100 * more:.1f} % more"
    )
    return {"seconds": seconds, "share_more": more, "asked": 0.03}


PARTS = {
    "memory": memory,
    "modes": modes,
    "peak": peak,
    "chunks": chunks,
    "devices": devices,
    "compile": compilation,
    "loop": loop,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--smoke", action="store_true", help="small nets and few tasks, one round")
    parser.add_argument("--compile-once", metavar="CACHE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shrink = small if options.smoke else (lambda row: row)
    if options.compile_once:
        compile_once(options.compile_once, shrink)
        return
    for name in options.parts:
        print(f"\n{name}")
        numbers = PARTS[name](shrink)
        if not options.smoke:
            harness.write_result(f"bench_meta_{name}", numbers)


if __name__ == "__main__":
    main()
