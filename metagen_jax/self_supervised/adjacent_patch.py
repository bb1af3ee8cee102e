"""Adjacent-patch prediction: what the neighbouring patch of a picture holds.

From the features of a patch and a direction, either the features of the patch that lies there are
to be found among those of all others, or its pixels to be drawn.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from metagen_jax.errors import UserError
from metagen_jax.self_supervised.context_prediction import DIRECTIONS, sample_patch_pairs
from metagen_jax.self_supervised.contrastive import info_nce
from metagen_jax.self_supervised.simclr import Augment, Embed, check_embeddings
from metagen_jax.similarity import unit_rows
from metagen_jax.types import Batch, LossFn, Metrics, Params

Predict = Callable[[Params, Array], Any]
"""`predict(params, (n, features + 8)) -> (n, outputs)`: of a patch's features and the direction, of
which one of eight numbers is 1."""


def adjacent_features_loss(
    embed: Embed,
    predict: Predict,
    *,
    temperature: float,
    patch_size: int,
    gap: int,
    jitter: int,
    augment: Augment | None = None,
    axis_name: str | None = None,
) -> LossFn:
    """The mean of `info_nce` of the predicted features among those of all images' neighbours.

    `q_i = predict(embed(centre_i), direction_i)` is to find `c_i = embed(neighbour_i)`, by cosines.

    Args:
      embed: `(params, patches (2 n, p, p, c)) -> (2 n, features)`.
      predict: `(params, (n, features + 8)) -> (n, features)`.
      temperature: of the cosines, such as 0.1.
      patch_size: in pixels; see `metagen_jax.self_supervised.context_prediction`.
      gap: in pixels.
      jitter: in pixels.
      augment: changes a patch, each by itself; None leaves them.
      axis_name: of the devices whose patches are candidates too.

    Returns:
      A loss over batches of images `(n, h, w, c)`; by chance it is `ln n`. Its key may be one key,
      or one for each image. It raises a UserError for embeddings that are not vectors.
    """

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        pair = sample_patch_pairs(
            key, batch, patch_size=patch_size, gap=gap, jitter=jitter, augment=augment
        )
        patches = jnp.concatenate([pair.centre, pair.neighbour])
        z = check_embeddings(embed(params, patches), len(patches))
        centres, neighbours = jnp.split(z, 2)
        predictions = predict(params, _towards(centres, pair.direction))
        losses = info_nce(
            unit_rows(predictions),
            unit_rows(neighbours),
            temperature=temperature,
            axis_name=axis_name,
        )
        return losses.mean(), {}

    return loss_fn


def adjacent_pixels_loss(
    embed: Embed, predict: Predict, *, patch_size: int, gap: int, jitter: int
) -> LossFn:
    """The mean over pixels and channels of `(predicted - neighbour)^2`.

    Args:
      embed: `(params, patches (n, p, p, c)) -> (n, features)`.
      predict: `(params, (n, features + 8)) -> (n, p * p * c)`, in the order of rows, columns,
        channels.
      patch_size: in pixels; see `metagen_jax.self_supervised.context_prediction`.
      gap: in pixels; 0 for what continues right across the border.
      jitter: in pixels.

    Returns:
      A loss over batches of images `(n, h, w, c)`. Its key may be one key, or one for each image.
      It raises a UserError for embeddings that are not vectors, or predictions of another size.
    """

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        pair = sample_patch_pairs(key, batch, patch_size=patch_size, gap=gap, jitter=jitter)
        z = check_embeddings(embed(params, pair.centre), len(batch))
        drawn = predict(params, _towards(z, pair.direction))
        pixels = pair.neighbour.reshape(len(batch), -1)
        if drawn.shape != pixels.shape:
            raise UserError(
                f"predictions have shape {drawn.shape} and patches {pixels.shape}; give one number "
                "for each pixel and channel"
            )
        return jnp.square(drawn - pixels).mean(), {}

    return loss_fn


def _towards(z: Float[Array, "n features"], direction) -> Float[Array, "n inputs"]:
    one_hot = jax.nn.one_hot(direction, len(DIRECTIONS), dtype=z.dtype)
    return jnp.concatenate([z, one_hot], axis=1)
