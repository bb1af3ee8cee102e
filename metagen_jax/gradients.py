"""Lifts from `GradFn` to `GradFn`: from a loss to its gradient, from one task to many."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import core
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Key, PyTree

from metagen_jax.chunks import Chunk, check_chunk, choose_chunk
from metagen_jax.errors import UserError
from metagen_jax.types import Batch, GradFn, LossFn, Metrics, Params, PRNGKey


def gradients(loss_fn: LossFn) -> GradFn:
    """The gradient of a loss, as a `GradFn` whose metrics also hold the loss itself.

    Args:
      loss_fn: `(params, batch, key) -> (scalar, metrics)`.

    Returns:
      `(params, batch, key) -> (d loss / d params, {"loss": loss, **metrics})`.
    """

    def grad_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Params, Metrics]:
        return _gradient(loss_fn, params, batch, key)

    return grad_fn


def mixed_gradients(loss_fn: LossFn) -> GradFn:
    """`gradients(loss_fn)`, itself differentiated by reverse over forward mode.

    A cotangent v of the gradient goes to each input x, the parameters, the batch and all that
    `loss_fn` closes over, as `d <v, grad loss_fn> / dx`. That product is the slope of the loss
    along v, `d/dt loss_fn(params + t v)` at t = 0, a forward pass with tangents; so that there is
    no backward pass to differentiate, and nothing but the inputs is saved (Kemaev et al. 2025,
    MixFlow-MG). That pays where the loss has a scan in it, such as one over layers, of whose
    backward pass every step would be saved; elsewhere `jax.checkpoint` around `gradients` needs
    as little. No symmetry is assumed: a field of several players' gradients, each of a loss of its
    own, is right if each is lifted by itself.

    Values and derivatives of any order are those of `gradients`, but in reverse mode only: JAX
    refuses forward mode through the result, and cannot pull back through it if the loss has no
    forward mode itself, as with a `jax.custom_vjp` or another `mixed_gradients` in it.

    Args:
      loss_fn: as in `gradients`.

    Returns:
      As `gradients`.
    """

    def grad_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Params, Metrics]:
        loss, closed_over = _hoist_closure(loss_fn, params, batch, key)

        def forward(*inputs):
            inputs = jax.tree.map(lambda x: x.value, inputs)
            return _gradient(loss, *inputs), inputs

        gradient = jax.custom_vjp(functools.partial(_gradient, loss))
        gradient.defvjp(forward, functools.partial(_pull_back, loss), symbolic_zeros=True)
        return gradient(params, batch, key, closed_over)

    return grad_fn


def _gradient(loss_fn: Callable, params: Params, *others) -> tuple[Params, Metrics]:
    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, *others)
    return grads, {"loss": loss, **metrics}


def _hoist_closure(function: Callable, *arguments) -> tuple[Callable, list]:
    """`function` with one more argument, the list of all arrays that it closes over; and that list.

    A custom derivative sees arguments only. (`jax.closure_convert` leaves integers behind.)
    """
    # A new function each time: JAX remembers what it has traced.
    jaxpr, result = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*arguments)

    def hoisted(*inputs):
        *arguments, closed_over = inputs
        outputs = core.eval_jaxpr(jaxpr.jaxpr, closed_over, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(result), outputs)

    return hoisted, jaxpr.consts


def _pull_back(loss_fn: Callable, inputs: tuple, cotangents: tuple[PyTree, PyTree]) -> tuple:
    """The cotangents of the inputs of `_gradient` from those of its outputs."""
    along, of_metrics = cotangents

    def paired(params, *others):
        """`<along, gradient>` and the metrics."""

        # Leaves that no cotangent reaches, such as those that an inner loop holds fixed, have no
        # tangent: a tangent of zeros would cost as much as any other.
        def at(t):
            moved = jax.tree.map(lambda p, v: p if _is_zero(v) else p + t * v, params, along)
            loss, metrics = loss_fn(moved, *others)
            return loss, _reached({"loss": loss, **metrics}, of_metrics)

        _, slope, metrics = jax.jvp(at, (0.0,), (1.0,), has_aux=True)
        return slope, metrics

    (slope, _), pull = jax.vjp(paired, *inputs)
    return pull((jnp.ones_like(slope), _reached(of_metrics, of_metrics)))


def _reached(tree: PyTree, cotangents: PyTree) -> PyTree:
    """`tree` with None for the leaves that no cotangent reaches."""
    return jax.tree.map(lambda x, c: None if _is_zero(c) else x, tree, cotangents)


def _is_zero(cotangent) -> bool:
    return isinstance(cotangent, SymbolicZero)


def task_keys(key: PRNGKey, num_tasks: int) -> Key[Array, " tasks"]:
    """One key for each task, folded from its index in the whole batch.

    Task `i` gets `fold_in(key, i)` however the batch is then split over chunks and devices.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_tasks))


