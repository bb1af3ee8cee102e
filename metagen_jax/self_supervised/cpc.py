"""Contrastive predictive coding: what comes later is to be found, from a summary of what came.

On images patches further down are predicted from those above (`cpc_loss`), in sounds and series
frames from all frames before (`cpc_sequence_loss`).

Van den Oord, Li, Vinyals: Representation Learning with Contrastive Predictive Coding, 2018.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from metagen_jax.counted import counted_mean
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
"""`predict(params, (n, context)) -> (n, num_steps, features)`: a prediction for each step down, or
ahead."""

Negatives = Literal["batch", "sequence"]
"""What a frame is to be told from: the frames of all sequences, or those of its own alone."""


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
    first_step: int = 1,
    augment: Augment | None = None,
    axis_name: str | None = None,
    block_size: int | None = None,
) -> LossFn:
    """The mean of `info_nce` over steps, of predictions among the patches of all images.

    Step `k` predicts the embedding of the patch `k` rows below the context, in the same column, and
    is to find it, by the inner product, among all patches of all images but those of the first `k`
    rows, which nothing predicts: equation 4 and section 3.2 of van den Oord et al. 2018.

    Args:
      embed: `(params, patches (m, p, p, c)) -> (m, features)`.
      contextualise: summarises what is above.
      predict: predicts what is below.
      patch_size: in pixels.
      stride: pixels from one patch to the next.
      num_steps: how many steps are predicted; published: up to 5 of 7 rows.
      first_step: the first of them. Where patches overlap, the first that shares no pixel with the
        context's own row, 2 for half a patch from one to the next, leaves nothing to copy.
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
        last_step = first_step + num_steps - 1
        if num_steps < 1 or first_step < 1 or last_step >= rows:
            raise UserError(
                f"num_steps is {num_steps} and first_step {first_step} for {rows} rows of patches; "
                f"give 1 or more of each, and a last step of at most {rows - 1}"
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
                predictions[:, :-step, :, step - first_step].reshape(-1, z.shape[-1]),
                z[:, step:].reshape(-1, z.shape[-1]),
                axis_name=axis_name,
                block_size=block_size,
            ).mean()
            for step in range(first_step, last_step + 1)
        ]
        return jnp.stack(losses).mean(), {"last_step": losses[-1]}

    return loss_fn


