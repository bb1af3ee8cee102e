"""Few-shot accuracy: many tasks of unseen classes from a fixed key, with its 95 % interval.

With normalisation by the current batch a figure depends on what a query is normalised with, and
must say so. *Transductive*: the queries of an episode together, so that each answer sees the other
questions. *Inductive*: the support set, so that each query is answered by itself.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from metagen_jax.chunks import Chunk
from metagen_jax.errors import UserError
from metagen_jax.evaluation.estimates import estimate
from metagen_jax.gradients import task_keys
from metagen_jax.parallel import map_over_tasks, replicate
from metagen_jax.types import Batch, Episode, Params, PredictFn, PRNGKey

Sample = Callable[[PRNGKey, Any], Episode]
"""`sample(key, data) -> Episode((inputs, labels), (inputs, labels))`, labels 0..ways-1."""

Predict = Callable[[Params, Batch, PyTree], PyTree]
"""`predict_fn(params, support, inputs) -> logits`, what `maml_predict` asks adapted parameters."""

Score = Callable[[Array, Array], PyTree]
"""`score(logits (..., queries, ways), labels (queries,)) -> numbers (...)`, any pytree of them."""


def evaluate_few_shot(
    predict: PredictFn,
    params: Params,
    sample: Sample,
    data: PyTree,
    *,
    key: PRNGKey,
    num_tasks: int = 1000,
    score: Score | None = None,
    chunk: Chunk = "auto",
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
      score: what is measured in place of the accuracy; always pass the same function.
      chunk: how many at once on each device; "auto" goes by backend and memory, as in
        `metagen_jax.mean_over_tasks`.
      devices: what to spread the tasks over; None takes all of this host.

    Returns:
      The pytree of `predict` with an `Estimate` of the accuracy, a fraction, for each array of
      logits, or of what `score` gives for it. A query with a NaN among its logits counts as wrong.

    Raises:
      UserError: if `num_tasks` is less than 2, `chunk` less than 1, or the logits don't match the
        labels.
    """
    if num_tasks < 2:
        raise UserError(f"num_tasks is {num_tasks}; an interval needs 2 or more, 1000 is usual")
    devices = tuple(jax.local_devices() if devices is None else devices)
    shared = replicate((params, data), devices=devices)
    scores = _task_scores(
        shared,
        replicate(key, devices=devices),
        predict=predict,
        sample=sample,
        num_tasks=num_tasks,
        score=accuracy if score is None else score,
        chunk=chunk,
        devices=devices,
    )
    return jax.tree.map(estimate, scores)


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


_STATIC = ("predict", "sample", "num_tasks", "score", "chunk", "devices")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _task_scores(shared, key, *, predict, sample, num_tasks, score, chunk, devices):
    """The pytree of `predict` with the scores `(num_tasks, ...)` of each array of logits."""

    def task_score(shared, key):
        params, data = shared
        episode_key, predict_key = jax.random.split(key)
        episode = sample(episode_key, data)
        inputs, labels = episode.query
        logits = predict(params, episode.support, inputs, predict_key)
        return jax.tree.map(lambda x: score(x, labels), logits)

    over_tasks = map_over_tasks(task_score, devices=devices, chunk=chunk)
    return over_tasks(shared, task_keys(key, num_tasks))


def accuracy(
    logits: Float[Array, "*steps queries ways"], labels: Int[Array, " labels"]
) -> Float[Array, "*steps"]:
    """The fraction of queries whose largest logit is that of their class; one with a NaN is wrong.

    Raises:
      UserError: if there are not logits for each query.
    """
    if logits.ndim < 2 or logits.shape[-2] != len(labels):
        raise UserError(
            f"the logits have shape {logits.shape} for {len(labels)} queries; "
            f"predict must give (..., {len(labels)}, ways)"
        )
    right = (logits.argmax(-1) == labels) & ~jnp.isnan(logits).any(-1)
    return right.mean(-1)
