"""Every benchmark still runs, and what it counts on paper is what programs compute."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import scaling
from benchmarks.bench_meta import meta_gradient
from benchmarks.rows import ROWS, Row, make_example, small
from benchmarks.work import count_flops, num_params, outer_step

SCRIPTS = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if path.name.startswith("bench_") or path.stem == "scaling"
)


@pytest.mark.usefixtures("smoke")
@pytest.mark.parametrize("script", SCRIPTS)
def test_it_runs_at_its_smallest(script):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", f"benchmarks.{script}", "--smoke"]
    # Compiles faster, and nothing is timed.
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout


@pytest.mark.parametrize("name", ["5-steps", "sinusoid", "max-pooled"])
def test_the_work_on_paper_is_that_of_the_program(name):
    row: Row = dataclasses.replace(small(ROWS[name]), num_tasks=1)
    params, tasks = make_example(row, jnp.float32)
    # The default computes the inner steps again, which the paper does not count.
    grad_fn = meta_gradient(row, gradient="reverse", chunk=1)
    program = jax.jit(grad_fn).trace(params, tasks, jax.random.key(0)).jaxpr
    counted = count_flops(program.jaxpr)
    assert counted == pytest.approx(outer_step(row).flops, rel=0.02)
    assert num_params(row) == sum(x.size for x in jax.tree.leaves(params))


def test_a_line_is_found():
    points = [scaling.Point(x, 3.0 + 1.5 * x, 2.0, 0) for x in (1, 2, 4, 8)]
    assert scaling.fit_line(points, "seconds") == pytest.approx((3, 1.5))
    assert scaling.fit_line(points, "temporaries") == pytest.approx((2, 0), abs=1e-9)
    assert scaling.fit_line(points, "reduced_bytes") is None


def test_the_bytes_of_the_one_collective_are_read_from_a_program():
    hlo = """
      %a = (f32[2,3]{1,0}, /*index=5*/f32[], bf16[6]{0}) all-reduce-start(%x, %y, %z)
      %b = (f32[2,3]{1,0}, f32[], bf16[6]{0}) all-reduce-done(%a)
      %c = f32[5]{0} add(%u, %v), metadata={op_name="all-to-all("}
    """
    assert scaling.reduced_bytes(hlo) == 4 * (6 + 1) + 2 * 6
    for other in ("u32[8]{0} all-gather(%z)", "f32[] all-reduce(%z)"):
        with pytest.raises(AssertionError, match="collectives"):
            scaling.reduced_bytes(f"{hlo}\n  %e = {other}, dimensions={{0}}")


def test_a_ring_passes_twice_the_gradient_at_most():
    device = scaling.Device(link=1.0, latency=0.0)
    row = ROWS["5-steps"]
    size = 4 * (num_params(row) + 2)
    assert device.reduce_seconds(row, 1) == 0
    assert device.reduce_seconds(row, 2) == pytest.approx(size)
    assert device.reduce_seconds(row, 1000) == pytest.approx(2 * size, rel=2e-3)
