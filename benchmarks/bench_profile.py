"""Where the time of an outer step goes, on one device: products, patches, norms, the rest.

    python -m benchmarks.bench_profile [--row 5-steps] [--smoke]

Second-order MAML of Conv4, one task after another. Times each operation of the compiled step by
JAX's profiler and adds them up by what they come from. Meant for one core (`taskset -c 1`), where
an operation is one piece of work. Writes `benchmarks/results/bench_profile_ROW.json`.
"""

import argparse
import collections
import dataclasses
import gzip
import json
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import harness
from benchmarks.bench_meta import meta_gradient
from benchmarks.rows import ROWS, make_example, small
from benchmarks.work import count_flops, outer_step

# The first pattern that an operation's name and origin match says what it is.
PARTS = {
    "matrix products": r"dot_general|^dot",
    "XLA's convolutions": r"conv_general_dilated",
    "patches turned for the kernel's gradient": r"^\S*copy\S* .*conv\d/concatenate",
    "patches": r"conv\d/(concatenate|slice|pad)",
    "transposes of patches": r"conv\d/(add_any|transpose)",
    "norms": r"norm\d",
    "max-pooling": r"max_pool_2x2",
    "ReLU and bias": r"select_n|/max|conv\d",
    "states of the inner loop, kept": r"dynamic_(update_)?(slice|index)|^\S*copy|^while",
}


def operations(text: str) -> dict[str, str]:
    """What each operation of a compiled program comes from, by its name."""
    pattern = r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"'
    return dict(re.findall(pattern, text, flags=re.MULTILINE))


def part_of(operation: str, origin: str) -> str:
    """The part of the step that an operation belongs to."""
    described = f"{operation} {origin}"
    return next((part for part, p in PARTS.items() if re.search(p, described)), "all else")


def microseconds(folder: Path) -> collections.Counter[str]:
    """The time in each operation, by the trace that the profiler left in a folder."""
    [trace] = folder.rglob("*.trace.json.gz")
    total: collections.Counter[str] = collections.Counter()
    for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            total[event["name"]] += event["dur"]
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    convolutional = [name for name, r in ROWS.items() if r.net != "mlp" and r.learner == "maml"]
    parser.add_argument("--row", choices=convolutional, default="5-steps")
    parser.add_argument("--smoke", action="store_true", help="a small net and few tasks")
    options = parser.parse_args()
    row = small(ROWS[options.row]) if options.smoke else ROWS[options.row]
    row = dataclasses.replace(row, num_tasks=8)
    example = (*make_example(row, jnp.float32), jax.random.key(0))
    grad_fn = meta_gradient(row, chunk=1)
    program, timing = harness.compile_timed(grad_fn, *example)
    calls = {"step": lambda: program(*example)}
    harness.time_in_turns(calls, {"step": timing}, rounds=2 if options.smoke else 9)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(program(*example))
        spent = microseconds(Path(folder))
    origins = operations(program.as_text())
    parts: collections.Counter[str] = collections.Counter()
    for operation, time in spent.items():
        parts[part_of(operation, origins.get(operation, ""))] += time
    each = 1e3 * row.num_tasks
    total = parts.total()
    for part, time in parts.most_common():
        print(f"{part:42} {time / each:8.2f} ms a task {100 * time / total:6.1f} %")
    products = parts["matrix products"]
    flops = count_flops(jax.make_jaxpr(grad_fn)(*example).jaxpr)
    rate = flops / products / 1e3 if products else 0.0
    again = flops / outer_step(row).flops - 1
    median = 1e3 * timing.median / row.num_tasks
    print(f"all of it {total / each:.2f} ms; without the profiler {median:.2f} ms a task")
    print(f"matrix products by themselves: {rate:.1f} GFLOP/s, {again:.1%} of them taken again")
    if not options.smoke:
        numbers = {
            "row": dataclasses.asdict(row),
            "milliseconds_a_task": {part: time / each for part, time in parts.items()},
            "median_milliseconds_a_task": median,
            "products_gflops": rate,
            "share_of_products_taken_again": again,
        }
        harness.write_result(f"bench_profile_{options.row}", numbers)


if __name__ == "__main__":
    main()
