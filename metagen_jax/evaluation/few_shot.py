"""Few-shot accuracy: many tasks of unseen classes from a fixed key, with its 95 % interval.

With normalisation by the current batch a figure depends on what a query is normalised with, and
must say so. *Transductive*: the queries of an episode together, so that each answer sees the other
questions. *Inductive*: the support set, so that each query is answered by itself.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from metagen_jax.gradients import task_keys
from metagen_jax.types import Batch, Episode, Params, PredictFn, PRNGKey

Sample = Callable[[PRNGKey, Any], Episode]
"""`sample(key, data) -> Episode((inputs, labels), (inputs, labels))`, labels 0..ways-1."""

Predict = Callable[[Params, Batch, PyTree], PyTree]
"""`predict_fn(params, support, inputs) -> logits`, what `maml_predict` asks adapted parameters."""


class Accuracy(NamedTuple):
    """Accuracy over tasks, as fractions.

    Attributes:
      mean: over tasks; its shape is that of the leading axes of the logits, such as the steps.
      interval: half width of the 95 % interval of the mean, `1.96 s / sqrt(tasks)`.
      per_task: `(tasks, *mean.shape)`. Learners evaluated with one key saw the same tasks, so that
        the difference of these has a narrower interval than the means have.
    """

    mean: np.ndarray
    interval: np.ndarray
    per_task: np.ndarray


def evaluate_few_shot(
    predict: PredictFn,
    params: Params,
    sample: Sample,
    data: PyTree,
    *,
    key: PRNGKey,
    num_tasks: int = 1000,
    chunk: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> PyTree:
    """Accuracy on the queries of `num_tasks` episodes, each predicted from its support set.

    Task `i` is drawn and predicted with keys that come from `fold_in(key, i)` alone: the same
    episodes for every learner, chunk and number of devices. Compiled once for each pair of
    `predict` and `sample`: to evaluate again, pass the same functions and not new closures.

    Args:
      predict: `(params, support, inputs, key) -> logits`, any pytree of arrays
        `(..., queries, ways)`, such as `{"transductive": (steps + 1, queries, ways), ...}`.
      params: what `predict` starts from.
      sample: `(key, data) -> Episode((inputs, labels), (inputs, labels))`.
      data: what `sample` draws from, any pytree of arrays.
      key: fixes tasks and predictions.
      num_tasks: how many episodes.
      chunk: how many at once on each device. On a CPU 1 is fastest, on accelerators the largest
        that fits.
      devices: what to spread the tasks over; None takes all of this host.

    Returns:
      The pytree of `predict` with an `Accuracy` for each array of logits. A query with a NaN among
      its logits counts as wrong.

    Raises:
      ValueError: if `num_tasks` is less than 2, `chunk` less than 1, or the logits don't match the
        labels.
    """
    if num_tasks < 2:
        raise ValueError(f"num_tasks is {num_tasks}; an interval needs 2 or more, 1000 is usual")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; give a positive number of tasks")
    devices = jax.local_devices() if devices is None else devices
    mesh = Mesh(np.array(devices), ("tasks",), axis_types=(AxisType.Auto,))
    params, data, key = jax.device_put((params, data, key), NamedSharding(mesh, P()))
    correct = _task_accuracies(
        params,
        data,
        key,
        predict=predict,
        sample=sample,
        num_tasks=num_tasks,
        chunk=chunk,
        mesh=mesh,
    )
    return jax.tree.map(accuracy_over_tasks, correct)


def accuracy_over_tasks(per_task: Float[np.ndarray, "tasks *steps"]) -> Accuracy:
    """Mean and 95 % interval, `1.96 s / sqrt(tasks)`, s with `tasks - 1` degrees of freedom."""
    per_task = np.asarray(per_task, np.float64)
    spread = per_task.std(axis=0, ddof=1)
    return Accuracy(per_task.mean(axis=0), 1.96 * spread / np.sqrt(len(per_task)), per_task)


def percent(accuracy: Accuracy, step: int | tuple[int, ...] = ()) -> str:
    """An accuracy as it stands in a table, such as "98.02 ± 0.21 %"; `step` indexes its mean."""
    mean, interval = accuracy.mean[step], accuracy.interval[step]
    return f"{100 * mean:.2f} ± {100 * interval:.2f} %"


def transductive(apply: Callable[..., Any]) -> Predict:
    """Predicts queries as one batch: batch norm takes its statistics from all of them.

    Args:
      apply: `(params, inputs) -> logits`.

    Returns:
      `predict_fn(params, support, inputs) -> logits`, for `maml_predict`.
    """

    def predict_fn(params: Params, support: Batch, inputs: PyTree) -> Array:
        del support
        return apply(params, inputs)

    return predict_fn


def inductive(apply: Callable[..., Any]) -> Predict:
    """Predicts each query by itself: batch norm takes its statistics from the support set.

    Args:
      apply: `(params, inputs, num_reference=n) -> logits`, where statistics are those of the first
        `n` inputs.

    Returns:
      `predict_fn(params, (inputs, labels), inputs) -> logits`, for `maml_predict`.
    """

    def predict_fn(params: Params, support: Batch, inputs: PyTree) -> Array:
        reference, labels = support
        both = jax.tree.map(lambda *parts: jnp.concatenate(parts), reference, inputs)
        return apply(params, both, num_reference=len(labels))[len(labels) :]

    return predict_fn


def both_modes(apply: Callable[..., Any]) -> Predict:
    """`{"transductive": logits, "inductive": logits}` of the same adapted parameters."""
    modes = {"transductive": transductive(apply), "inductive": inductive(apply)}

    def predict_fn(params: Params, support: Batch, inputs: PyTree) -> dict[str, Array]:
        return {name: mode(params, support, inputs) for name, mode in modes.items()}

    return predict_fn


@functools.partial(jax.jit, static_argnames=("predict", "sample", "num_tasks", "chunk", "mesh"))
def _task_accuracies(params, data, key, *, predict, sample, num_tasks, chunk, mesh):
    """The pytree of `predict` with the accuracies `(num_tasks, ...)` of each array of logits."""

    def task_accuracy(params, data, key):
        episode_key, predict_key = jax.random.split(key)
        episode = sample(episode_key, data)
        inputs, labels = episode.query
        logits = predict(params, episode.support, inputs, predict_key)
        return jax.tree.map(lambda x: _accuracy(x, labels), logits)

    def accuracies(params, data, keys):
        # A batch of one would still turn every product into a batched one.
        batch_size = chunk if chunk > 1 else None
        one_task = functools.partial(task_accuracy, params, data)
        return jax.lax.map(one_task, keys, batch_size=batch_size)

    # What the devices don't divide is filled up with further tasks, which are then dropped.
    keys = task_keys(key, -(-num_tasks // mesh.size) * mesh.size)
    spread = jax.shard_map(
        accuracies,
        mesh=mesh,
        in_specs=(P(), P(), P("tasks")),
        out_specs=P("tasks"),
        # With it the gradient inside `predict` would be summed over the tasks of all devices.
        check_vma=False,
    )
    return jax.tree.map(lambda x: x[:num_tasks], spread(params, data, keys))


def _accuracy(logits: Float[Array, "*steps queries ways"], labels) -> Float[Array, "*steps"]:
    if logits.ndim < 2 or logits.shape[-2] != len(labels):
        raise ValueError(
            f"the logits have shape {logits.shape} for {len(labels)} queries; "
            f"predict must give (..., {len(labels)}, ways)"
        )
    right = (logits.argmax(-1) == labels) & ~jnp.isnan(logits).any(-1)
    return right.mean(-1)
