"""What all benchmarks do: compile, check that variants agree, time them in turns, print, keep.

Variants are timed in turns within one process, round after round, and compared by medians, so that
a machine that slows down slows all of them.
"""

import functools
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.provenance import provenance
from metagen_jax.types import GradFn, Metrics, Params


class Timing(NamedTuple):
    """What a variant costs.

    Attributes:
      seconds: of each round.
      compile_seconds: tracing included; None for what is not compiled.
      temporaries: MiB beside arguments and results; None where it is not known.
    """

    seconds: list[float]
    compile_seconds: float | None
    temporaries: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def one_device_per_core() -> None:
    """Makes a CPU as many devices as it has cores; to be called before JAX's first use."""
    make_devices(os.cpu_count() or 1)


def make_devices(number: int) -> None:
    """Makes a CPU so many devices; to be called before JAX's first use."""
    jax.config.update("jax_num_cpu_devices", number)


class Compared(NamedTuple):
    """Timings by variant, and how far their results are from the first variant's."""

    of: dict[str, Timing]
    difference: float


def time_compiled(
    grad_fns: Mapping[str, GradFn], *arguments: Any, rounds: int, tolerance: float = 2e-2
) -> Compared:
    """Compiles functions that must give the same direction and loss, then times them in turns."""
    steps, timings = {}, {}
    for name, grad_fn in grad_fns.items():
        steps[name], timings[name] = compile_timed(grad_fn, *arguments)
    results = {name: jax.device_get(step(*arguments)) for name, step in steps.items()}
    difference = check_equal(results, tolerance=tolerance)
    calls = {name: functools.partial(step, *arguments) for name, step in steps.items()}
    time_in_turns(calls, timings, rounds=rounds)
    return Compared(timings, difference)


def compile_timed(function: Callable, *arguments: Any) -> tuple[Any, Timing]:
    """A compiled function of these arguments, with what that took."""
    start = time.perf_counter()
    program: Any = jax.jit(function).lower(*arguments).compile()
    elapsed = time.perf_counter() - start
    return program, Timing([], elapsed, program.memory_analysis().temp_size_in_bytes / 2**20)


def check_equal(
    results: Mapping[str, tuple[Params, Metrics]],
    *,
    tolerance: float,
    loss_tolerance: float = 1e-4,
) -> float:
    """The largest distance of a direction from the first one's, relative to its norm.

    At ReLU's kink any two implementations differ in float32; the tests compare in float64.

    Raises:
      AssertionError: it is beyond the tolerance, or a loss differs by more than `loss_tolerance`, a
        share of it.
    """
    (_, (reference, metrics)), *others = results.items()
    worst = 0.0
    for name, (direction, other) in others:
        np.testing.assert_allclose(
            other["loss"], metrics["loss"], rtol=loss_tolerance, err_msg=name
        )
        difference = jax.tree.map(jnp.subtract, direction, reference)
        distance = float(optax.tree.norm(difference) / optax.tree.norm(reference))
        assert distance < tolerance, f"{name}: {distance:.1e} of the norm from the first variant"
        worst = max(worst, distance)
    return worst


def time_in_turns(
    calls: Mapping[str, Callable[[], Any]],
    timings: Mapping[str, Timing],
    *,
    rounds: int,
    patience: float = math.inf,
) -> None:
    """Calls each function once a round and appends the seconds to its timing.

    Each round has an order of its own, as a turn after one that uses much memory is slower.
    One that has taken longer than `patience`, in seconds, is not called again.
    """
    rng = random.Random(0)
    for _ in range(rounds):
        for name, call in rng.sample(list(calls.items()), len(calls)):
            if max(timings[name].seconds, default=0.0) < patience:
                timings[name].seconds.append(_seconds(call))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def print_timings(timings: Mapping[str, Timing], *, per_step: int, unit: str, best: str) -> None:
    """Prints a line for each variant; ratios are to the fastest whose name begins with `best`."""
    width = max(map(len, timings)) + 2
    reference = min(t.median for name, t in timings.items() if name.startswith(best))
    print(
        f"{'variant':{width}} {'step':>10} {unit + '/s':>10} {'compile':>8} {'temporaries':>12}"
        f" {'ratio':>6}"
    )
    for name, timing in timings.items():
        compiled = "" if timing.compile_seconds is None else f"{timing.compile_seconds:.1f} s"
        memory = "" if timing.temporaries is None else f"{timing.temporaries:.1f} MiB"
        print(
            f"{name:{width}} {timing.median * 1e3:7.1f} ms {per_step / timing.median:10.1f} "
            f"{compiled:>8} {memory:>12} {reference / timing.median:6.2f}"
        )
    print(f"ratio: how many times as fast as the fastest that begins with {best!r}")


def as_numbers(timings: Mapping[str, Timing]) -> dict[str, Any]:
    """The timings as JSON takes them, by quantity and variant."""
    return {
        "medians_seconds": {name: t.median for name, t in timings.items()},
        "all_seconds": {name: t.seconds for name, t in timings.items()},
        "compile_seconds": {name: t.compile_seconds for name, t in timings.items()},
        "temporaries_mib": {name: t.temporaries for name, t in timings.items()},
    }


def write_result(name: str, numbers: Mapping[str, Any]) -> Path:
    """Writes `benchmarks/results/NAME.json`: the numbers, machine, versions and commit."""
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**numbers, **provenance()}, indent=2) + "\n", encoding="utf-8")
    return path
