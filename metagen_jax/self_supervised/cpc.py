"""Contrastive predictive coding on images: patches further down are predicted from those above.

Van den Oord, Li, Vinyals: Representation Learning with Contrastive Predictive Coding, 2018.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from metagen_jax.errors import UserError
from metagen_jax.gradients import task_keys
from metagen_jax.nets.convolution import extract_patches
from metagen_jax.self_supervised.contrastive import info_nce
from metagen_jax.self_supervised.simclr import Augment, Embed, check_embeddings
from metagen_jax.types import Batch, LossFn, Metrics, Params

Contextualise = Callable[[Params, Array], Any]
"""`contextualise(params, grid (n, rows, columns, features)) -> (n, rows, columns, context)`, of
which each sees its own row and those above, such as `metagen_jax.nets.row_context.RowContext`."""

Predict = Callable[[Params, Array], Any]
"""`predict(params, (n, context)) -> (n, num_steps, features)`: a prediction for each step down."""


def patch_grid(
    images: Float[Array, "n h w c"], *, patch_size: int, stride: int
) -> Float[Array, "n rows columns p p c"]:
    """Overlapping patches of images, as a grid.

    Args:
      images: `(n, h, w, c)`.
      patch_size: in pixels; published: 64 of 256.
      stride: pixels from one patch to the next; published: half a patch.

    Raises:
      UserError: no patch fits into the images.
    """
    _, height, width, channels = images.shape
    if patch_size > min(height, width):
        raise UserError(f"patches of {patch_size} pixels don't fit into images of {height}x{width}")
    size = (patch_size, patch_size)
    patches = extract_patches(images, size, (stride, stride), "VALID")
    return patches.reshape(*patches.shape[:3], patch_size, patch_size, channels)


def cpc_loss(
    embed: Embed,
    contextualise: Contextualise,
    predict: Predict,
    *,
    patch_size: int,
    stride: int,
    num_steps: int,
    augment: Augment | None = None,
    axis_name: str | None = None,
    block_size: int | None = None,
) -> LossFn:
    """The mean of `info_nce` over steps, of predictions among the patches of all images.

    Step `k` predicts the embedding of the patch `k` rows below the context, in the same column, and
    is to find it, by the inner product, among the patches of the same rows of all images: equation
    4 and section 3.3 of van den Oord et al. 2018.

    Args:
      embed: `(params, patches (m, p, p, c)) -> (m, features)`.
      contextualise: summarises what is above.
      predict: predicts what is below.
      patch_size: in pixels.
      stride: pixels from one patch to the next.
      num_steps: k = 1..num_steps; published: up to 5 of 7 rows.
      augment: changes a patch, each by itself, so that overlapping pixels don't tell; None leaves
        them.
      axis_name: of the devices whose patches are candidates too.
      block_size: predictions that are compared at once.

    Returns:
      A loss over batches of images `(n, h, w, c)`; by chance it is about the logarithm of the
      number of candidates. Its key may be one key, or one for each image. It raises a UserError for
      too few rows, embeddings that are not vectors, or predictions of another shape.
    """

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        patches = patch_grid(batch, patch_size=patch_size, stride=stride)
        num, rows, columns = patches.shape[:3]
        if not 1 <= num_steps < rows:
            raise UserError(
                f"num_steps is {num_steps} for {rows} rows of patches; give 1 to {rows - 1}"
            )
        flat = patches.reshape(num, rows * columns, *patches.shape[3:])
        if augment is not None:
            keys = task_keys(key, num) if key.ndim == 0 else key
            of_patches = jax.vmap(lambda key: jax.random.split(key, rows * columns))(keys)
            flat = jax.vmap(jax.vmap(augment))(of_patches, flat)
        flat = flat.reshape(-1, *flat.shape[2:])
        z = check_embeddings(embed(params, flat), len(flat))
        z = z.reshape(num, rows, columns, -1)
        contexts = contextualise(params, z)
        predictions = predict(params, contexts.reshape(-1, contexts.shape[-1]))
        expected = (num * rows * columns, num_steps, z.shape[-1])
        if predictions.shape != expected:
            raise UserError(
                f"predictions have shape {predictions.shape}; give {num_steps} vectors like the "
                f"embeddings for each context, {expected}"
            )
        predictions = predictions.reshape(num, rows, columns, num_steps, -1)
        losses = [
            info_nce(
                predictions[:, :-step, :, step - 1].reshape(-1, z.shape[-1]),
                z[:, step:].reshape(-1, z.shape[-1]),
                axis_name=axis_name,
                block_size=block_size,
            ).mean()
            for step in range(1, num_steps + 1)
        ]
        return jnp.stack(losses).mean(), {"last_step": losses[-1]}

    return loss_fn