def mean_over_tasks(grad_fn: GradFn, *, chunk: Chunk | None = "auto") -> GradFn:
    """The mean of a per-task gradient, and of its metrics, over the leading axis of the batch.

    `g(params, batch, key) = 1/T sum_t grad_fn(params, batch[t], fold_in(key, t))`

    Tasks are vmapped within a chunk and chunks follow one another in a scan that carries the sum
    of gradients, so that memory grows with `chunk` and not with the number of tasks. The result is
    the same for every `chunk` up to the order of summation.

    "auto" chooses when it is traced. On a CPU a chunk has as many tasks as have parameters and
    examples of 128 KiB together, at least one: beyond a core's cache it is slower (a convolutional
    net goes one task at a time, a small MLP twenty). On an accelerator it has the most tasks whose
    temporaries, by the compiler's `memory_analysis`, fit in 0.6 of the memory of the device; to
    this end a few chunks are compiled by themselves. Of chunks down to half of that size it takes
    one that divides the tasks, if it can. See `metagen_jax.chunks.choose_chunk`.

    A chunk of one task is not vmapped: of a `lax.cond` in `grad_fn` only the branch that is taken
    costs time.

    Args:
      grad_fn: `(params, task, key) -> (direction, metrics)` for one task.
      chunk: how many tasks at once, which need not divide their number; "auto" leaves the choice to
        the rule above; None takes all.

    Returns:
      A `GradFn` over a batch of `T` tasks. Its key may be one key, or `T` keys, one for each task.

    Raises:
      UserError: if `chunk` is not positive, the leaves of the batch differ in leading axis, or
        there are several keys but not one for each task; with "auto" on an accelerator, if
        `grad_fn` uses collectives.
    """
    check_chunk(chunk, none=", or None for all")

    def mean_grad_fn(
        params: Params, batch: Batch, key: Key[Array, "..."]
    ) -> tuple[Params, Metrics]:
        num_tasks = count_tasks(batch)
        keys = task_keys(key, num_tasks) if key.ndim == 0 else key
        if keys.shape != (num_tasks,):
            raise UserError(
                f"there are keys of shape {keys.shape} for {num_tasks} tasks; "
                "give one typed key, or one for each task"
            )
        at_once = jax.vmap(grad_fn, in_axes=(None, 0, 0))

        def sum_over(params, tasks):
            if len(tasks[1]) == 1:
                one = grad_fn(params, *jax.tree.map(lambda x: x[0], tasks))
                results = jax.tree.map(lambda x: jnp.asarray(x)[None], one)
            else:
                results = at_once(params, *tasks)
            return jax.tree.map(lambda x: x.sum(axis=0), results)

        tasks = (batch, keys)
        if chunk == "auto":
            size = choose_chunk(sum_over, params, tasks)
        else:
            size = num_tasks if chunk is None else min(chunk, num_tasks)
        sum_of = functools.partial(sum_over, params)
        total = _scan_sum(sum_of, tasks, size) if size < num_tasks else sum_of(tasks)
        return jax.tree.map(lambda x: x / num_tasks, total)

    return mean_grad_fn


def count_tasks(batch: Batch) -> int:
    """The length of the leading axis that all leaves of a batch have in common."""
    sizes = sorted({x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(batch)})
    if len(sizes) != 1 or sizes[0] == 0:
        raise UserError(
            f"the leaves of a batch of tasks have leading axes of {sizes}; "
            "give every leaf one leading axis of the same, non-zero length"
        )
    return sizes[0]


def _scan_sum(sum_over: Callable, tasks, size: int):
    """`sum_over(tasks)` in steps of `size` tasks and one smaller step for what is left over."""
    num_chunks, rest = divmod(len(tasks[1]), size)
    head = jax.tree.map(
        lambda x: x[: num_chunks * size].reshape(num_chunks, size, *x.shape[1:]), tasks
    )
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(sum_over, jax.tree.map(lambda x: x[0], head)),
    )

    def add(total, chunk):
        return jax.tree.map(jnp.add, total, sum_over(chunk)), None

    total, _ = jax.lax.scan(add, zero, head)
    if rest:
        last = jax.tree.map(lambda x: x[num_chunks * size :], tasks)
        total, _ = add(total, last)
    return total
