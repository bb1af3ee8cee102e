"""Model-agnostic meta-learning: an initialisation from which a few steps suffice.

Finn, Abbeel, Levine: Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, 2017.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from metagen_jax.errors import UserError
from metagen_jax.gradients import gradients, mixed_gradients
from metagen_jax.meta.adapt import BatchAt, Gradient, Step, adapt, at_step, check_inner_loop
from metagen_jax.types import (
    Batch,
    Episode,
    GradFn,
    LossFn,
    Metrics,
    Params,
    PredictFn,
    PRNGKey,
    Trainable,
)


def maml_loss(
    loss_fn: LossFn,
    *,
    inner_optimizer: optax.GradientTransformation,
    num_steps: int,
    gradient: Gradient = "remat",
    trainable: Trainable | None = None,
    per_step: Trainable | None = None,
    query_loss_weights: Float[Array | np.ndarray, " steps"] | None = None,
    batch_at: BatchAt | None = None,
) -> LossFn:
    """The query loss after adaptation to the support set, as a loss over one `Episode`.

    `L(theta) = loss_fn(theta_K, query)`, `theta_{i+1} = theta_i - alpha grad loss_fn(theta_i,
    support)` for plain SGD: equation 1 of Finn et al. 2017. With weights w of the steps
    it is `sum_i w_i loss_fn(theta_i, query)`, i = 1..K, the multi-step loss of MAML++ (Antoniou et
    al. 2019).

    Args:
      loss_fn: the loss of support and of query, each any pytree.
      inner_optimizer: any optax transformation; `metagen_jax.meta.adapt` says which are safe.
      num_steps: inner steps K; 0 gives the plain loss on the query.
      gradient: "remat" and "mixed" for the exact meta-gradient in memory that grows with parameters
        and optimiser states alone, each inner step being computed again, by `jax.checkpoint` or
        as `mixed_gradients` does it; "reverse" for the same one in memory that grows with all that
        the inner steps compute; "first_order" for FOMAML.
      trainable: which leaves the inner loop moves, by path; None moves all.
      per_step: which leaves have an entry for each number of inner steps taken; see `adapt`.
      query_loss_weights: `(num_steps,)`, the weight of the query loss after each step.
      batch_at: mini-batches for the inner steps; see `adapt`.

    Returns:
      A `LossFn` over `Episode(support, query)` whose metrics are those of `loss_fn` on the query
      after the last step.

    Raises:
      UserError: for a negative `num_steps`, an unknown `gradient`, or if `query_loss_weights` has
        not one weight a step. The loss itself raises one for a `trainable` or a `per_step` that
        chooses no leaf.
    """
    check_inner_loop(num_steps, gradient)
    grad_fn = mixed_gradients(loss_fn) if gradient == "mixed" else gradients(loss_fn)
    weights = None if query_loss_weights is None else jnp.asarray(query_loss_weights)
    if weights is not None and weights.shape != (num_steps,):
        raise UserError(
            f"query_loss_weights has shape {weights.shape}; give one weight for each of the "
            f"{num_steps} inner steps, shape ({num_steps},)"
        )

    def episode_loss(params: Params, episode: Episode, key: PRNGKey) -> tuple[Array, Metrics]:
        adapt_key, query_key = jax.random.split(key)

        def query_loss(adapted: Params, step: Step) -> tuple[Array, Metrics]:
            return loss_fn(at_step(adapted, step, per_step), episode.query, query_key)

        adapted = adapt(
            grad_fn,
            params,
            episode.support,
            adapt_key,
            optimizer=inner_optimizer,
            num_steps=num_steps,
            gradient=gradient,
            trainable=trainable,
            per_step=per_step,
            batch_at=batch_at,
            trajectory=weights is not None,
        )
        if weights is None:
            return query_loss(adapted.params, num_steps)
        after_each_step = jax.tree.map(lambda x: x[1:], adapted.trajectory)
        steps = jnp.arange(1, num_steps + 1)
        losses, metrics = jax.lax.map(lambda at: query_loss(*at), (after_each_step, steps))
        return weights @ losses, jax.tree.map(lambda x: x[-1], metrics)

    return episode_loss


def maml_gradients(
    grad_fn: GradFn,
    *,
    inner_optimizer: optax.GradientTransformation,
    num_steps: int,
    gradient: Gradient = "remat",
    trainable: Trainable | None = None,
    per_step: Trainable | None = None,
    batch_at: BatchAt | None = None,
) -> GradFn:
    """The meta-gradient where what is trained is a direction and no loss, as of two players.

    `(d theta_K / d theta)^T grad_fn(theta_K, query)`, theta_K adapted to the support set: the
    direction of the query at the adapted parameters, pulled back to the initialisation. It is
    `gradients(maml_loss(loss_fn, ...))` for `grad_fn = gradients(loss_fn)`. In a game each player's
    query loss is so differentiated by its own adapted parameters, and by all of the initialisation
    that these depend on: each player's initialisation also serves the other player's adaptation.

    Args:
      grad_fn: the direction on support and on query, such as
        `metagen_jax.generative.gan.gan_gradients`.
      inner_optimizer: as in `maml_loss`, and so are the others.
      num_steps: inner steps K.
      gradient: as in `maml_loss`; "mixed" is then what `grad_fn` makes of it, see `adapt`.
      trainable: which leaves the inner loop moves, by path; None moves all.
      per_step: which leaves have an entry for each number of inner steps taken; see `adapt`.
      batch_at: mini-batches for the inner steps; see `adapt`.

    Returns:
      A `GradFn` over `Episode(support, query)` whose metrics are those of `grad_fn` on the query.

    Raises:
      UserError: for a negative `num_steps` or an unknown `gradient`. The direction itself raises
        one for a `trainable` or a `per_step` that chooses no leaf.
    """
    check_inner_loop(num_steps, gradient)

    def episode_gradients(params: Params, episode: Episode, key: PRNGKey) -> tuple[Params, Metrics]:
        adapt_key, query_key = jax.random.split(key)

        def adapted(params: Params) -> Params:
            adapted = adapt(
                grad_fn,
                params,
                episode.support,
                adapt_key,
                optimizer=inner_optimizer,
                num_steps=num_steps,
                gradient=gradient,
                trainable=trainable,
                per_step=per_step,
                batch_at=batch_at,
            )
            return at_step(adapted.params, num_steps, per_step)

        at_query, pull_back = jax.vjp(adapted, params)
        direction, metrics = grad_fn(at_query, episode.query, query_key)
        return pull_back(direction)[0], metrics

    return episode_gradients


def maml_predict(
    loss_fn: LossFn,
    predict_fn: Callable[[Params, Batch, PyTree], PyTree],
    *,
    inner_optimizer: optax.GradientTransformation,
    num_steps: int,
    trainable: Trainable | None = None,
    per_step: Trainable | None = None,
    batch_at: BatchAt | None = None,
    every_step: bool = False,
) -> PredictFn:
    """Predictions for new inputs after adaptation to a support set.

    Args:
      loss_fn: the loss to adapt by.
      predict_fn: `(adapted params, support, inputs) -> predictions`. It sees the support set so
        that it may take normalisation statistics from it.
      inner_optimizer: as in `maml_loss`.
      num_steps: inner steps; may differ from training.
      trainable: which leaves the inner loop moves, by path; None moves all.
      per_step: which leaves have an entry for each number of inner steps taken; see `adapt`.
      batch_at: mini-batches for the inner steps; see `adapt`.
      every_step: predict with the parameters before the first and after each step; predictions
        then have a leading axis of `num_steps + 1`.

    Returns:
      `predict(params, support, inputs, key) -> predictions`.

    Raises:
      UserError: for a negative `num_steps`. The prediction itself raises one for a `trainable` or a
        `per_step` that chooses no leaf.
    """
    check_inner_loop(num_steps, "reverse")
    grad_fn = gradients(loss_fn)

    def predict(params: Params, support: Batch, inputs: PyTree, key: PRNGKey) -> PyTree:
        adapted = adapt(
            grad_fn,
            params,
            support,
            key,
            optimizer=inner_optimizer,
            num_steps=num_steps,
            trainable=trainable,
            per_step=per_step,
            batch_at=batch_at,
            trajectory=every_step,
        )

        def predict_at(adapted: Params, step: Step) -> PyTree:
            return predict_fn(at_step(adapted, step, per_step), support, inputs)

        if every_step:
            steps = jnp.arange(num_steps + 1)
            return jax.lax.map(lambda at: predict_at(*at), (adapted.trajectory, steps))
        return predict_at(adapted.params, num_steps)

    return predict