def cpc_sequence_loss(
    embed: Callable[[Params, Array], Any],
    contextualise: Callable[[Params, Array], Any],
    predict: Predict,
    *,
    num_steps: int,
    first_step: int = 1,
    num_frames: Callable[[Array], Array] | None = None,
    negatives: Negatives = "batch",
    axis_name: str | None = None,
    block_size: int | None = None,
) -> LossFn:
    """The mean of `info_nce` over all frames that are predicted, so many steps ahead.

    From the context `c_t` the prediction `W_k c_t` is to find the frame `z_{t+k}`, by the inner
    product, among the frames k, k+1, ... of all sequences, or of its own: equation 4 and section
    3.1 of van den Oord et al. 2018. Every pair of a step and a frame that there is counts alike;
    the first context sees one frame, and the last `k` frames predict nothing k steps ahead.

    Frames from all sequences tell what a sequence is like as a whole, such as who speaks; those of
    the same one can only be told apart by what changes in it, such as what is said (their table 2).

    Args:
      embed: `(params, sequences (n, t, ...)) -> frames (n, frames, features)`, such as
        `metagen_jax.nets.strided_conv.StridedConv` gives.
      contextualise: `(params, frames) -> (n, frames, context)`, of which each may see its own frame
        and those before it, such as `metagen_jax.nets.gru.GRU`.
      predict: predicts what is ahead.
      num_steps: how many steps are predicted; published: 12 frames of 10 ms.
      first_step: the first of them. Where frames see entries that others also see, the first that
        shares none with the context's own, the window over the stride, leaves nothing to copy.
      num_frames: frames of a sequence of so many entries, such as that of `StridedConv`; None for a
        frame each entry.
      negatives: "batch" or "sequence".
      axis_name: of the devices over whose sequences the mean is taken, and whose frames are
        candidates too where `negatives` is "batch". Without it several devices' mean of means
        weighs a sequence by what else is on its device.
      block_size: predictions that are compared at once.

    Returns:
      A loss over batches `(sequences (n, t, ...), lengths (n,))`; what lies behind a sequence's
      length counts nowhere, and 0 for sequences without any prediction. Its metric `information`,
      in nats, is the mean of `ln N` less the loss, N the number of candidates: it estimates, from
      below and never above `ln N`, what a context tells of a frame (their section 2.3); `count` is
      how many predictions there are, for `weighted_by_count` where candidates are of the same
      sequence, as those of a chunk are otherwise fewer. It raises a
      UserError for too few frames, unknown `negatives`, or predictions of another shape.
    """
    if negatives not in get_args(Negatives):
        raise UserError(f'negatives is {negatives!r}; give "batch" or "sequence"')

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        del key
        sequences, lengths = batch
        z = embed(params, sequences)
        lengths = lengths if num_frames is None else num_frames(lengths)
        last_step = first_step + num_steps - 1
        if z.ndim != 3 or num_steps < 1 or first_step < 1 or last_step >= z.shape[1]:
            raise UserError(
                f"num_steps is {num_steps} and first_step {first_step} for frames of shape "
                f"{z.shape}; give (n, frames, features), and a last step below the frames"
            )
        valid = jnp.arange(z.shape[1]) < lengths[:, None]
        contexts = contextualise(params, z)
        predictions = predict(params, contexts.reshape(-1, contexts.shape[-1]))
        expected = (valid.size, num_steps, z.shape[-1])
        if predictions.shape != expected:
            raise UserError(
                f"predictions have shape {predictions.shape}; give {num_steps} vectors like the "
                f"frames for each context, {expected}"
            )
        predictions = predictions.reshape(*valid.shape, num_steps, -1)
        losses, logs, counted = [], [], []
        for step in range(first_step, last_step + 1):
            of_step = valid[:, step:]
            found, log_num = _find(
                predictions[:, :-step, step - first_step],
                z[:, step:],
                of_step,
                negatives=negatives,
                axis_name=axis_name,
                block_size=block_size,
            )
            losses.append(found)
            logs.append(jnp.broadcast_to(log_num, found.shape))
            counted.append(of_step)
        there = jnp.concatenate(counted, axis=1)
        loss, candidates = (
            counted_mean(jnp.concatenate(x, axis=1), there, axis_name=axis_name)
            for x in (losses, logs)
        )
        count = there.sum().astype(loss.dtype)
        return loss, {"information": candidates - loss, "count": count}

    return loss_fn


def _find(
    predictions: Float[Array, "n t f"],
    frames: Float[Array, "n t f"],
    valid: Bool[Array, "n t"],
    *,
    negatives: Negatives,
    axis_name: str | None,
    block_size: int | None,
) -> tuple[Float[Array, "n t"], Float[Array, "n #t"]]:
    """The loss of each prediction, and the logarithm of how many candidates it has."""

    def log_of(count: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.log(jnp.maximum(count, 1))

    if negatives == "sequence":
        losses = jax.vmap(lambda q, c, v: info_nce(q, c, valid=v, block_size=block_size))(
            predictions, frames, valid
        )
        return losses, log_of(valid.sum(1, keepdims=True))
    flat = (x.reshape(-1, x.shape[-1]) for x in (predictions, frames))
    losses = info_nce(*flat, valid=valid.ravel(), axis_name=axis_name, block_size=block_size)
    count = valid.sum()
    count = count if axis_name is None else jax.lax.psum(count, axis_name)
    return losses.reshape(valid.shape), jnp.full((len(valid), 1), log_of(count))
