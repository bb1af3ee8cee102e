"""Lifts from `GradFn` to `GradFn`: from a loss to its gradient, from one task to many."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from metagen_jax.errors import UserError
from metagen_jax.types import Batch, GradFn, LossFn, Metrics, Params, PRNGKey


def gradients(loss_fn: LossFn) -> GradFn:
    """The gradient of a loss, as a `GradFn` whose metrics also hold the loss itself.

    Args:
      loss_fn: `(params, batch, key) -> (scalar, metrics)`.

    Returns:
      `(params, batch, key) -> (d loss / d params, {"loss": loss, **metrics})`.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def grad_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Params, Metrics]:
        (loss, metrics), grads = value_and_grad(params, batch, key)
        return grads, {"loss": loss, **metrics}

    return grad_fn


def task_keys(key: PRNGKey, num_tasks: int) -> Key[Array, " tasks"]:
    """One key for each task, folded from its index in the whole batch.

    Task `i` gets `fold_in(key, i)` however the batch is then split over chunks and devices.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_tasks))


def mean_over_tasks(grad_fn: GradFn, *, chunk: int | None = None) -> GradFn:
    """The mean of a per-task gradient, and of its metrics, over the leading axis of the batch.

    `g(params, batch, key) = 1/T sum_t grad_fn(params, batch[t], fold_in(key, t))`

    Tasks are vmapped within a chunk and chunks follow one another in a scan that carries the sum
    of gradients, so that memory grows with `chunk` and not with the number of tasks. The result is
    the same for every `chunk` up to the order of summation. On a CPU small chunks are fastest,
    on accelerators the largest that fits. A chunk of one task is not vmapped: of a `lax.cond` in
    `grad_fn` only the branch that is taken costs time.

    Args:
      grad_fn: `(params, task, key) -> (direction, metrics)` for one task.
      chunk: how many tasks at once; None takes all. Need not divide the number of tasks.

    Returns:
      A `GradFn` over a batch of `T` tasks. Its key may be one key, or `T` keys, one for each task.

    Raises:
      UserError: if `chunk` is not positive, the leaves of the batch differ in leading axis, or
        there are several keys but not one for each task.
    """
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk is {chunk}; give a positive number of tasks, or None for all")

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

        def sum_over(tasks):
            if len(tasks[1]) == 1:
                one = grad_fn(params, *jax.tree.map(lambda x: x[0], tasks))
                results = jax.tree.map(lambda x: jnp.asarray(x)[None], one)
            else:
                results = at_once(params, *tasks)
            return jax.tree.map(lambda x: x.sum(axis=0), results)

        tasks = (batch, keys)
        size = num_tasks if chunk is None else min(chunk, num_tasks)
        total = _scan_sum(sum_over, tasks, size) if size < num_tasks else sum_over(tasks)
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
