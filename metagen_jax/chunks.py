"""How many tasks at once: the rule behind `chunk="auto"`.

A CPU is fastest while all that a chunk works on stays in a core's cache; an accelerator needs as
many tasks at once as its memory holds.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import core
from jaxtyping import PyTree

from metagen_jax.errors import UserError

Chunk = int | Literal["auto"]
"""How many tasks at once: so many, or as many as `choose_chunk` finds best."""

# Measured with second-order MAML of two inner steps and more, 10 points a task: of a network with
# two hidden layers of 40 units, 7 KiB a task, chunks of 4 to 64 tasks take the same time and one
# task at a time 1.3 times as long; with 128 units, 66 KiB, chunks of 1 to 8 take the same and of 64
# three times as long; a convolutional net, 450 KiB and more, is fastest one task at a time.
CPU_BYTES = 128 * 2**10
"""Bytes of parameters and examples of all tasks of a chunk, on a CPU."""

MEMORY_SHARE = 0.6
"""The share of an accelerator's memory that a chunk may fill; parameters, data and the state of the
optimiser have the rest. What is in use at the moment does not count: hosts would compile different
programs of one step, and a resumed run sum in another order."""


def check_chunk(chunk: Chunk | None, *, none: str = "") -> None:
    """Raises a `UserError` for a number of tasks that is not positive, or another word."""
    if isinstance(chunk, str):
        if chunk != "auto":
            raise UserError(f'chunk is {chunk!r}; give a number of tasks, or "auto"')
    elif chunk is not None and chunk < 1:
        raise UserError(f'chunk is {chunk}; give a positive number of tasks, or "auto"{none}')


def choose_chunk(at_once: Callable[[PyTree, PyTree], Any], shared: PyTree, tasks: PyTree) -> int:
    """How many tasks at once, by backend and memory.

    On a CPU as many as have parameters and examples of `CPU_BYTES` together, at least one. On an
    accelerator about the largest number whose temporaries, as the compiler counts them, fit in
    `MEMORY_SHARE` of the memory of the first device: for this one task and two are compiled by
    themselves, and what is foretold from them is compiled and halved until it fits. All, where the
    device does not say what memory it has. Of these numbers down to the half of each it takes the
    largest that divides the tasks, if there is one: a chunk of what is left over would be compiled
    as a second step.

    Args:
      at_once: `(shared, tasks) -> results`, over all tasks that it is given. It may close over
        traced arrays.
      shared: what all tasks have in common, such as parameters.
      tasks: a pytree of arrays with a leading axis of tasks.

    Raises:
      UserError: on an accelerator, where `at_once` can't be compiled by itself because it speaks
        to other devices.
    """
    num_tasks = len(jax.tree.leaves(tasks)[0])
    if jax.default_backend() == "cpu":
        each = _bytes(shared) + _bytes(tasks) // num_tasks
        return even_chunk(num_tasks, min(num_tasks, max(1, CPU_BYTES // max(1, each))))
    memory = _memory_for_chunk()
    if memory is None or num_tasks == 1:
        return num_tasks
    temporaries = functools.partial(_temporaries, at_once, shared, tasks)
    return even_chunk(num_tasks, largest_that_fits(temporaries, num_tasks, memory))


def even_chunk(num_tasks: int, most: int) -> int:
    """The largest divisor of `num_tasks` from `most` down to its half; `most` if there is none."""
    return next((n for n in range(most, (most - 1) // 2, -1) if num_tasks % n == 0), most)


def largest_that_fits(temporaries: Callable[[int], int], most: int, memory: float) -> int:
    """About the largest chunk, up to `most`, of `temporaries(chunk)` bytes that fit in `memory`.

    Two chunks are tried to foretell the largest by a straight line, which is then halved until it
    fits. One, if nothing does: the program that follows says best what it lacks.
    """
    one, two = temporaries(1), temporaries(2)
    slope = max(1, two - one)
    chunk = int(min(most, max(1, 1 + (memory - one) // slope)))
    while chunk > 2 and temporaries(chunk) > memory:
        chunk //= 2
    return chunk if chunk != 2 or two <= memory else 1


def _memory_for_chunk() -> float | None:
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return None if limit is None else MEMORY_SHARE * limit


def _temporaries(at_once: Callable, shared: PyTree, tasks: PyTree, size: int) -> int:
    """Bytes beside arguments and results of `at_once` for so many tasks, by the compiler."""

    def chunk(tasks):
        return jax.tree.map(lambda x: x[:size], tasks)

    # As `at_once` may close over traced arrays, its program is made here and compiled elsewhere.
    jaxpr = jax.make_jaxpr(lambda s, t: at_once(s, chunk(t)))(shared, tasks)
    if jaxpr.effects:
        raise UserError(
            'chunk is "auto", but the tasks speak to other devices, so that a chunk can\'t be '
            "compiled by itself to see what memory it takes; give a number of tasks"
        )
    shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in jaxpr.jaxpr.invars]
    consts = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in jaxpr.consts]

    def program(consts, arguments):
        return core.eval_jaxpr(jaxpr.jaxpr, consts, *arguments)

    compiled = jax.jit(program).lower(consts, shapes).compile()
    # A backend that doesn't say is taken to have room for all.
    analysis = compiled.memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes


def _bytes(tree: PyTree) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(x.size * x.dtype.itemsize for x in map(jnp.asarray, leaves))
