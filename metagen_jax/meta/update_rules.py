"""Learned update rules: the step of the inner loop, trained together with the initialisation.

A rule is `rule_params -> optax.GradientTransformation`, made inside the traced function so that the
outer gradient reaches its parameters. Those here have a part for each leaf of the parameters that
they move, and leave alone the leaves that `trainable` has left out, which stand as None in the
updates; the rule's own tree may hold parts for all of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Int32, PyTree

from metagen_jax.errors import UserError
from metagen_jax.meta.adapt import BatchAt, Gradient
from metagen_jax.meta.maml import maml_loss, maml_predict
from metagen_jax.types import (
    Batch,
    Episode,
    LossFn,
    MetaParams,
    Metrics,
    Params,
    PredictFn,
    PRNGKey,
    Trainable,
)

Rule = Callable[[PyTree], optax.GradientTransformation]
"""`rule(rule_params) -> optimiser` of the inner loop."""


def learned_rule_loss(
    loss_fn: LossFn,
    *,
    rule: Rule,
    num_steps: int,
    gradient: Gradient = "remat",
    trainable: Trainable | None = None,
    per_step: Trainable | None = None,
    query_loss_weights: Float[Array | np.ndarray, " steps"] | None = None,
    batch_at: BatchAt | None = None,
) -> LossFn:
    """The query loss after adaptation by a learned rule, as a loss over one `Episode`.

    `L(theta, phi) = loss_fn(theta_K, query)`, `theta_{i+1} = theta_i + U_phi(grad loss_fn(theta_i,
    support))`. `maml_loss` is the case of a rule without parameters, and its inner loop is used.

    Args:
      loss_fn: the loss of support and of query.
      rule: `rule_params -> optimiser`; `functools.partial` binds its options.
      num_steps: inner steps K.
      gradient: through the inner gradients, see `maml_loss`; the rule's parameters are trained by
        any, "first_order" too.
      trainable: which leaves the inner loop moves, by path; None moves all.
      per_step: which leaves have an entry for each number of inner steps taken.
      query_loss_weights: `(num_steps,)`, such as `annealed_weights` gives.
      batch_at: mini-batches for the inner steps; for these three see `adapt`.

    Returns:
      A `LossFn` of `MetaParams(init, rule)`; otherwise as that of `maml_loss`, which says what it
      raises.
    """

    def episode_loss(params: MetaParams, episode: Episode, key: PRNGKey) -> tuple[Array, Metrics]:
        loss = maml_loss(
            loss_fn,
            inner_optimizer=rule(params.rule),
            num_steps=num_steps,
            gradient=gradient,
            trainable=trainable,
            per_step=per_step,
            query_loss_weights=query_loss_weights,
            batch_at=batch_at,
        )
        return loss(params.init, episode, key)

    return episode_loss


def learned_rule_predict(
    loss_fn: LossFn,
    predict_fn: Callable[[Params, Batch, PyTree], PyTree],
    *,
    rule: Rule,
    num_steps: int,
    trainable: Trainable | None = None,
    per_step: Trainable | None = None,
    batch_at: BatchAt | None = None,
    every_step: bool = False,
) -> PredictFn:
    """Predictions for new inputs after adaptation to a support set by a learned rule.

    Args:
      loss_fn: the loss to adapt by.
      predict_fn: `(adapted params, support, inputs) -> predictions`.
      rule: as in `learned_rule_loss`.
      num_steps: inner steps; may differ from training.
      trainable: which leaves the inner loop moves, by path; None moves all.
      per_step: which leaves have an entry for each number of inner steps taken.
      batch_at: mini-batches for the inner steps.
      every_step: predict before the first and after each step; see `maml_predict`.

    Returns:
      `predict(MetaParams(init, rule), support, inputs, key) -> predictions`.
    """

    def predict(params: MetaParams, support: Batch, inputs: PyTree, key: PRNGKey) -> PyTree:
        adapted = maml_predict(
            loss_fn,
            predict_fn,
            inner_optimizer=rule(params.rule),
            num_steps=num_steps,
            trainable=trainable,
            per_step=per_step,
            batch_at=batch_at,
            every_step=every_step,
        )
        return adapted(params.init, support, inputs, key)

    return predict


def init_meta_sgd(params: Params, *, rate: float) -> PyTree:
    """The parameters of `meta_sgd`: the same rate for every entry of `params`, of its shapes."""
    return jax.tree.map(lambda x: jnp.full_like(x, rate), params)


def meta_sgd(rates: PyTree) -> optax.GradientTransformation:
    """Gradient descent with a learned rate for every parameter.

    `theta' = theta - alpha * grad`, entry by entry: equation 2 of Li et al. 2017, Meta-SGD. A rate
    may become negative.

    Args:
      rates: alpha, of the structure and shapes of the parameters; see `init_meta_sgd`.
    """

    def step(gradient: Array, rate: Array) -> Array:
        if jnp.shape(rate) != jnp.shape(gradient):
            raise UserError(
                f"a rate has shape {jnp.shape(rate)} for parameters of shape {gradient.shape}; "
                "give one rate for each, as init_meta_sgd does"
            )
        return -rate * gradient

    return optax.stateless(lambda updates, params: _map_moving(step, updates, rates))


def init_per_layer_per_step(params: Params, *, num_steps: int, rate: float) -> PyTree:
    """The parameters of `per_layer_per_step`: for each leaf `(num_steps,)`, all equal to `rate`.

    Raises:
      UserError: if `num_steps` is less than 1.
    """
    _check_num_steps(num_steps)
    return jax.tree.map(lambda x: jnp.full(num_steps, rate, jnp.result_type(x)), params)


class PerStepState(NamedTuple):
    """How many steps `per_layer_per_step` has taken."""

    steps: Int32[Array, ""]


def per_layer_per_step(rates: PyTree) -> optax.GradientTransformation:
    """Gradient descent with a learned rate for every leaf and every step.

    `theta'[l] = theta[l] - alpha[l][i] grad[l]` at step `i`: LSLR of MAML++ (Antoniou et al. 2019,
    section 4), kernel and bias of a layer having rates of their own as in its authors' program.
    Steps after the last that has a rate take the last.

    Args:
      rates: alpha, `(num_steps,)` for each leaf of the parameters; see `init_per_layer_per_step`.
    """

    def init(params: Params) -> PerStepState:
        del params
        return PerStepState(jnp.zeros((), jnp.int32))

    def update(updates: Params, state: Any, params: Params | None = None):
        del params

        def step(gradient: Array, rates_of_leaf: Array) -> Array:
            if jnp.ndim(rates_of_leaf) != 1:
                raise UserError(
                    f"the rates of a leaf have shape {jnp.shape(rates_of_leaf)}; "
                    "give (num_steps,), as init_per_layer_per_step does"
                )
            last = len(rates_of_leaf) - 1
            return -jnp.asarray(rates_of_leaf)[jnp.minimum(state.steps, last)] * gradient

        return _map_moving(step, updates, rates), PerStepState(state.steps + 1)

    return optax.GradientTransformation(init, update)


def init_meta_curvature(params: Params) -> PyTree:
    """The parameters of `meta_curvature`: for each leaf the identity along each of its modes.

    Returns:
      For a convolution's kernel `(*window, c_in, c_out)` matrices of sides `prod(window)`, `c_in`
      and `c_out`; for a dense kernel of sides `inputs` and `outputs`; for a vector of its length.
    """
    return jax.tree.map(
        lambda x: tuple(jnp.eye(side, dtype=jnp.result_type(x)) for side in _modes(x)), params
    )


def meta_curvature(
    factors: PyTree, *, rate: float | Float[Array, ""]
) -> optax.GradientTransformation:
    """Gradient descent under a learned preconditioner, a Kronecker product for each leaf.

    `theta' = theta - rate (grad x_1 M_1 x_2 M_2 ... x_n M_n)`, with the n-mode products
    `(G x_k M)[.., i, ..] = sum_j M[i, j] G[.., j, ..]`: equations 5 to 8 of Park and Oliva 2019,
    Meta-Curvature. The matrices need neither be symmetric nor positive.

    Args:
      factors: for each leaf of the parameters its M_1, ..., M_n; see `init_meta_curvature`.
      rate: the learning rate. It need not be learned, being a factor that the matrices can take.
    """

    def step(gradient: Array, matrices: tuple[Array, ...]) -> Array:
        modes = _modes(gradient)
        shapes, needed = [jnp.shape(m) for m in matrices], [(side, side) for side in modes]
        if shapes != needed:
            raise UserError(
                f"the factors of parameters of shape {gradient.shape} have shapes {shapes}; give "
                f"{needed}, as init_meta_curvature does"
            )
        product = gradient.reshape(modes)
        for mode, matrix in enumerate(matrices):
            product = jnp.moveaxis(jnp.tensordot(matrix, product, (1, mode)), 0, mode)
        return -rate * product.reshape(gradient.shape)

    return optax.stateless(lambda updates, params: _map_moving(step, updates, factors))


def annealed_weights(
    step: int | Int[Array, ""], *, num_inner_steps: int, anneal_steps: int
) -> Float[Array, " num_inner_steps"]:
    """Weights of MAML++'s multi-step loss, from uniform to all on the last inner step.

    `w_i = max(0, 1 - step / anneal_steps) / K` for i < K, and `w_K` the rest up to one (Antoniou et
    al. 2019, section 4). The authors' program keeps each `w_i` at 0.03 / K or more until the
    annealing is over and then drops all but the last at once; here they go to zero.

    Args:
      step: outer steps taken; may be traced.
      num_inner_steps: K.
      anneal_steps: the outer step from which only the last inner step counts.

    Returns:
      `(num_inner_steps,)` weights of sum one, for `query_loss_weights`.

    Raises:
      UserError: if `num_inner_steps` or `anneal_steps` is less than 1.
    """
    _check_num_steps(num_inner_steps, "num_inner_steps")
    _check_num_steps(anneal_steps, "anneal_steps")
    each = jnp.maximum(0, 1 - step / anneal_steps) / num_inner_steps
    last = 1 - (num_inner_steps - 1) * each
    return jnp.full(num_inner_steps, each).at[-1].set(last)


def _map_moving(step: Callable, updates: Params, rule_params: PyTree) -> Params:
    """`step(update, its part of the rule)` for every leaf that moves; None for the others."""
    return jax.tree.map(
        lambda update, part: None if update is None else step(update, part),
        updates,
        rule_params,
        is_leaf=lambda x: x is None,
    )


def _modes(x: Array) -> tuple[int, ...]:
    """The shape of a leaf with the window of a convolution as one axis, a scalar as a vector."""
    shape = jnp.shape(x)
    if len(shape) < 3:
        return shape or (1,)
    window = 1
    for side in shape[:-2]:
        window *= side
    return (window, *shape[-2:])


def _check_num_steps(value: int, name: str = "num_steps") -> None:
    if value < 1:
        raise UserError(f"{name} is {value}; give 1 or more")
