"""CAVIA: a few context parameters hold all that a task teaches, the others are shared by all tasks.

Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson: Fast Context Adaptation via Meta-Learning, 2019.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from metagen_jax.errors import UserError
from metagen_jax.meta.adapt import Gradient
from metagen_jax.meta.maml import maml_loss, maml_predict
from metagen_jax.types import Batch, Episode, LossFn, Metrics, Params, PredictFn, PRNGKey


def cavia_params(shared: Params, num_context: int) -> Params:
    """What CAVIA trains: `{"shared": shared, "context": zeros (num_context,)}`.

    Args:
      shared: the parameters of a net that takes the context as an input, such as `Conv4`'s, or
        an MLP's that sees it beside each input.
      num_context: context parameters.

    Raises:
      UserError: if `num_context` is not positive.
    """
    if num_context < 1:
        raise UserError(f"num_context is {num_context}; give 1 or more context parameters")
    return {"shared": shared, "context": jnp.zeros(num_context)}


def cavia_loss(
    loss_fn: LossFn,
    *,
    inner_optimizer: optax.GradientTransformation,
    num_steps: int,
    gradient: Gradient = "remat",
) -> LossFn:
    """The query loss after adapting the context to the support set, as a loss over one `Episode`.

    `L(theta) = loss_fn({theta, c_K}, query)`, `c_0 = 0`, `c_{i+1} = c_i - alpha d loss_fn({theta,
    c_i}, support) / d c_i` for plain SGD: equations 3 and 4 of Zintgraf et al. 2019.

    Args:
      loss_fn: the loss of support and of query, on parameters as `cavia_params` makes them. Its
        gradient with respect to the context must not vanish at zero, or nothing is ever learnt.
      inner_optimizer: any optax transformation; `metagen_jax.meta.adapt` says which are safe.
      num_steps: inner steps K.
      gradient: "remat" for the exact meta-gradient, "first_order" to take each inner gradient
        for a constant; for the others see `maml_loss`.

    Returns:
      A `LossFn` over `Episode(support, query)`, its metrics those of `loss_fn` on the query after
      the last step. Its gradient with respect to the context is zero: each task starts from a
      context of zeros, whatever `params` holds. It raises a UserError for other parameters.
    """
    from_zero = maml_loss(
        loss_fn,
        inner_optimizer=inner_optimizer,
        num_steps=num_steps,
        gradient=gradient,
        trainable=_is_context,
    )

    def episode_loss(params: Params, episode: Episode, key: PRNGKey) -> tuple[Array, Metrics]:
        return from_zero(_with_context_zero(params), episode, key)

    return episode_loss


def cavia_predict(
    loss_fn: LossFn,
    predict_fn: Callable[[Params, Batch, PyTree], PyTree],
    *,
    inner_optimizer: optax.GradientTransformation,
    num_steps: int,
    every_step: bool = False,
) -> PredictFn:
    """Predictions for new inputs after adapting the context to a support set.

    Args:
      loss_fn: the loss to adapt by.
      predict_fn: `(adapted params, support, inputs) -> predictions`, on parameters as
        `cavia_params` makes them; see `maml_predict`.
      inner_optimizer: as in `cavia_loss`.
      num_steps: inner steps; may differ from training.
      every_step: predict with the parameters before the first and after each step; predictions
        then have a leading axis of `num_steps + 1`.

    Returns:
      `predict(params, support, inputs, key) -> predictions`.
    """
    from_zero = maml_predict(
        loss_fn,
        predict_fn,
        inner_optimizer=inner_optimizer,
        num_steps=num_steps,
        trainable=_is_context,
        every_step=every_step,
    )

    def predict(params: Params, support: Batch, inputs: PyTree, key: PRNGKey) -> PyTree:
        return from_zero(_with_context_zero(params), support, inputs, key)

    return predict


def _is_context(path: str) -> bool:
    return path == "context"


def _with_context_zero(params: Params) -> Params:
    if not isinstance(params, dict) or set(params) != {"shared", "context"}:
        given = sorted(params) if isinstance(params, dict) else type(params).__name__
        raise UserError(
            f'the parameters are {given}; give a dict of "shared" and "context", as '
            "cavia_params(shared, num_context) makes it"
        )
    return {"shared": params["shared"], "context": jnp.zeros_like(params["context"])}
