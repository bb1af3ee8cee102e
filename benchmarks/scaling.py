"""How time, memory and communication of an outer step grow; and what that would mean on a pod.

    python -m benchmarks.scaling [--smoke] [--peak-flops 197e12 ...]

Second-order MAML of strided Conv4, 5-way 1-shot, 15 queries, 5 inner steps, mode "remat", one task
at a time. One of tasks, inner steps, parameters and devices is varied at a time: seconds, the
compiler's temporaries of one device, and the bytes of all-reduces in the compiled program, which
must be those of parameters and metrics. A line `y = fixed + each x` is fitted to each. Devices
beyond the cores are virtual: they show memory and communication, and no time.

Then a PROJECTION, from the work on paper (`benchmarks.work`) and a stated model of a device, that
nobody has measured. Writes `benchmarks/results/scaling.json` and `.png`.
"""

import argparse

from benchmarks import harness

if __name__ == "__main__":
    harness.make_devices(8)

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bench_meta import meta_gradient
from benchmarks.rows import ROWS, Row, make_example, small
from benchmarks.work import BYTES, num_params, outer_step
from experiments.provenance import num_cores
from metagen_jax.evaluation import figures
from metagen_jax.parallel import data_parallel

MOST_DEVICES = 8
METRICS = ("loss", "accuracy")


class Point(NamedTuple):
    """One measurement: where, and what it costs there."""

    x: int
    seconds: float | None
    temporaries: float
    reduced_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """A stated model of a device of a pod, by default published figures of a TPU v5e.

    Attributes:
      peak_flops: FLOP/s of its matrix unit, in bfloat16.
      share: of this peak that the products of a step reach; a guess.
      bandwidth: bytes/s of its memory.
      link: bytes/s at which it passes an all-reduce on; one way.
      latency: seconds for each of its hops.
    """

    peak_flops: float = 197e12
    share: float = 0.2
    bandwidth: float = 819e9
    link: float = 50e9
    latency: float = 1e-6

    def compute_seconds(self, row: Row) -> float:
        """Of the tasks of a row on one device: bound by products or by memory."""
        work = outer_step(row)
        return max(work.flops / (self.share * self.peak_flops), work.moved_bytes / self.bandwidth)

    def reduce_seconds(self, row: Row, num_devices: int) -> float:
        """Of the gradient, around a ring: `2 (N - 1)` hops, each of an N-th of its bytes."""
        if num_devices == 1:
            return 0.0
        size = BYTES * (num_params(row) + len(METRICS))
        hops = 2 * (num_devices - 1)
        return hops / num_devices * size / self.link + hops * self.latency


def reduced_bytes(hlo: str) -> int:
    """The bytes that a compiled program moves, which must be by one all-reduce at most."""
    moves = r"= (.*?) ((?:all-|reduce-scatter|collective-|ragged-|send|recv)[a-z-]*)(?<!-done)\("
    found = re.findall(moves, hlo)
    kinds = [kind.removesuffix("-start") for _, kind in found]
    assert kinds in ([], ["all-reduce"]), f"collectives: {kinds}"
    shapes = re.findall(r"\b(?:f|bf|s|u)(\d+)\[([\d,]*)\]", " ".join(shape for shape, _ in found))
    return sum(
        int(bits) // 8 * math.prod(map(int, filter(None, dims.split(",")))) for bits, dims in shapes
    )


def measure(row: Row, num_devices: int, x: int, rounds: int) -> Point:
    """Compiles the step of a row over so many devices; runs it if there is a core for each."""
    devices = jax.devices()[:num_devices]
    grad_fn = data_parallel(meta_gradient(row, gradient="remat", chunk=1), devices=devices)
    arguments = (*make_example(row, jnp.float32), jax.random.key(0))
    program, timing = harness.compile_timed(grad_fn, *arguments)
    moved = reduced_bytes(program.as_text())
    expected = BYTES * (num_params(row) + len(METRICS)) if num_devices > 1 else 0
    assert moved == expected, f"{moved} bytes are reduced over {num_devices} devices: {expected}"
    seconds = None
    if num_devices <= num_cores():
        call = functools.partial(program, *arguments)
        jax.block_until_ready(call())
        harness.time_in_turns({"step": call}, {"step": timing}, rounds=rounds)
        seconds = timing.median
    return Point(x, seconds, timing.temporaries or 0.0, moved)


class Line(NamedTuple):
    """`y = fixed + each * x`."""

    fixed: float
    each: float


def fit_line(points: list[Point], quantity: str) -> Line | None:
    """The line through a sweep by least squares of relative errors; None with fewer than 3 values.

    Tasks and inner steps add to what is there without them: a power law would have no meaning.
    """
    pairs = [(p.x, getattr(p, quantity)) for p in points if getattr(p, quantity)]
    if len(pairs) < 3:
        return None
    x, y = np.array(pairs, float).T
    each, fixed = np.polyfit(x, y, 1, w=1 / y)
    return Line(float(fixed), float(each))


