"""Test log-likelihoods: exact, bounds, and importance sampled ones, with their 95 % interval.

A figure says what it is: exact; a lower bound (ELBO, uniform dequantisation, K importance samples);
how grey values were made binary, once for all ("static") or anew each time ("dynamic"); and it is
in nats an example or, by `metagen_jax.generative.likelihoods.bits_per_dim`, in bits per dimension
of the original data.

Wu, Burda, Salakhutdinov, Grosse: On the quantitative analysis of decoder-based generative models,
2017.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import logsumexp
from jaxtyping import Array, PyTree

from metagen_jax.errors import UserError
from metagen_jax.evaluation.estimates import Estimate, estimate
from metagen_jax.generative.maximum_likelihood import LogProb
from metagen_jax.generative.vae import Infer
from metagen_jax.gradients import count_tasks, task_keys
from metagen_jax.parallel import map_over_tasks, replicate
from metagen_jax.types import Params, PRNGKey


def evaluate_log_prob(
    log_prob: LogProb,
    params: Params,
    examples: PyTree,
    *,
    key: PRNGKey,
    chunk: int = 100,
    devices: Sequence[jax.Device] | None = None,
) -> Estimate:
    """The mean log-probability of test examples, in nats, and its 95 % interval over them.

    Compiled once for each `log_prob`: to evaluate again, pass the same function.

    Args:
      log_prob: `(params, example, key) -> nats`, of one example.
      params: what it takes.
      examples: any pytree of arrays with a leading axis of 2 examples or more.
      key: example `n` has `fold_in(key, n)`, whatever the chunk and the devices.
      chunk: how many examples at once on each device.
      devices: what to spread the examples over; None takes all of this host.

    Returns:
      The estimate; a mean of minus infinity says that some example has probability zero or a NaN.

    Raises:
      UserError: for fewer than 2 examples, or a log-probability that is not a scalar.
    """
    num_examples = count_tasks(examples)
    if num_examples < 2:
        raise UserError("there is 1 example; an interval needs 2 or more")
    devices = tuple(jax.local_devices() if devices is None else devices)
    tasks = (examples, task_keys(key, num_examples))
    log_probs = _log_probs(log_prob, min(chunk, num_examples), devices)(
        replicate(params, devices=devices), tasks
    )
    if log_probs.shape != (num_examples,):
        raise UserError(
            f"the log-probability of an example has shape {log_probs.shape[1:]}; "
            "give one number, summed over its elements"
        )
    # Of losses, which `estimate` takes for infinitely bad where one is not finite.
    losses = estimate(-log_probs)
    return losses._replace(mean=-losses.mean, per_task=-losses.per_task)


@functools.cache
def _log_probs(log_prob: LogProb, chunk: int, devices: tuple[jax.Device, ...]):
    def of_one(params: Params, task: tuple[Any, PRNGKey]) -> Array:
        return log_prob(params, *task)

    return jax.jit(map_over_tasks(of_one, devices=devices, chunk=chunk))


def importance_sampled_log_prob(infer: Infer, *, num_samples: int, chunk: int = 100) -> LogProb:
    """`importance_weighted_log_prob` for thousands of samples, in memory that does not grow.

    `log 1/K sum_k p(x, z_k) / q(z_k | x)`, a lower bound in expectation that rises to `log p(x)`
    with K. The result is the same for every chunk up to the order of summation.

    Args:
      infer: of one example.
      num_samples: K.
      chunk: how many at once. Need not divide K: the last chunk then has idle samples.

    Returns:
      `(params, x, key) -> nats`; sample `k` has `fold_in(key, k)`.

    Raises:
      UserError: for fewer than one sample, or a chunk of none.
    """
    for name, value in (("num_samples", num_samples), ("chunk", chunk)):
        if value < 1:
            raise UserError(f"{name} is {value}; give a positive number")
    chunk = min(chunk, num_samples)

    def log_prob(params: Params, x: Any, key: PRNGKey) -> Array:
        def log_weight(index: Array) -> Array:
            drawn = infer(params, x, jax.random.fold_in(key, index))
            weight = drawn.log_likelihood - drawn.log_ratio
            return jnp.where(index < num_samples, weight, -jnp.inf)

        def add(total: Array, start: Array) -> tuple[Array, None]:
            log_weights = jax.vmap(log_weight)(start + jnp.arange(chunk))
            return jnp.logaddexp(total, logsumexp(log_weights)), None

        nothing = jnp.full((), -jnp.inf, jnp.result_type(float))
        total, _ = jax.lax.scan(add, nothing, jnp.arange(0, num_samples, chunk))
        return total - math.log(num_samples)

    return log_prob
