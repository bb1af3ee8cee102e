"""The inner loop: adapt parameters to one task by a few steps of any optax optimiser.

The outer gradient after steps of an optax transformation is `exact` (equal to finite differences),
`nan`, or `flat`: exact, but an update made of signs has a derivative of zero, so that it is what
`gradient="first_order"` gives. It is so at a generic point; at a dead coordinate, whose gradient is
zero whatever the parameters (an inactive unit, an embedding that the support set lacks); and where
all coordinates are dead. With its remedy a row is exact throughout.

    transformation                      | generic | dead  | all   | remedy
    adabelief, adadelta, adagrad        | exact   | exact | exact |
    adafactor                           | exact   | exact | nan   | clipping_threshold=None
    adam, adamw, amsgrad, nadam, nadamw | exact   | nan   | nan   | eps_root=1e-8
    adamax, adan, add_decayed_weights   | exact   | exact | exact |
    adaptive_grad_clip                  | exact   | exact | nan   | use clip
    centralize, clip, ema, fromage      | exact   | exact | exact |
    clip_by_block_rms                   | exact   | exact | nan   | use clip
    clip_by_global_norm                 | exact   | exact | nan   | use clip
    contrib.muon                        | exact   | exact | nan   | none
    lamb                                | exact   | nan   | nan   | eps_root=1e-8, weight_decay=1e-4
    lars                                | exact   | exact | nan   | weight_decay=1e-4
    lbfgs, polyak_sgd                   | error   |       |       | none: they ask for the loss
    lion, rprop, sign_sgd, signum       | flat    | exact | exact |
    noisy_sgd                           | exact   | exact | exact |
    normalize_by_update_norm, novograd  | exact   | exact | nan   | none
    optimistic_adam_v2                  | exact   | nan   | nan   | eps_root=1e-8
    optimistic_gradient_descent         | exact   | exact | exact |
    radam                               | nan     | nan   | nan   | none
    rmsprop, scale_by_schedule, sgd     | exact   | exact | exact |
    scale_by_trust_ratio                | exact   | exact | nan   | none
    sm3, trace, yogi                    | exact   | exact | exact |

Near a zero gradient of a coordinate that is not dead, the derivative of Adam's update grows to the
rate over `eps`, 1e8 times the rate by default, and drowns the outer gradient; with `eps_root` it
stays below the rate over `sqrt(eps_root)`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Int

from metagen_jax.errors import UserError
from metagen_jax.types import Batch, GradFn, Metrics, Params, PRNGKey, Trainable

Gradient = Literal["reverse", "first_order", "remat", "mixed"]
"""How the outer gradient passes the inner steps; see `adapt`."""

BatchAt = Callable[[Batch, jax.Array, PRNGKey], Batch]
"""`batch_at(support, step, key)`: the mini-batch of one inner step."""

Step = int | Int[Array, ""]
"""A number of inner steps."""

# The derivative of most optimisers needs it, and it costs a backward pass to compute it again.
_DIRECTION = "inner_direction"


class Adapted(NamedTuple):
    """What the inner loop gives.

    Attributes:
      params: the parameters after the last step.
      opt_state: the optimiser's state after the last step; `with_state` begins with it.
      metrics: the metrics of `grad_fn` before each step, with a leading axis of `num_steps`.
      trajectory: if asked for, the parameters before the first and after each step, with a leading
        axis of `num_steps + 1`; otherwise None.
    """

    params: Params
    opt_state: optax.OptState
    metrics: Metrics
    trajectory: Params | None


def adapt(
    grad_fn: GradFn,
    params: Params,
    support: Batch,
    key: PRNGKey,
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    gradient: Gradient = "remat",
    trainable: Trainable | None = None,
    per_step: Trainable | None = None,
    batch_at: BatchAt | None = None,
    trajectory: bool = False,
) -> Adapted:
    """Adapts parameters to a support set by `num_steps` steps of an optimiser.

    `theta_{i+1} = theta_i + U(grad_fn(theta_i, support_i, key_i))`, U the optimiser's update, its
    state new for each task. The whole is differentiable in `params`, `support` and whatever
    `grad_fn` and `optimizer` close over.

    Args:
      grad_fn: the direction of one step, most often `gradients(loss_fn)`.
      params: the initialisation theta_0.
      support: the examples of one task, any pytree of arrays.
      key: step `i` splits `fold_in(key, i)` in two, for `batch_at` and for `grad_fn`.
      optimizer: any optax transformation; the module's table says which are safe to differentiate
        through. It begins anew, or by `with_state` with a state.
      num_steps: how many steps; 0 gives `params` back.
      gradient: "remat" differentiates through the inner gradients; of each step it saves the
        parameters, the optimiser's state and the direction, and computes the rest again. "reverse"
        saves whatever each step computes to this end. "mixed" is the same as "remat" here: its
        other half is a `grad_fn` with a derivative of its own, `mixed_gradients(loss_fn)`. Any
        `grad_fn` is right with any of them. "first_order" takes the inner gradients for constants
        (Finn et al. 2017, section 5.2).
      trainable: which leaves move, by path (`"params/head/kernel"`); None moves all. ANIL moves the
        head (Raghu et al. 2020), BOIL all but the head (Oh et al. 2021).
      per_step: which leaves have a leading axis of steps, of which step `i` sees entry `i` (see
        `at_step`): the outer loop alone moves them, as MAML++ does with batch norm's parameters.
      batch_at: `(support, i, key) -> batch`, the mini-batch of step `i`; None takes all of it.
      trajectory: also return the parameters of every step.

    Returns:
      The adapted parameters, the metrics of each step and, if asked for, the trajectory.

    Raises:
      UserError: for a negative `num_steps`, an unknown `gradient` or a `trainable` that chooses
        no leaf.
    """
    check_inner_loop(num_steps, gradient)
    moves = trainable if per_step is None else _moves(trainable, per_step)
    moving, fixed = _split(params, moves)

    def step(carry, i):
        moving, state = carry
        batch_key, grad_key = jax.random.split(jax.random.fold_in(key, i))
        batch = support if batch_at is None else batch_at(support, i, batch_key)
        direction, metrics = grad_fn(at_step(_join(moving, fixed), i, per_step), batch, grad_key)
        direction = pass_direction(_like(moving, direction), gradient)
        updates, state = optimizer.update(direction, state, moving)
        moved = optax.apply_updates(moving, updates)
        return (moved, state), (metrics, moved if trajectory else None)

    start = (moving, optimizer.init(moving))
    (moving_end, opt_state), (metrics, path) = jax.lax.scan(
        checkpoint_step(step, gradient), start, jnp.arange(num_steps)
    )
    states = None
    if trajectory:
        path = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), moving, path)
        repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_steps + 1, *x.shape)), fixed)
        states = _join(path, repeated)
    return Adapted(_join(moving_end, fixed), opt_state, metrics, states)


def with_state(
    optimizer: optax.GradientTransformation, state: optax.OptState
) -> optax.GradientTransformation:
    """The optimiser that begins with a state, such as what another task has left, and not anew."""

    def init(params: Params) -> optax.OptState:
        del params
        return state

    return optax.GradientTransformation(init, optimizer.update)


def check_inner_loop(num_steps: int, gradient: Gradient) -> None:
    """Raises a `UserError` for a negative number of steps or an unknown `gradient`."""
    if num_steps < 0:
        raise UserError(f"num_steps is {num_steps}; give 0 or more inner steps")
    if gradient not in get_args(Gradient):
        raise UserError(
            f'gradient is {gradient!r}; give "reverse", "first_order", "remat" or "mixed"'
        )


def pass_direction(direction: Params, gradient: Gradient) -> Params:
    """The direction of an inner step, as a constant or under the name by which it is saved."""
    if gradient == "first_order":
        return jax.lax.stop_gradient(direction)
    return checkpoint_name(direction, _DIRECTION)


def checkpoint_step(step: Callable, gradient: Gradient) -> Callable:
    """The body of a scan over inner steps, with "remat" or "mixed" one of which little is saved.

    Args:
      step: `(carry, x) -> (carry, y)`. The outer gradient then saves the carry before it, and the
        direction that it sends through `pass_direction`.
      gradient: as in `adapt`.
    """
    if gradient not in ("remat", "mixed"):
        return step
    policy = jax.checkpoint_policies.save_only_these_names(_DIRECTION)
    # The two passes are two loops, whose bodies the compiler does not merge anyway.
    return jax.checkpoint(step, policy=policy, prevent_cse=False)


def at_step(params: Params, step: Step, per_step: Trainable | None) -> Params:
    """The parameters that a loss sees after so many inner steps.

    Args:
      params: the leaves that `per_step` chooses have a leading axis of steps.
      step: inner steps taken; beyond the last entry it is the last that counts.
      per_step: which leaves, by path; None gives `params` back.

    Returns:
      `params` with entry `step` of the chosen leaves.

    Raises:
      UserError: if `per_step` chooses no leaf.
    """
    if per_step is None:
        return params
    stacked, others = _split(params, per_step)

    def pick(x):
        return jax.lax.dynamic_index_in_dim(x, jnp.minimum(step, len(x) - 1), keepdims=False)

    return _join(jax.tree.map(pick, stacked), others)


def _moves(trainable: Trainable | None, per_step: Trainable) -> Trainable:
    return lambda path: not per_step(path) and (trainable is None or trainable(path))


def _split(params: Params, trainable: Trainable | None) -> tuple[Params, Params]:
    """The leaves that move and those that don't, each with None in the places of the other."""
    if trainable is None:
        return params, jax.tree.map(lambda _: None, params)

    def chosen(path) -> bool:
        return trainable(jax.tree_util.keystr(path, simple=True, separator="/"))

    moving = jax.tree_util.tree_map_with_path(lambda p, x: x if chosen(p) else None, params)
    if not jax.tree.leaves(moving):
        paths = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ]
        raise UserError(f"trainable chooses none of the parameters; it was asked about {paths}")
    return moving, jax.tree_util.tree_map_with_path(lambda p, x: None if chosen(p) else x, params)


def _join(moving: Params, fixed: Params) -> Params:
    """The inverse of `_split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, moving, fixed, is_leaf=_is_none)


def _like(moving: Params, tree: Params) -> Params:
    """`tree` with None wherever `moving` has None."""
    return jax.tree.map(lambda a, b: None if a is None else b, moving, tree, is_leaf=_is_none)


def _is_none(x) -> bool:
    return x is None