def measure_growth(shrink, rounds: int) -> dict[str, list[Point]]:
    """Every sweep, by what is varied."""
    row = shrink(dataclasses.replace(ROWS["5-steps"], num_tasks=8))
    two = min(2, num_cores())
    vary = functools.partial(dataclasses.replace, row)
    wider = [vary(num_filters=f * row.num_filters // 4) for f in (1, 2, 4)]
    sweeps = {
        "tasks": [(vary(num_tasks=n), two, n) for n in (4, 8, 16, 32)],
        "inner steps": [(vary(num_steps=n), two, n) for n in (1, 2, 5, 10)],
        "parameters": [(wide, two, num_params(wide)) for wide in wider],
        "devices": [(vary(num_tasks=MOST_DEVICES), n, n) for n in (1, 2, 4, MOST_DEVICES)],
    }
    if shrink is small:
        sweeps = {what: points[::3] for what, points in sweeps.items()}
    return {what: [measure(*at, rounds) for at in points] for what, points in sweeps.items()}


def print_growth(sweeps: dict[str, list[Point]]) -> dict[str, dict[str, Line | None]]:
    """The tables; gives the lines."""
    quantities = ("seconds", "temporaries", "reduced_bytes")
    fits = {what: {q: fit_line(points, q) for q in quantities} for what, points in sweeps.items()}
    for what, points in sweeps.items():
        print(f"\n{what:>12} {'step':>12} {'temporaries':>14} {'all-reduced':>14}")
        for p in points:
            step = "virtual" if p.seconds is None else f"{1000 * p.seconds:.1f} ms"
            print(f"{p.x:12} {step:>12} {p.temporaries:10.2f} MiB {p.reduced_bytes:12} B")
        for label, part in ("fixed", "fixed"), ("each adds", "each"):
            seconds, memory, moved = (
                None if fits[what][q] is None else getattr(fits[what][q], part) for q in quantities
            )
            print(
                f"{label:>12} {'-' if seconds is None else f'{1000 * seconds:.3g} ms':>12} "
                f"{'-' if memory is None else f'{memory:.3g} MiB':>14} "
                f"{'-' if moved is None else f'{moved:.0f} B':>14}"
            )
    return fits


def project(device: Device, row: Row) -> list[dict[str, float]]:
    """Prints and gives what a pod would do with this many tasks on each device."""
    print(
        f"\nPROJECTION, not measured: {row.num_tasks} tasks a device of {device.peak_flops:.3g} "
        f"FLOP/s, of which {device.share:.0%}, {device.bandwidth:.3g} B/s, links of "
        f"{device.link:.3g} B/s and {device.latency:.1g} s"
    )
    print(f"{'devices':>8} {'tasks':>8} {'step':>10} {'all-reduce':>11} {'of one device':>14}")
    rows = []
    for n in (1, 8, 64, 256):
        compute, reduce = device.compute_seconds(row), device.reduce_seconds(row, n)
        efficiency = compute / (compute + reduce)
        step, reduced = 1000 * (compute + reduce), 1000 * reduce
        print(f"{n:8} {n * row.num_tasks:8} {step:7.2f} ms {reduced:8.2f} ms {efficiency:13.1%}")
        rows.append({"devices": n, "seconds": compute + reduce, "efficiency": efficiency})
    return rows


def draw(sweeps: dict[str, list[Point]], path: Path) -> None:
    """Milliseconds and temporaries of each sweep, on logarithmic axes."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure = figures.new_figure(3 * len(sweeps), 5.5, "What an outer step costs, and how it grows")
    axes = figure.subplots(2, len(sweeps), sharex="col", sharey="row", squeeze=False)
    for (what, points), (above, below) in zip(sweeps.items(), axes.T, strict=True):
        timed = [p for p in points if p.seconds]
        above.loglog([p.x for p in timed], [1000 * p.seconds for p in timed if p.seconds], "o-")
        below.loglog([p.x for p in points], [p.temporaries for p in points], "o-")
        below.set_ylim(1, 100)
        for axis, label in (above, "milliseconds a step"), (below, "temporaries, MiB"):
            axis.set_xticks([p.x for p in points], [f"{p.x:,}" for p in points])
            axis.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            for minor in (axis.xaxis, axis.yaxis):
                minor.set_minor_locator(NullLocator())
            figures.finish(axis, what, label if what == next(iter(sweeps)) else "")
    figures.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a small net, one round, few points")
    parser.add_argument("--tasks-per-device", type=int, default=32)
    for field in dataclasses.fields(Device):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=float, default=field.default)
    options = vars(parser.parse_args())
    smoke, tasks = options.pop("smoke"), options.pop("tasks_per_device")
    shrink, rounds = (small, 1) if smoke else ((lambda row: row), 5)
    sweeps = measure_growth(shrink, rounds)
    fits = print_growth(sweeps)
    device = Device(**options)
    projection = project(device, dataclasses.replace(ROWS["5-steps"], num_tasks=tasks))
    if not smoke:
        numbers: dict[str, Any] = {
            "sweeps": {what: [p._asdict() for p in points] for what, points in sweeps.items()},
            "lines": {
                w: {q: f and f._asdict() for q, f in each.items()} for w, each in fits.items()
            },
            "projection_not_measured": {"device": dataclasses.asdict(device), "rows": projection},
        }
        path = harness.write_result("scaling", numbers)
        draw(sweeps, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
