"""Inpainting: a net draws what is hidden of a picture, from what is left.

The context encoder fills a hole, by squared errors and, if one likes, against a discriminator; the
masked autoencoder draws most patches from a few.

Pathak, Krahenbuhl, Donahue, Darrell, Efros: Context Encoders: Feature Learning by Inpainting, 2016.
He, Chen, Xie, Li, Dollar, Girshick: Masked Autoencoders Are Scalable Vision Learners, 2022.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from metagen_jax.errors import UserError
from metagen_jax.generative.gan import (
    GANParams,
    Penalty,
    Score,
    ScoreLosses,
    ScoreOne,
    gan_gradients,
)
from metagen_jax.gradients import task_keys
from metagen_jax.types import Batch, GradFn, LossFn, Metrics, Params, PRNGKey

Hide = Callable[[PRNGKey], Array]
"""`hide(key) -> (h, w)`, True where ONE picture is hidden."""

Fill = Callable[[Params, Array], Any]
"""`fill(params, (n, h, w, c + 1)) -> (n, h, w, c)`: whole pictures, of pictures with zeros in their
holes and a last channel that is 1 there."""

Reconstruct = Callable[[Params, Array, Array], Any]
"""`reconstruct(params, images (n, h, w, c), shown (n, shown)) -> (n, patches, values)`, such as the
`apply` of `metagen_jax.nets.patch_transformer.PatchTransformer`."""


def hide_box(key: PRNGKey, *, shape: tuple[int, int], size: tuple[int, int]) -> Bool[Array, "h w"]:
    """A box inside the picture, all places equally likely.

    Args:
      key: a typed key.
      shape: height and width of the picture.
      size: of the box.

    Raises:
      UserError: the box is larger than the picture.
    """
    if size[0] > shape[0] or size[1] > shape[1]:
        raise UserError(f"a box of {size} does not fit into a picture of {shape}")
    rest = jnp.array(shape) - jnp.array(size)
    corner = jax.random.randint(key, (2,), 0, rest + 1)
    rows, columns = (
        (jnp.arange(shape[i]) >= corner[i]) & (jnp.arange(shape[i]) < corner[i] + size[i])
        for i in (0, 1)
    )
    return rows[:, None] & columns


def with_hole(
    images: Float[Array, "n h w c"], hidden: Bool[Array, "n h w"]
) -> Float[Array, "n h w inputs"]:
    """What a net sees of pictures: zeros where they are hidden, and a channel that says where."""
    hole = hidden[..., None]
    return jnp.concatenate([jnp.where(hole, 0, images), hole.astype(images.dtype)], axis=-1)


def inpainting_loss(fill: Fill, hide: Hide) -> LossFn:
    """The mean over hidden pixels and channels of `(filled - image)^2`.

    Equation 1 of Pathak et al. 2016, as a mean; each image counts alike.

    Args:
      fill: the context encoder; centre the pictures, or zeros are a colour.
      hide: what is hidden, such as
        `lambda key: hide_box(key, shape=(32, 32), size=(16, 16))`.

    Returns:
      A loss over batches of images `(n, h, w, c)`. Its key may be one key, or one for each image.
      It raises a UserError for outputs of another shape.
    """

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        hidden = _hidden(key, batch, hide)
        filled = fill(params, with_hole(batch, hidden))
        return _hidden_error(filled, batch, hidden), {}

    return loss_fn


def inpainting_gradients(
    fill: Fill,
    score: Score,
    hide: Hide,
    *,
    losses: ScoreLosses,
    adversarial_weight: float,
    penalty: Penalty | None = None,
) -> GradFn:
    """The field of a context encoder and a discriminator of filled pictures.

    The context encoder goes down the gradient of `(1 - w) error + w generator(score)`, `w` the
    `adversarial_weight`, the discriminator down that of its own loss: equation 3 of Pathak et al.
    2016. The discriminator sees whole pictures, filled in the hole alone.

    Args:
      fill: the context encoder, `GANParams.generator`.
      score: the discriminator, of pictures.
      hide: what is hidden, see `inpainting_loss`.
      losses: of the scores, see `metagen_jax.generative.gan`.
      adversarial_weight: published: 0.001.
      penalty: of the discriminator.

    Returns:
      A `GradFn` of `GANParams` over batches of images `(n, h, w, c)`; metrics those of
      `gan_gradients`, `generator_loss` being the whole one, and `reconstruction_loss`.

    Raises:
      UserError: for an `adversarial_weight` that is not in [0, 1].
    """
    if not 0 <= adversarial_weight <= 1:
        raise UserError(f"adversarial_weight is {adversarial_weight}; give 0 to 1, such as 0.001")

    def generate(params: Params, batch: Batch, keys: Key[Array, " n"]) -> Batch:
        del keys
        images, hidden = batch
        filled = fill(params, with_hole(images, hidden))
        return jnp.where(hidden[..., None], filled, images), hidden

    def error(real: Batch, fake: Batch) -> tuple[Array, Metrics]:
        (images, hidden), (filled, _) = real, fake
        value = _hidden_error(filled, images, hidden)
        return (1 - adversarial_weight) * value, {"reconstruction_loss": value}

    def penalty_of_image(score_one: ScoreOne, real: Batch, fake: Batch, key: PRNGKey) -> Array:
        assert penalty is not None
        return penalty(lambda image: score_one((image, real[1])), real[0], fake[0], key)

    adversarial = gan_gradients(
        generate,
        lambda params, batch: score(params, batch[0]),
        losses=dataclasses.replace(
            losses, generator=lambda scores: adversarial_weight * losses.generator(scores)
        ),
        penalty=None if penalty is None else penalty_of_image,
        beside=error,
    )

    def grad_fn(
        params: GANParams, batch: Batch, key: Key[Array, "..."]
    ) -> tuple[GANParams, Metrics]:
        keys = task_keys(key, len(batch)) if key.ndim == 0 else key
        hole_keys, keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        return adversarial(params, (batch, _hidden(hole_keys, batch, hide)), keys)

    return grad_fn


def masked_autoencoder_loss(
    reconstruct: Reconstruct,
    to_patches: Callable[[Array], Array],
    *,
    shown_share: float = 0.25,
    normalise: bool = True,
) -> LossFn:
    """The mean over hidden patches of `(drawn - patch)^2`: section 3 of He et al. 2022.

    Args:
      reconstruct: draws all patches from those that are shown.
      to_patches: `images (n, h, w, c) -> (n, patches, values)`, such as
        `lambda x: to_patches(x, 4)` of `metagen_jax.nets.patch_transformer`.
      shown_share: of the patches, rounded, at least one and never all; published: a quarter.
      normalise: draw each patch with its own mean taken off and divided by its deviation, which the
        paper finds to give better features.

    Returns:
      A loss over batches of images `(n, h, w, c)`; with `normalise` it is 1 for a net that draws
      nothing. Its key may be one key, or one for each image.

    Raises:
      UserError: for a `shown_share` that is not between 0 and 1.
    """
    if not 0 < shown_share < 1:
        raise UserError(f"shown_share is {shown_share}; give more than 0 and less than 1")

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        patches = to_patches(batch)
        shown, hidden = split_patches(key, *patches.shape[:2], shown_share=shown_share)
        drawn = reconstruct(params, batch, shown)
        if normalise:
            centred = patches - patches.mean(-1, keepdims=True)
            patches = centred * jax.lax.rsqrt(patches.var(-1, keepdims=True) + 1e-6)
        errors = jnp.square(drawn - patches).mean(-1)
        return jnp.take_along_axis(errors, hidden, axis=1).mean(), {}

    return loss_fn


def split_patches(
    key: Key[Array, "..."], num_images: int, num_patches: int, *, shown_share: float
) -> tuple[Int[Array, "n shown"], Int[Array, "n hidden"]]:
    """Which patches of each image are shown and which are hidden, all choices equally likely.

    Args:
      key: one key, of which image `i` gets `fold_in(key, i)`, or one for each image.
      num_images: how many.
      num_patches: of each image, 2 or more.
      shown_share: of the patches.
    """
    keys = task_keys(key, num_images) if key.ndim == 0 else key
    order = jax.vmap(lambda key: jax.random.permutation(key, num_patches))(keys)
    num_shown = min(max(1, round(shown_share * num_patches)), num_patches - 1)
    return order[:, :num_shown], order[:, num_shown:]


def _hidden(key: Key[Array, "..."], images: Array, hide: Hide) -> Bool[Array, "n h w"]:
    keys = task_keys(key, len(images)) if key.ndim == 0 else key
    return jax.vmap(hide)(keys)


def _hidden_error(filled: Array, images: Array, hidden: Array) -> Float[Array, ""]:
    if filled.shape != images.shape:
        raise UserError(
            f"filled pictures have shape {filled.shape} and pictures {images.shape}; give them the "
            "same shape"
        )
    errors = jnp.where(hidden, jnp.square(filled - images).mean(-1), 0)
    return (errors.sum((1, 2)) / jnp.maximum(hidden.sum((1, 2)), 1)).mean()
