"""Means over what a batch happens to hold, such as masked tokens: exact over devices and chunks.

A mean over devices of their means is another number where they don't count alike. Both functions
here divide the sum over all by the count over all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from metagen_jax.errors import UserError
from metagen_jax.types import Batch, GradFn, Metrics, Params


def counted_mean(
    values: Float[Array, "*shape"], counted: Bool[Array, "*shape"], *, axis_name: str | None = None
) -> Float[Array, ""]:
    """`sum_i c_i v_i / sum_i c_i`, and 0 where nothing is counted.

    With `axis_name` it is this device's sum, times the number of devices, over the count of all:
    the mean over devices of these, as `data_parallel` takes it of losses, metrics and gradients, is
    that of one device which has everything.

    Args:
      values: of any shape; those that are not counted may be anything but not finite.
      counted: which ones.
      axis_name: of the devices.
    """
    count = counted.sum().astype(values.dtype)
    num_devices = 1
    if axis_name is not None:
        count = jax.lax.psum(count, axis_name)
        num_devices = jax.lax.psum(1, axis_name)
    total = jnp.where(counted, values, 0).sum()
    return num_devices * total / jnp.maximum(count, 1)


def weighted_by_count(grad_fn: GradFn, lift: Callable[[GradFn], GradFn]) -> GradFn:
    """A lift over tasks in which each weighs as much as it counts.

    `sum_t n_t g_t / sum_t n_t`, n_t the metric `count` of task t:

        weighted_by_count(
            gradients(loss_fn), lambda g: data_parallel(mean_over_tasks(g, chunk=8))
        )

    So a loss that is a mean over masked tokens has the same gradient over any devices, in any
    chunks; the loss then takes no `axis_name`.

    Args:
      grad_fn: of one task, with the metric `count`; the direction and all other metrics are means
        over what it counts.
      lift: from a GradFn of one task to the mean over tasks.

    Returns:
      A `GradFn` over whole batches. Its `count` is the mean over tasks. It raises a UserError if
      there is no metric `count`.
    """

    def scaled(params: Params, task: Batch, key: Key[Array, "..."]) -> tuple[Params, Metrics]:
        direction, metrics = grad_fn(params, task, key)
        if "count" not in metrics:
            raise UserError(
                f"grad_fn has the metrics {sorted(metrics)}; weighted_by_count needs `count`"
            )
        others = {name: value for name, value in metrics.items() if name != "count"}
        scale = metrics["count"]
        direction, others = jax.tree.map(lambda x: x * scale, (direction, others))
        return direction, {**others, "count": scale}

    mean = lift(scaled)

    def weighted(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Params, Metrics]:
        direction, metrics = mean(params, batch, key)
        count = metrics.pop("count")
        safe = jnp.where(count > 0, count, 1)
        direction, metrics = jax.tree.map(lambda x: x / safe, (direction, metrics))
        return direction, {**metrics, "count": count}

    return weighted
