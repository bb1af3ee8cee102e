"""SimCLR: two random views of an image find each other among those of all images.

    loss_fn = simclr_loss(lambda p, x: head.apply(p["head"], net.apply(p["net"], x)), augment,
                          temperature=0.5)

`two_view_loss` takes any other comparison of two views in its place, such as those of
`metagen_jax.self_supervised.decorrelation`.

The features that later tasks use are those before the head (section 4.2 of the paper).

Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual
Representations, 2020.
Chen, He: Exploring Simple Siamese Representation Learning, 2021.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped

from metagen_jax.errors import UserError
from metagen_jax.gradients import task_keys
from metagen_jax.self_supervised.contrastive import nt_xent
from metagen_jax.similarity import unit_rows
from metagen_jax.types import Batch, LossFn, Metrics, Params, PRNGKey

Augment = Callable[[PRNGKey, Array], Array]
"""`augment(key, image) -> view`, of ONE image, such as a composition of the functions in
`metagen_jax.data.augment`; all views have one shape."""

Embed = Callable[[Params, Array], Any]
"""`embed(params, images (n, ...)) -> (n, features)`."""

Compare = Callable[[Array, Array], Array]
"""`compare(z_a, z_b) -> values`, of two views' embeddings `(n, features)`: one value or many."""


def two_view_loss(embed: Embed, augment: Augment, compare: Compare) -> LossFn:
    """The mean of `compare` over the embeddings of two views of each image.

    Both views of all images are embedded as one batch. So that a batch norm sees those of all
    devices, as one device would, give it their `axis_name` too.

    Args:
      embed: the net and its projection head.
      augment: makes a view.
      compare: such as `functools.partial(vicreg, axis_name="tasks")`.

    Returns:
      A loss over batches of images `(n, ...)`. Its key may be one key, of which image `i` gets
      `fold_in(key, i)`, or `n` keys, as `data_parallel` gives them. Metrics: `spread`, 1 for
      embeddings in all directions, 0 for collapsed ones. It raises a UserError for embeddings that
      are not vectors.
    """

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        views = two_views(key, batch, augment)
        z = check_embeddings(embed(params, jnp.concatenate(views)), 2 * len(batch))
        return compare(*jnp.split(z, 2)).mean(), {"spread": spread(z)}

    return loss_fn


def simclr_loss(
    embed: Embed,
    augment: Augment,
    *,
    temperature: float,
    axis_name: str | None = None,
    block_size: int | None = None,
) -> LossFn:
    """The mean of `nt_xent` over two views of each image: algorithm 1 of Chen et al. 2020.

    Args:
      embed: the net and its projection head.
      augment: makes a view.
      temperature: published: 0.5 for CIFAR-10.
      axis_name: of the devices whose images are candidates too, as in `nt_xent`.
      block_size: views that are compared at once, as in `nt_xent`.

    Returns:
      A loss as that of `two_view_loss`.
    """
    compare = functools.partial(
        nt_xent, temperature=temperature, axis_name=axis_name, block_size=block_size
    )
    return two_view_loss(embed, augment, compare)


def two_views(
    key: Key[Array, "..."], images: Shaped[Array, "n *shape"], augment: Augment
) -> tuple[Array, Array]:
    """Two views of each image, each by a key of its own.

    Args:
      key: one key, of which image `i` gets `fold_in(key, i)`, or one for each image.
      images: `(n, ...)`.
      augment: of one image.
    """
    keys = task_keys(key, len(images)) if key.ndim == 0 else key
    of_views = jax.vmap(jax.random.split, out_axes=1)(keys)
    first, second = jax.vmap(jax.vmap(augment), in_axes=(0, None))(of_views, images)
    return first, second


def spread(z: Float[Array, "n features"]) -> Float[Array, ""]:
    """How far directions differ: `sqrt(d mean_j Var(z_j / |z|))`.

    1 for directions that are spread evenly, 0 for embeddings that are all alike (section 4.1 of
    Chen and He 2021).
    """
    return jnp.sqrt(unit_rows(z.astype(jnp.float32)).var(0).sum())


def check_embeddings(z: Array, num_images: int) -> Array:
    """The embeddings, if they are vectors, one for each image.

    Raises:
      UserError: they are not.
    """
    if z.ndim != 2 or len(z) != num_images:
        raise UserError(
            f"{num_images} images have embeddings of shape {z.shape}; give one vector for each, "
            f"({num_images}, features)"
        )
    return z
