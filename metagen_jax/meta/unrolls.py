"""Training an update rule through inner runs that go on from step to step, by two gradients.

    unroll = truncated_unroll(loss_fn, rule=learned_optimizer, num_steps=10)
    grad_fn = truncated_gradients(unroll)                      # or pes_gradients(unroll, std=0.01)
    direction, state, metrics = grad_fn(rule_params, state, key)
    state = restart(state, fresh_state, horizon=50)

All of this is for one task; `jax.vmap` or `metagen_jax.parallel.map_over_tasks` make it many.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32, PyTree

from metagen_jax.errors import UserError
from metagen_jax.gradients import gradients, mixed_gradients
from metagen_jax.meta.adapt import (
    BatchAt,
    Gradient,
    check_inner_loop,
    checkpoint_step,
    pass_direction,
)
from metagen_jax.meta.update_rules import Rule
from metagen_jax.types import Episode, LossFn, Metrics, Params, PRNGKey

# log(loss + floor) does not fall without end where a task is solved.
_LOG_FLOOR = 1e-3


class InnerState(NamedTuple):
    """An inner run under way on one task.

    Attributes:
      step: by which `restart` judges; counted from the phase that it was started with.
      params: what is being trained.
      opt_state: of the rule.
      task: `Episode(support, query)`: what gradients and what losses are taken on.
    """

    step: Int32[Array, ""]
    params: Params
    opt_state: Any
    task: Episode


Unroll = Callable[
    [PyTree, InnerState, PRNGKey], tuple[Float[Array, ""], tuple[InnerState, Metrics]]
]
"""`unroll(rule_params, state, key) -> (loss, (state, metrics))`: some steps of an inner run."""

CarriedGradFn = Callable[[PyTree, Any, PRNGKey], tuple[PyTree, Any, Metrics]]
"""`grad_fn(rule_params, state, key) -> (direction, state, metrics)`: a `GradFn` that goes on."""


def start_inner(
    rule: Rule, rule_params: PyTree, params: Params, task: Episode, *, step: int | Array = 0
) -> InnerState:
    """An inner run before its first step.

    Args:
      rule: `rule_params -> optimiser`.
      rule_params: of the rule.
      params: the inner initialisation.
      task: what to train on.
      step: the phase. Runs that begin together with phases of their own between 0 and their horizon
        end at different times, so that a batch of them shows every age from then on.
    """
    opt_state = rule(rule_params).init(params)
    return InnerState(jnp.asarray(step, jnp.int32), params, opt_state, task)


def truncated_unroll(
    loss_fn: LossFn,
    *,
    rule: Rule,
    num_steps: int,
    gradient: Gradient = "remat",
    log_loss: bool = False,
    batch_at: BatchAt | None = None,
) -> Unroll:
    """`num_steps` steps of an inner run from where it stands, and how good they were.

    `L = 1/K sum_k f(loss_fn(theta_k, query))`, `theta_k = theta_{k-1} + U_phi(grad
    loss_fn(theta_{k-1}, support))`, k = 1..K, f the identity or `log(x + 0.001)`.

    Args:
      loss_fn: the loss of support and of query. For the speed of optimisation let both be the
        training set of the task, for generalisation the query be other examples.
      rule: `rule_params -> optimiser`.
      num_steps: K.
      gradient: "first_order" takes the inner gradients for constants (Andrychowicz et al. 2016);
        for the others see `maml_loss`.
      log_loss: whether to take the logarithm of each loss, to which all orders of magnitude count.
      batch_at: `(examples, step, key) -> batch`, drawn anew for support and for query at each step;
        None takes all of both.

    Returns:
      `unroll(rule_params, state, key) -> (L, (state after K steps, {"last_loss": that after the
      last step}))` for one task.

    Raises:
      UserError: if `num_steps` is less than 1 or `gradient` unknown.
    """
    if num_steps < 1:
        raise UserError(f"num_steps is {num_steps}; give 1 or more inner steps for each unroll")
    check_inner_loop(num_steps, gradient)
    grad_fn = mixed_gradients(loss_fn) if gradient == "mixed" else gradients(loss_fn)

    def unroll(rule_params: PyTree, state: InnerState, key: PRNGKey):
        optimizer, task = rule(rule_params), state.task

        def step(carry, key):
            i, params, opt_state = carry
            support_key, grad_key, query_key, loss_key = jax.random.split(key, 4)
            support, query = task
            if batch_at is not None:
                support, query = batch_at(support, i, support_key), batch_at(query, i, query_key)
            direction, _ = grad_fn(params, support, grad_key)
            updates, opt_state = optimizer.update(
                pass_direction(direction, gradient), opt_state, params
            )
            params = optax.apply_updates(params, updates)
            loss, _ = loss_fn(params, query, loss_key)
            return (i + 1, params, opt_state), loss

        start = (state.step, state.params, state.opt_state)
        keys = jax.random.split(key, num_steps)
        end, losses = jax.lax.scan(checkpoint_step(step, gradient), start, keys)
        values = jnp.log(losses + _LOG_FLOOR) if log_loss else losses
        return values.mean(), (InnerState(*end, task), {"last_loss": losses[-1]})

    return unroll


def truncated_gradients(unroll: Unroll) -> CarriedGradFn:
    """The gradient of one unroll, by backpropagation through its steps and no further.

    It is biased: what the rule did in earlier unrolls is taken for given.

    Args:
      unroll: see `truncated_unroll`.

    Returns:
      `grad_fn(rule_params, InnerState, key) -> (d L / d rule_params, InnerState, metrics)`.
    """
    value_and_grad = jax.value_and_grad(unroll, has_aux=True)

    def grad_fn(
        rule_params: PyTree, state: InnerState, key: PRNGKey
    ) -> tuple[PyTree, InnerState, Metrics]:
        (loss, (state, metrics)), direction = value_and_grad(rule_params, state, key)
        return direction, state, {"loss": loss, **metrics}

    return grad_fn


class PESState(NamedTuple):
    """A pair of inner runs on one task, with opposite perturbations of the rule.

    Attributes:
      positive: the run with the perturbations as drawn.
      negative: that with their opposites.
      perturbation: the sum of those drawn since the runs began.
    """

    positive: InnerState
    negative: InnerState
    perturbation: PyTree

    @property
    def step(self) -> Int32[Array, "*tasks"]:
        return self.positive.step


def start_pes(state: InnerState, rule_params: PyTree) -> PESState:
    """A pair of inner runs that begins at the same state."""
    return PESState(state, state, jax.tree.map(jnp.zeros_like, rule_params))


def pes_gradients(unroll: Unroll, *, std: float) -> CarriedGradFn:
    """Persistent evolution strategies: an estimate that is not biased by truncation.

    `g = xi (L(phi + eps) - L(phi - eps)) / (2 std^2)`, `eps ~ N(0, std^2)`, xi the sum of all eps
    since the inner runs began, each of the two runs going on with its own parameters: algorithm 2
    of Vicol, Metz and Sohl-Dickstein 2021 for one antithetic pair, both of whose runs take the same
    keys. The mean of g over the unrolls of a whole run is in expectation the gradient, smoothed by
    the perturbations, of the mean of L over them. Its variance grows with their number.

    Args:
      unroll: see `truncated_unroll`. Nothing is differentiated.
      std: of a perturbation.

    Returns:
      `grad_fn(rule_params, PESState, key) -> (g, PESState, metrics)`, the metrics being the means
      of both runs.

    Raises:
      UserError: if `std` is not positive.
    """
    if not std > 0:
        raise UserError(f"std is {std}; give a positive standard deviation")

    def grad_fn(
        rule_params: PyTree, state: PESState, key: PRNGKey
    ) -> tuple[PyTree, PESState, Metrics]:
        noise_key, unroll_key = jax.random.split(key)
        noise = optax.tree.random_like(noise_key, rule_params, jax.random.normal)
        noise = jax.tree.map(lambda x: std * x, noise)
        above, below = (jax.tree.map(op, rule_params, noise) for op in (jnp.add, jnp.subtract))
        plus, (positive, metrics) = unroll(above, state.positive, unroll_key)
        minus, (negative, others) = unroll(below, state.negative, unroll_key)
        perturbation = jax.tree.map(jnp.add, state.perturbation, noise)
        slope = (plus - minus) / (2 * std**2)
        direction = jax.tree.map(lambda x: slope * x, perturbation)
        both = {"loss": plus, **metrics}, {"loss": minus, **others}
        means = jax.tree.map(lambda a, b: (a + b) / 2, *both)
        return direction, PESState(positive, negative, perturbation), means

    return grad_fn


Run = TypeVar("Run", InnerState, PESState)


def restart(state: Run, fresh: Run, *, horizon: int) -> Run:
    """`state`, or `fresh` in its place if it has reached `horizon` steps. Of one task."""
    done = state.step >= horizon
    return jax.tree.map(lambda new, old: jnp.where(done, new, old), fresh, state)
