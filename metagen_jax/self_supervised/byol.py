"""BYOL: a net predicts how a slow average of itself sees another view; there are no negatives.

    loss_fn = byol_loss(project, predict, augment)
    optimizer = byol_optimizer(optax.adam(1e-3))
    step = train_step(gradients(loss_fn), optimizer, sample, update_slow=move_target(0.99))

The target is a slow leaf of the parameters: no gradient reaches it and the training step moves it.

Grill et al.: Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning, 2020.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from metagen_jax.errors import UserError
from metagen_jax.self_supervised.simclr import (
    Augment,
    Embed,
    check_embeddings,
    spread,
    two_views,
)
from metagen_jax.similarity import unit_rows
from metagen_jax.types import Batch, LossFn, Metrics, Params, PRNGKey


class BYOLParams(NamedTuple):
    """What BYOL trains, and what follows it.

    Attributes:
      online: of the net and its projection head.
      predictor: of what maps the online projection to the target's.
      target: a slow leaf: the moving average of `online`, and a copy of it to begin with.
    """

    online: Any
    predictor: Any
    target: Any


def byol_loss(project: Embed, predict: Embed, augment: Augment) -> LossFn:
    """`|q(z_a) - z'_b|^2 + |q(z_b) - z'_a|^2`, all of length 1: equation 2 of Grill et al. 2020.

    `z` and `z'` are the projections of a view by the online and the target parameters; the target
    is held constant. Both views of all images are projected as one batch.

    Args:
      project: `(online or target, images (n, ...)) -> (n, features)`: net and projection head.
      predict: `(predictor, (n, features)) -> (n, features)`.
      augment: makes a view.

    Returns:
      A loss of `BYOLParams` over batches of images `(n, ...)`, between 0 and 8; keys and metrics
      as in `metagen_jax.self_supervised.simclr.simclr_loss`, `spread` that of the projections. It
      raises a UserError for projections that are not vectors.
    """

    def loss_fn(params: BYOLParams, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        views = jnp.concatenate(two_views(key, batch, augment))
        projections = check_embeddings(project(params.online, views), len(views))
        predictions = check_embeddings(predict(params.predictor, projections), len(views))
        targets = jax.lax.stop_gradient(project(params.target, views))
        # The target of a view is the other one.
        targets = jnp.roll(unit_rows(targets), len(batch), axis=0)
        distances = jnp.square(unit_rows(predictions) - targets).sum(1)
        return 2 * distances.mean(), {"spread": spread(projections)}

    return loss_fn


def move_target(decay: float) -> Callable[[BYOLParams, Batch, PRNGKey], BYOLParams]:
    """`target <- decay target + (1 - decay) online`, as `train_step` takes it for `update_slow`.

    Args:
      decay: published: from 0.996 to 1 over long trainings; 0.99 for short ones.

    Raises:
      UserError: for a decay that is not in [0, 1].
    """
    if not 0 <= decay <= 1:
        raise UserError(f"decay is {decay}; give 0 to 1, such as 0.99")

    def update_slow(params: BYOLParams, batch: Batch, key: PRNGKey) -> BYOLParams:
        del batch, key
        target = optax.incremental_update(params.online, params.target, 1 - decay)
        return params._replace(target=target)

    return update_slow


def byol_optimizer(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimiser of all but the target, which it leaves as it is, weight decay or not."""

    def labels(params: BYOLParams) -> BYOLParams:
        return BYOLParams(
            *(jax.tree.map(lambda _: "online", part) for part in params[:2]),
            target=jax.tree.map(lambda _: "slow", params.target),
        )

    transforms: dict[Hashable, optax.GradientTransformation] = {
        "online": optimizer,
        "slow": optax.set_to_zero(),
    }
    return optax.multi_transform(transforms, labels)


def init_byol(online: Params, predictor: Params) -> BYOLParams:
    """The target begins as the online parameters."""
    return BYOLParams(online, predictor, jax.tree.map(jnp.copy, online))
