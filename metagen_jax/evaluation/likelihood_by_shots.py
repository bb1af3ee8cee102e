"""How probable a model finds the next example of a class of which it has seen T examples.

A model that adapts by gradients (`adapted_log_probs`) and one that takes the examples for a
condition (`metagen_jax.generative.set_conditional`) are both `log_probs(params, support, queries,
key)`, and so meet on the same episodes. A figure says what `metagen_jax.evaluation.likelihood` asks
for, and beside it the number of episodes, of test classes and of steps, and that these were chosen
on validation classes.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from metagen_jax.data.set_episodes import first_shots
from metagen_jax.errors import UserError
from metagen_jax.evaluation.estimates import Estimate
from metagen_jax.evaluation.few_shot import Sample, evaluate_few_shot
from metagen_jax.generative.maximum_likelihood import LogProb
from metagen_jax.gradients import count_tasks, task_keys
from metagen_jax.meta.adapt import BatchAt
from metagen_jax.meta.update_rules import Rule, learned_rule_predict
from metagen_jax.types import Batch, Episode, LossFn, MetaParams, Params, PredictFn, PRNGKey

SHOTS = (0, 1, 2, 3, 4, 9)
"""The numbers of shots that are published."""

Candidate = TypeVar("Candidate")


class Adaptation(NamedTuple):
    """How to adapt, and the negative log-likelihood on the tasks by which that was chosen."""

    candidate: Any
    num_steps: int
    nll: Estimate


def query_log_probs(
    log_prob: LogProb, params: Params, queries: PyTree, key: PRNGKey
) -> Float[Array, " queries"]:
    """The log-probability of each query, in nats; query `n` has `fold_in(key, n)`."""
    keys = task_keys(key, count_tasks(queries))
    return jax.vmap(log_prob, in_axes=(None, 0, 0))(params, queries, keys)


def adapted_log_probs(
    loss_fn: LossFn,
    log_prob: LogProb,
    *,
    rule: Rule,
    num_steps: int,
    batch_at: BatchAt | None = None,
    every_step: bool = False,
) -> PredictFn:
    """Log-probabilities of queries after adaptation to a support set by gradients.

    It is `learned_rule_predict` of a generative model; without support examples no step is taken.

    Args:
      loss_fn: the loss to adapt by.
      log_prob: of one query: exact, or a bound of many samples, which may differ from the loss.
      rule: `rule_params -> optimiser`, such as `optax.sgd` of a rate, which so is an array and may
        change without compiling anew.
      num_steps: steps on the support set.
      batch_at: mini-batches for the steps; see `metagen_jax.meta.adapt.adapt`.
      every_step: before the first and after each step, a leading axis of `num_steps + 1`, which
        without support examples is one of 1.

    Returns:
      `log_probs(MetaParams(init, rule), support, queries, key)`, `(queries,)` in nats.
    """

    def log_probs(params: MetaParams, support: Batch, queries: PyTree, key: PRNGKey) -> Array:
        adapt_key, query_key = jax.random.split(key)

        def of_queries(adapted: Params, support: Batch, queries: PyTree) -> Array:
            del support
            return query_log_probs(log_prob, adapted, queries, query_key)

        if not len(jax.tree.leaves(support)[0]):
            alone = of_queries(params.init, support, queries)
            return alone[None] if every_step else alone
        predict = learned_rule_predict(
            loss_fn,
            of_queries,
            rule=rule,
            num_steps=num_steps,
            batch_at=batch_at,
            every_step=every_step,
        )
        return predict(params, support, queries, adapt_key)

    return log_probs


def evaluate_nll(
    log_probs: PredictFn,
    params: Params,
    sample: Sample,
    data: PyTree,
    *,
    num_shots: int,
    key: PRNGKey,
    num_tasks: int = 1000,
    chunk: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> PyTree:
    """The negative log-likelihood of a query given the first `num_shots` examples of its class.

    `-log p(x | x_1, ..., x_T)`, the mean over the queries of an episode and over episodes. With one
    key every number of shots has the same episodes, and of each the same queries.

    Args:
      log_probs: `(params, support, queries, key) -> nats`, any pytree of arrays `(..., queries)`.
      params: what it takes.
      sample: `(key, data) -> Episode(support, query)` of `num_shots` or more, such as
        `metagen_jax.data.set_episodes.sample_set_episode` gives.
      data: what `sample` draws from.
      num_shots: T.
      key, num_tasks, chunk, devices: as in `evaluate_few_shot`, of which this is a case.

    Returns:
      The pytree of `log_probs` with an `Estimate` in nats for each array, of shape `(...)`.

    Raises:
      UserError: as `evaluate_few_shot`; for fewer examples in the support sets; or if there are not
        log-probabilities for each query.
    """
    return evaluate_few_shot(
        log_probs,
        params,
        _cut(sample, num_shots),
        data,
        key=key,
        num_tasks=num_tasks,
        score=_mean_nll,
        chunk=chunk,
        devices=devices,
    )


def choose_adaptation(
    log_probs: PredictFn,
    candidates: Mapping[Candidate, Params],
    sample: Sample,
    data: PyTree,
    *,
    num_shots: int,
    key: PRNGKey,
    num_tasks: int = 200,
    chunk: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Adaptation:
    """The candidate and the number of steps of the lowest mean on the same validation tasks.

    Args:
      log_probs: from `adapted_log_probs` with `every_step=True`.
      candidates: what to call each, such as its rate, and its parameters.
      sample, data, num_shots, key, num_tasks, chunk, devices: as in `evaluate_nll`, but for
        validation data: test data would flatter the figure.

    Returns:
      The best; among equals the first candidate and the fewest steps.

    Raises:
      UserError: if there are no candidates, or `log_probs` is not of every step.
    """
    if not candidates:
        raise UserError("candidates is empty; give parameters to try")
    tried = {
        name: evaluate_nll(
            log_probs,
            params,
            sample,
            data,
            num_shots=num_shots,
            key=key,
            num_tasks=num_tasks,
            chunk=chunk,
            devices=devices,
        )
        for name, params in candidates.items()
    }
    grid = np.stack([nll.mean for nll in tried.values()])
    if grid.ndim != 2:
        raise UserError(
            f"log_probs gives values of shape {grid.shape[1:]} a task and must give one for each "
            "number of steps; make it with every_step=True"
        )
    row, step = (int(i) for i in np.unravel_index(grid.argmin(), grid.shape))
    name = list(tried)[row]
    return Adaptation(name, step, tried[name].at(step))


@functools.cache
def _cut(sample: Sample, num_shots: int) -> Sample:
    """`sample` with the first shots alone, and queries as `evaluate_few_shot` has them."""

    def cut(key: PRNGKey, data: PyTree) -> Episode:
        support, queries = first_shots(sample(key, data), num_shots)
        return Episode(support, (queries, jnp.arange(count_tasks(queries))))

    return cut


def _mean_nll(
    log_probs: Float[Array, "*steps queries"], index: Int[Array, " labels"]
) -> Float[Array, "*steps"]:
    if log_probs.shape[-1:] != index.shape:
        raise UserError(
            f"the log-probabilities have shape {log_probs.shape} for {len(index)} queries; "
            f"log_probs must give (..., {len(index)})"
        )
    return -log_probs.mean(-1)
