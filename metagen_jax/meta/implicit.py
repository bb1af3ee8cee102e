"""Implicit MAML: the meta-gradient from where the inner loop ends, whichever way it went.

Rajeswaran, Finn, Kakade, Levine: Meta-Learning with Implicit Gradients, 2019.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from metagen_jax.errors import UserError
from metagen_jax.gradients import gradients
from metagen_jax.meta.adapt import adapt
from metagen_jax.meta.maml import maml_predict
from metagen_jax.types import Batch, Episode, GradFn, LossFn, Metrics, Params, PredictFn, PRNGKey


def implicit_maml_gradients(
    loss_fn: LossFn,
    *,
    inner_optimizer: optax.GradientTransformation,
    num_steps: int,
    strength: float,
    num_cg_steps: int,
    damping: float = 0.0,
) -> GradFn:
    """The implicit meta-gradient over one `Episode`, in memory that does not grow with the steps.

    The inner loop approaches `phi = argmin loss_fn(phi, support) + strength / 2 |phi - theta|^2`,
    and the derivative of that minimum with respect to theta gives

    `g = (I + H / strength)^-1 grad loss_fn(phi, query)`, H the Hessian of `loss_fn(phi, support)`,

    solved by conjugate gradients with Hessian-vector products: algorithms 1 and 2, equations 3 to
    6 of Rajeswaran et al. 2019. Unlike there, conjugate gradients start from the right-hand side,
    so that without steps this is the first-order gradient, and directions that the support set
    leaves flat are right from the start.

    g is the gradient of the query loss only as far as phi is the minimum (watch
    `inner_gradient_norm`; an inner rate that decays helps) and the equation is solved (watch
    `cg_residual`). `strength + damping` must exceed minus the smallest eigenvalue of H, otherwise
    conjugate gradients may give anything; they stop at the first direction of negative curvature
    that they meet.

    Args:
      loss_fn: the loss of support and of query, each any pytree. The inner problem must be one
        function, so that all of its steps, and H, see the whole support set and one key.
      inner_optimizer: any optax transformation. For SGD the rate must be below 2 over the sum of
        `strength` and the largest eigenvalue of H.
      num_steps: inner steps; 16 to 25 in the paper.
      strength: of the pull towards theta; 2.0 in the paper.
      num_cg_steps: steps of conjugate gradients; 5 in the paper.
      damping: added to `strength` in the equation for g alone. From 0 to infinity, g goes from the
        implicit to the first-order gradient; the authors' program adds 10.

    Returns:
      A `GradFn` over `Episode(support, query)` whose metrics are those of `loss_fn` on the query
      after adaptation, and that `loss`; `cg_residual`, `|A g - b| / |b|` of the equation `A g = b`
      (0 where b is 0); and `inner_gradient_norm`, the norm of the inner problem's gradient at phi.

    Raises:
      UserError: if `strength` is not positive, or `num_cg_steps` or `damping` is negative.
    """
    _check_strength(strength)
    if num_cg_steps < 0 or damping < 0:
        raise UserError(
            f"num_cg_steps is {num_cg_steps} and damping {damping}; give 0 or more for each"
        )
    query_grad_fn = gradients(loss_fn)

    def grad_fn(params: Params, episode: Episode, key: PRNGKey) -> tuple[Params, Metrics]:
        support_key, query_key = jax.random.split(key)
        inner_grad_fn = gradients(_proximal(loss_fn, params, strength, support_key))
        phi = adapt(
            inner_grad_fn,
            params,
            episode.support,
            support_key,
            optimizer=inner_optimizer,
            num_steps=num_steps,
            gradient="first_order",
        ).params
        # The Jacobian of the inner problem's gradient is H + strength I.
        inner_gradient, jacobian = jax.linearize(
            lambda phi: inner_grad_fn(phi, episode.support, support_key)[0], phi
        )

        def matrix(v: Params) -> Params:
            product = optax.tree.add_scale(jacobian(v), damping, v)
            return optax.tree.scale(1 / (strength + damping), product)

        query_gradient, metrics = query_grad_fn(phi, episode.query, query_key)
        solution, residual = _conjugate_gradients(matrix, query_gradient, num_cg_steps)
        return solution, {
            **metrics,
            "cg_residual": residual,
            "inner_gradient_norm": optax.tree.norm(inner_gradient),
        }

    return grad_fn


def implicit_maml_predict(
    loss_fn: LossFn,
    predict_fn: Callable[[Params, Batch, PyTree], PyTree],
    *,
    inner_optimizer: optax.GradientTransformation,
    num_steps: int,
    strength: float,
    every_step: bool = False,
) -> PredictFn:
    """Predictions for new inputs after adaptation to a support set by the proximal inner problem.

    Args:
      loss_fn: the loss to adapt by.
      predict_fn: `(adapted params, support, inputs) -> predictions`; see `maml_predict`.
      inner_optimizer: as in `implicit_maml_gradients`.
      num_steps: inner steps; may differ from training.
      strength: of the pull towards the initialisation.
      every_step: predict with the parameters before the first and after each step; predictions
        then have a leading axis of `num_steps + 1`.

    Returns:
      `predict(params, support, inputs, key) -> predictions`.

    Raises:
      UserError: if `strength` is not positive.
    """
    _check_strength(strength)

    def predict(params: Params, support: Batch, inputs: PyTree, key: PRNGKey) -> PyTree:
        adapt_and_predict = maml_predict(
            _proximal(loss_fn, params, strength, key),
            predict_fn,
            inner_optimizer=inner_optimizer,
            num_steps=num_steps,
            every_step=every_step,
        )
        return adapt_and_predict(params, support, inputs, key)

    return predict


def _check_strength(strength: float) -> None:
    if strength <= 0:
        raise UserError(f"strength is {strength}; give a positive one, 2.0 is usual")


def _proximal(loss_fn: LossFn, centre: Params, strength: float, key: PRNGKey) -> LossFn:
    """`loss_fn(phi, batch) + strength / 2 |phi - centre|^2`, the same function at every step."""

    def proximal_loss(params: Params, batch: Batch, _: PRNGKey) -> tuple[Array, Metrics]:
        loss, metrics = loss_fn(params, batch, key)
        distance = optax.tree.norm(optax.tree.sub(params, centre), squared=True)
        return loss + strength / 2 * distance, metrics

    return proximal_loss


class _State(NamedTuple):
    """Of conjugate gradients: the solution, `b - A x`, where to go next, and `|b - A x|^2`."""

    solution: Params
    residual: Params
    direction: Params
    square: Float[Array, ""]


def _conjugate_gradients(
    matrix: Callable[[Params], Params], b: Params, num_steps: int
) -> tuple[Params, Float[Array, ""]]:
    """`num_steps` steps for `A x = b` from `x = b`, A symmetric, and `|A x - b| / |b|`."""

    def step(_, state: _State) -> _State:
        product = matrix(state.direction)
        curvature = jnp.asarray(optax.tree.vdot(state.direction, product))
        # Solved, or not positive definite: from here on every step leaves the state as it is.
        stop = (curvature <= 0) | (state.square <= 0)
        length = jnp.where(stop, 0.0, state.square / jnp.where(stop, 1.0, curvature))
        residual = optax.tree.add_scale(state.residual, -length, product)
        square = optax.tree.norm(residual, squared=True)
        memory = square / jnp.where(stop, 1.0, state.square)
        return _State(
            solution=optax.tree.add_scale(state.solution, length, state.direction),
            residual=residual,
            direction=optax.tree.where(
                stop, state.direction, optax.tree.add_scale(residual, memory, state.direction)
            ),
            square=square,
        )

    residual = optax.tree.sub(b, matrix(b))
    start = _State(b, residual, residual, optax.tree.norm(residual, squared=True))
    solution = jax.lax.fori_loop(0, num_steps, step, start).solution
    # The residual that the steps carry goes on shrinking when rounding has stopped the true one.
    error = optax.tree.norm(optax.tree.sub(matrix(solution), b))
    norm = optax.tree.norm(b)
    return solution, jnp.where(norm > 0, error / jnp.where(norm > 0, norm, 1.0), 0.0)
