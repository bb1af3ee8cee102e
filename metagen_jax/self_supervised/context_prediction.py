"""Context prediction: where one patch of a picture lies from another.

Patches keep a gap and are jittered, so that neither lines across their borders nor exact places
tell; colours are dropped, so that neither do the colour fringes of a lens.

Doersch, Gupta, Efros: Unsupervised Visual Representation Learning by Context Prediction, 2015.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Key

from metagen_jax.errors import UserError
from metagen_jax.gradients import task_keys
from metagen_jax.self_supervised.simclr import Augment, Embed, check_embeddings
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.types import Batch, LossFn, Metrics, Params, PRNGKey

DIRECTIONS = np.array([(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)])
"""Down and across from a patch to each of its eight neighbours, in the order of reading."""

Classify = Callable[[Params, Array], Any]
"""`classify(params, pairs (n, 2 features)) -> logits (n, 8)`."""


class PatchPair(NamedTuple):
    """A patch, one of its neighbours, and which of the `DIRECTIONS` leads from one to the other."""

    centre: Float[Array, "*n p p c"]
    neighbour: Float[Array, "*n p p c"]
    direction: Int32[Array, "*n"]


def sample_patch_pair(
    key: PRNGKey, image: Float[Array, "h w c"], *, patch_size: int, gap: int, jitter: int
) -> PatchPair:
    """A patch anywhere and one of its eight neighbours, all eight equally likely.

    The neighbour is `patch_size + gap` pixels away, and then moved by up to `jitter` pixels down
    and across; the first patch lies uniformly among the places where every neighbour would fit.
    Section 3 of Doersch et al. 2015: patches of 96 pixels, gaps of 48, jitter of 7.

    Args:
      key: a typed key.
      image: `(h, w, c)`, at least `3 patch_size + 2 gap + 2 jitter` pixels a side.
      patch_size: in pixels.
      gap: in pixels.
      jitter: in pixels.

    Raises:
      UserError: the picture is too small, or a length is negative.
    """
    if patch_size < 1 or min(gap, jitter) < 0:
        raise UserError(
            f"patch_size is {patch_size}, gap {gap} and jitter {jitter}; give a patch 1 pixel or "
            "more, and no negative gap or jitter"
        )
    need = 3 * patch_size + 2 * gap + 2 * jitter
    if min(image.shape[:2]) < need:
        raise UserError(
            f"the picture has {image.shape[0]}x{image.shape[1]} pixels; patches of {patch_size} "
            f"with a gap of {gap} and a jitter of {jitter} need {need} a side"
        )
    place_key, direction_key, jitter_key = jax.random.split(key, 3)
    reach = patch_size + gap + jitter
    last = jnp.array(image.shape[:2]) - patch_size - reach
    corner = jax.random.randint(place_key, (2,), reach, last + 1)
    direction = jax.random.randint(direction_key, (), 0, len(DIRECTIONS), jnp.int32)
    moved = jax.random.randint(jitter_key, (2,), -jitter, jitter + 1)
    neighbour = corner + (patch_size + gap) * jnp.asarray(DIRECTIONS)[direction] + moved

    def cut(corner):
        sizes = (patch_size, patch_size, image.shape[2])
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), sizes)

    return PatchPair(cut(corner), cut(neighbour), direction)


def drop_colours(
    key: PRNGKey, patch: Float[Array, "p p c"], *, probability: float = 1.0
) -> Float[Array, "p p c"]:
    """Leaves one channel, any, and noise of a hundredth of its deviation in the others.

    Section 3.1 of Doersch et al. 2015. Pictures are to be centred: the noise has mean zero.

    Args:
      key: a typed key.
      patch: `(p, p, c)`.
      probability: that colours are dropped at all. A net that never sees any is blind to them;
        one that always may see them can take the shortcut.
    """
    key, chosen_key = jax.random.split(key)
    channel_key, noise_key = jax.random.split(key)
    kept = jax.random.randint(channel_key, (), 0, patch.shape[-1])
    noise = 0.01 * patch[..., kept].std() * jax.random.normal(noise_key, patch.shape, patch.dtype)
    whole = ~jax.random.bernoulli(chosen_key, probability)
    return jnp.where(whole | (jnp.arange(patch.shape[-1]) == kept), patch, noise)


def sample_patch_pairs(
    key: Key[Array, "..."],
    images: Float[Array, "n h w c"],
    *,
    patch_size: int,
    gap: int,
    jitter: int,
    augment: Augment | None = None,
) -> PatchPair:
    """`sample_patch_pair` of each image, each patch then changed by itself.

    Args:
      key: one key, of which image `i` gets `fold_in(key, i)`, or one for each image.
      images: `(n, h, w, c)`.
      patch_size: in pixels.
      gap: in pixels.
      jitter: in pixels.
      augment: changes a patch, such as `drop_colours`; None leaves it.
    """
    keys = task_keys(key, len(images)) if key.ndim == 0 else key

    def of_one(key: PRNGKey, image: Array) -> PatchPair:
        place_key, *patch_keys = jax.random.split(key, 3)
        pair = sample_patch_pair(place_key, image, patch_size=patch_size, gap=gap, jitter=jitter)
        if augment is None:
            return pair
        centre, neighbour = map(augment, patch_keys, pair[:2])
        return PatchPair(centre, neighbour, pair.direction)

    return jax.vmap(of_one)(keys, images)


def context_prediction_loss(
    embed: Embed,
    classify: Classify,
    *,
    patch_size: int,
    gap: int,
    jitter: int,
    augment: Augment | None = drop_colours,
) -> LossFn:
    """The cross-entropy of the direction from one patch to the other, in nats.

    `-mean_i log softmax(classify(embed(centre_i), embed(neighbour_i)))[direction_i]`; chance is
    `ln 8`. All patches are embedded by the same net, as one batch.

    Args:
      embed: `(params, patches (2 n, p, p, c)) -> (2 n, features)`.
      classify: `(params, (n, 2 features)) -> (n, 8)`.
      patch_size: in pixels; see `sample_patch_pair`.
      gap: in pixels.
      jitter: in pixels.
      augment: changes a patch; None leaves it, for pictures of one channel.

    Returns:
      A loss over batches of images `(n, h, w, c)` with the metric `accuracy`, by chance 1/8. Its
      key may be one key, or one for each image. It raises a UserError for pictures that are too
      small, and embeddings that are not vectors.
    """

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        pair = sample_patch_pairs(
            key, batch, patch_size=patch_size, gap=gap, jitter=jitter, augment=augment
        )
        patches = jnp.concatenate([pair.centre, pair.neighbour])
        z = check_embeddings(embed(params, patches), len(patches))
        pairs = jnp.concatenate(jnp.split(z, 2), axis=1)
        return cross_entropy_loss(classify)(params, (pairs, pair.direction), key)

    return loss_fn
