"""Episodes from pictures without labels, so that any learner meta-trains without supervision.

UMTRA takes every picture for a class of its own and asks about changed copies of it. CACTUs takes
the clusters of an embedding for classes: partition once with `cluster_classes`, then draw episodes
with `sample_cluster_episode`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, Shaped

from metagen_jax.data.episodes import ClassData, sample_distinct, sample_episode
from metagen_jax.errors import UserError
from metagen_jax.types import Episode, PRNGKey

Augment = Callable[[PRNGKey, Array], Array]
"""`augment(key, image) -> image`, of the same shape and dtype."""

# Distances of so many embeddings to all centres are in memory at once.
_BLOCK = 4096


def umtra_episode(
    key: PRNGKey,
    images: Shaped[Array, "n *shape"],
    *,
    num_ways: int,
    augment: Augment,
    num_queries: int = 1,
    augment_support: Augment | None = None,
) -> Episode:
    """One N-way one-shot episode of unlabelled pictures; a pure function of the key.

    N pictures are drawn without replacement and labelled 0..N-1; the support set is the pictures
    themselves, the queries are changed copies of them. Two pictures of one true class are taken for
    two classes with a probability that is small where classes are many and N is small.

    Args:
      key: a typed key.
      images: `(n, ...)`, all unlabelled pictures.
      num_ways: pictures N of an episode.
      augment: makes a query of a picture, such as a composition of those in
        `metagen_jax.data.augment`. Published for Omniglot: half of the pixels dropped, then a shift
        by up to 6 pixels.
      num_queries: changed copies of each picture.
      augment_support: changes the support pictures too; None leaves them as they are.

    Returns:
      `Episode((images, labels), (images, labels))` with `N` and `N * num_queries` pictures, in the
      order of the labels, of the dtype of `images`, and int32 labels.

    Raises:
      UserError: there are fewer pictures than ways.

    Khodadadeh, Boloni, Shah: Unsupervised Meta-Learning for Few-Shot Image Classification, 2019,
    algorithm 1.
    """
    if len(images) < num_ways:
        raise UserError(
            f"{num_ways}-way episodes need {num_ways} pictures and there are {len(images)}; "
            "lower num_ways or give more pictures"
        )
    draw_key, support_key, query_key = jax.random.split(key, 3)
    originals = images[sample_distinct(draw_key, len(images), num_ways)]

    def changed(key: PRNGKey, change: Augment, count: int) -> Array:
        keys = jax.random.split(key, (num_ways, count))
        of_one = jax.vmap(change, in_axes=(0, None))
        return jax.vmap(of_one)(keys, originals).reshape(-1, *images.shape[1:])

    support = originals if augment_support is None else changed(support_key, augment_support, 1)
    labels = jnp.arange(num_ways, dtype=jnp.int32)
    return Episode(
        support=(support, labels),
        query=(changed(query_key, augment, num_queries), jnp.repeat(labels, num_queries)),
    )


class ClusterData(NamedTuple):
    """Pictures and several partitions of them into clusters, which stand for classes.

    All partitions have the same number of clusters, so that drawing one is an index.

    Attributes:
      images: `(n, ...)`.
      members: numbers of pictures; those of one cluster of one partition are next to each other.
      starts: `(partitions, clusters)`, where in `members` each cluster begins.
      sizes: `(partitions, clusters)`, how many pictures it has.
    """

    images: Array
    members: Int[Array, " members"]
    starts: Int[Array, "partitions clusters"]
    sizes: Int[Array, "partitions clusters"]


def partition_classes(data: ClusterData, index: int | Int[Array, ""]) -> ClassData:
    """One partition, its examples the numbers of pictures; as `check_episodes` takes it."""
    return ClassData(data.members, data.starts[index], data.sizes[index])


def sample_cluster_episode(
    key: PRNGKey, data: ClusterData, *, num_ways: int, num_shots: int, num_queries: int
) -> Episode:
    """One episode whose classes are clusters of one partition, drawn at random.

    Args:
      key: a typed key.
      data: from `cluster_classes` with `min_size >= num_shots + num_queries`.
      num_ways: clusters N, drawn without replacement.
      num_shots: support pictures of each.
      num_queries: query pictures of each.

    Returns:
      What `sample_episode` returns, of the dtype of `data.images`.

    Hsu, Levine, Finn: Unsupervised Learning via Meta-Learning, 2019, algorithm 1.
    """
    partition_key, episode_key = jax.random.split(key)
    partition = jax.random.randint(partition_key, (), 0, len(data.sizes))
    episode = sample_episode(
        episode_key,
        partition_classes(data, partition),
        num_ways=num_ways,
        num_shots=num_shots,
        num_queries=num_queries,
    )
    return Episode(*((data.images[numbers], labels) for numbers, labels in episode))


def cluster_classes(
    key: PRNGKey,
    images: Num[Array | np.ndarray, "pictures *shape"],
    embeddings: Float[Array | np.ndarray, "n d"],
    *,
    num_partitions: int,
    num_clusters: int,
    min_size: int,
    num_iterations: int = 50,
) -> ClusterData:
    """Partitions pictures into clusters of their embeddings, several times.

    The first partition is of the embeddings as they are, each other one of embeddings whose
    dimensions are multiplied by numbers from U[0, 1], as published. Clusters of fewer than
    `min_size` pictures are dropped. So that the partitions can be drawn from by an index, all keep
    as many clusters as the one that keeps fewest, and the largest ones.

    Args:
      key: a typed key.
      images: `(n, ...)`.
      embeddings: `(n, d)`, of the pictures, from any unsupervised learner; `whiten` them if their
        dimensions differ in scale without a meaning.
      num_partitions: how many; published: 1 to 100.
      num_clusters: of each; published for Omniglot: 500.
      min_size: shots and queries of the episodes to be drawn.
      num_iterations: of k-means.

    Returns:
      The partitions, in host memory while they are made and on the device then.

    Raises:
      UserError: a partition has fewer than two clusters of that size, or an argument is out of
        range.

    Hsu, Levine, Finn: Unsupervised Learning via Meta-Learning, 2019, section 3.
    """
    if len(images) != len(embeddings) or num_partitions < 1:
        raise UserError(
            f"there are {len(images)} pictures, {len(embeddings)} embeddings and num_partitions is "
            f"{num_partitions}; give one embedding for each picture, and 1 partition or more"
        )
    embeddings = jnp.asarray(embeddings)
    partitions = []
    for index in range(num_partitions):
        scale_key, cluster_key = jax.random.split(jax.random.fold_in(key, index))
        scales = jax.random.uniform(scale_key, embeddings.shape[1:], embeddings.dtype)
        labels = cluster_labels(
            cluster_key,
            embeddings * scales if index else embeddings,
            num_clusters=num_clusters,
            num_iterations=num_iterations,
        )
        partitions.append(np.asarray(labels))
    sizes = np.stack([np.bincount(labels, minlength=num_clusters) for labels in partitions])
    num_kept = int((sizes >= min_size).sum(1).min())
    if num_kept < 2:
        raise UserError(
            f"a partition has {num_kept} clusters of {min_size} pictures or more out of "
            f"{num_clusters}; lower num_clusters or min_size, or give more pictures"
        )
    largest = np.argsort(-sizes, axis=1, kind="stable")[:, :num_kept]
    starts = np.cumsum(sizes, axis=1) - sizes + len(images) * np.arange(num_partitions)[:, None]
    members = [np.argsort(labels, kind="stable") for labels in partitions]
    return ClusterData(
        images=jnp.asarray(images),
        members=jnp.asarray(np.concatenate(members), jnp.int32),
        starts=jnp.asarray(np.take_along_axis(starts, largest, 1), jnp.int32),
        sizes=jnp.asarray(np.take_along_axis(sizes, largest, 1), jnp.int32),
    )


def turned_clusters(data: ClusterData, num_rotations: int) -> ClusterData:
    """Every cluster turned by quarters as well, each turn a cluster of its own.

    Args:
      data: clusters of images `(n, size, size, ...)`.
      num_rotations: 1 to 4; 1 leaves them as they are.
    """
    turns = range(num_rotations)
    num_images, num_members = len(data.images), len(data.members)
    return ClusterData(
        images=jnp.concatenate([jnp.rot90(data.images, turn, (1, 2)) for turn in turns]),
        members=jnp.concatenate([data.members + turn * num_images for turn in turns]),
        starts=jnp.concatenate([data.starts + turn * num_members for turn in turns], axis=1),
        sizes=jnp.tile(data.sizes, (1, num_rotations)),
    )


def whiten(embeddings: Float[Array, "n d"], *, epsilon: float = 1e-5) -> Float[Array, "n d"]:
    """Embeddings with mean zero and, up to `epsilon`, covariance one, in principal directions.

    `z = diag(s + epsilon)^(-1/2) V^T (x - mean)`, `V diag(s) V^T` the covariance.

    Args:
      embeddings: `(n, d)`.
      epsilon: added to the variances, so that a direction without variance stays small.
    """
    centred = embeddings - embeddings.mean(0)
    covariance = jnp.matmul(centred.T, centred, precision="highest") / len(embeddings)
    variances, directions = jnp.linalg.eigh(covariance)
    rotated = jnp.matmul(centred, directions, precision="highest")
    return rotated * jax.lax.rsqrt(jnp.maximum(variances, 0) + epsilon)


@functools.partial(jax.jit, static_argnames=("num_clusters", "num_iterations"))
def cluster_labels(
    key: PRNGKey,
    embeddings: Float[Array, "n d"],
    *,
    num_clusters: int,
    num_iterations: int = 50,
) -> Int[Array, " n"]:
    """The number of the cluster of each embedding, by k-means.

    Lloyd's iterations from a k-means++ start: `labels_i = argmin_k |x_i - c_k|^2`, then `c_k` = the
    mean of its embeddings; a cluster that is empty keeps its centre. Distances are taken for blocks
    of embeddings, so that 100,000 of them and 1000 clusters take 16 MB at once.

    Args:
      key: a typed key.
      embeddings: `(n, d)`.
      num_clusters: k; some may come out empty.
      num_iterations: how many; more after it has converged change nothing.

    Raises:
      UserError: there are fewer embeddings than clusters.
    """
    if not 1 <= num_clusters <= len(embeddings):
        raise UserError(
            f"num_clusters is {num_clusters} for {len(embeddings)} embeddings; "
            f"give 1 to {len(embeddings)}"
        )

    def improve(_, centres):
        labels = _nearest(embeddings, centres)
        ones = jnp.ones(len(embeddings), embeddings.dtype)
        counts = jax.ops.segment_sum(ones, labels, num_clusters)[:, None]
        sums = jax.ops.segment_sum(embeddings, labels, num_clusters)
        return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), centres)

    start = _plus_plus(key, embeddings, num_clusters)
    return _nearest(embeddings, jax.lax.fori_loop(0, num_iterations, improve, start))


def _nearest(embeddings: Float[Array, "n d"], centres: Float[Array, "k d"]) -> Int[Array, " n"]:
    """The number of the nearest centre; among equals the first."""
    squares = jnp.square(centres).sum(1)

    def of_one(x):
        return jnp.argmin(squares - 2 * jnp.matmul(centres, x, precision="highest"))

    # Vmapped over a block, the product of a matrix and a vector is that of two matrices.
    return jax.lax.map(of_one, embeddings, batch_size=min(_BLOCK, len(embeddings)))


def _plus_plus(
    key: PRNGKey, embeddings: Float[Array, "n d"], num_clusters: int
) -> Float[Array, "k d"]:
    """Centres drawn one after another, with probability as the squared distance to the nearest.

    Arthur and Vassilvitskii: k-means++, 2007.
    """
    first_key, key = jax.random.split(key)
    first = embeddings[jax.random.randint(first_key, (), 0, len(embeddings))]

    def squared_distances(centre):
        return jnp.square(embeddings - centre).sum(1)

    def draw(i, state):
        centres, distances = state
        logits = jnp.log(distances)
        centre = embeddings[jax.random.categorical(jax.random.fold_in(key, i), logits)]
        nearer = jnp.minimum(distances, squared_distances(centre))
        return centres.at[i].set(centre), nearer

    centres = jnp.zeros((num_clusters, *first.shape), first.dtype).at[0].set(first)
    return jax.lax.fori_loop(1, num_clusters, draw, (centres, squared_distances(first)))[0]
