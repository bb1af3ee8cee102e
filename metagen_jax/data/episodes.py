"""Few-shot episodes, and plain batches, drawn on the device, inside the compiled step, from a key.

Examples are kept sorted by class, so that an episode is two draws of distinct small numbers and
one gather; nothing is sorted and no host takes part.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from metagen_jax.errors import UserError
from metagen_jax.types import Episode, PRNGKey


class ClassData(NamedTuple):
    """Examples sorted by class.

    Attributes:
      examples: a pytree of arrays, leading axis the examples, those of a class next to each other.
      starts: `(classes,)`, where each class begins.
      sizes: `(classes,)`, how many examples it has.
    """

    examples: PyTree
    starts: Int[Array, " classes"]
    sizes: Int[Array, " classes"]


def group_by_class(examples: PyTree, labels: Int[np.ndarray, " n"]) -> ClassData:
    """Sorts labelled examples by class, as `sample_episode` takes them.

    Args:
      examples: any pytree of arrays with a leading axis of `n`: images, or images with masks, ...
      labels: `(n,)` integers of any values; classes are numbered in their order.

    Raises:
      UserError: if there are no examples, or not one label for each.
    """
    labels = np.asarray(labels)
    lengths = sorted({len(x) for x in jax.tree.leaves(examples)})
    if lengths != [len(labels)] or not len(labels):
        raise UserError(
            f"there are {len(labels)} labels for examples of lengths {lengths}; "
            "give at least one example, and one label for each"
        )
    order = np.argsort(labels, kind="stable")
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    return ClassData(
        examples=jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[order]), examples),
        starts=jnp.asarray(starts, jnp.int32),
        sizes=jnp.asarray(sizes, jnp.int32),
    )


def check_episodes(
    data: ClassData,
    *,
    num_ways: int,
    num_shots: int,
    num_queries: int,
    num_rotations: int = 1,
    replacement: bool = False,
) -> None:
    """Raises a UserError if the data cannot give such episodes.

    `sample_episode` itself sees how many classes there are, but not how large they are: sizes are
    values on the device.
    """
    _check_counts(data, num_ways, num_shots, num_queries, num_rotations)
    if replacement:
        return
    needed, smallest = num_shots + num_queries, int(data.sizes.min())
    if smallest < needed:
        raise UserError(
            f"{num_shots} shots and {num_queries} queries need {needed} examples of each class and "
            f"the smallest class has {smallest}; ask for fewer shots or queries, or drop the class"
        )


def _check_counts(
    data: ClassData, num_ways: int, num_shots: int, num_queries: int, num_rotations: int
) -> None:
    if num_rotations not in (1, 4):
        raise UserError(f"num_rotations is {num_rotations}; give 1, or 4 for quarter turns")
    if num_ways < 1 or min(num_shots, num_queries) < 0:
        raise UserError(
            f"num_ways is {num_ways}, num_shots {num_shots} and num_queries {num_queries}; give 1 "
            "way or more, and no negative number of examples"
        )
    num_classes = len(data.sizes) * num_rotations
    if num_classes < num_ways:
        turned = " with their quarter turns" if num_rotations > 1 else ""
        raise UserError(
            f"{num_ways}-way episodes need {num_ways} classes and the data has {num_classes}"
            f"{turned}; lower num_ways or give more classes"
        )


def sample_episode(
    key: PRNGKey,
    data: ClassData,
    *,
    num_ways: int,
    num_shots: int,
    num_queries: int,
    num_rotations: int = 1,
    replacement: bool = False,
) -> Episode:
    """One N-way K-shot episode with Q queries a class; a pure function of the key.

    Classes are drawn without replacement and labelled 0..N-1 in the order of the draw; support and
    query examples of a class are disjoint, unless drawn with replacement. With rotations, class `c`
    turned by `r` quarters is a class of its own, and all its examples are turned alike.

    Args:
      key: a typed key.
      data: examples sorted by class; check it once with `check_episodes`.
      num_ways: classes N.
      num_shots: support examples K of each class.
      num_queries: query examples Q of each class.
      num_rotations: 1, or 4 for quarter turns of every leaf, `(n, size, size, ...)`.
      replacement: whether each example of a class is drawn from all of them, so that some may be
        drawn twice and queries be among the support examples.

    Returns:
      `Episode((examples, labels), (examples, labels))` with `N * K` and `N * Q` examples, class by
      class, of the dtype of the data, and int32 labels.

    Raises:
      UserError: there are too few classes, or a count is out of range. Classes of too few examples
        are not noticed here: their episodes would have examples of the next class.
    """
    _check_counts(data, num_ways, num_shots, num_queries, num_rotations)
    class_key, example_key = jax.random.split(key)
    drawn = sample_distinct(class_key, len(data.sizes) * num_rotations, num_ways)
    classes, turns = drawn // num_rotations, drawn % num_rotations

    def draw_class(key, index, turn):
        size, count = data.sizes[index], num_shots + num_queries
        if replacement:
            chosen = jax.random.randint(key, (count,), 0, size)
        else:
            chosen = sample_distinct(key, size, count)
        examples = jax.tree.map(lambda x: x[data.starts[index] + chosen], data.examples)
        return _rotate(examples, turn) if num_rotations > 1 else examples

    examples = jax.vmap(draw_class)(jax.random.split(example_key, num_ways), classes, turns)
    labels = jnp.arange(num_ways, dtype=jnp.int32)

    def part(start: int, stop: int):
        flat = jax.tree.map(lambda x: x[:, start:stop].reshape(-1, *x.shape[2:]), examples)
        return flat, jnp.repeat(labels, stop - start)

    return Episode(support=part(0, num_shots), query=part(num_shots, num_shots + num_queries))


def sample_batch(
    key: PRNGKey, data: ClassData, *, batch_size: int, num_rotations: int = 1
) -> tuple[PyTree, Int[Array, " batch"]]:
    """A batch of examples and their classes, for a conventional classifier of all classes.

    Examples are drawn with replacement, all equally likely.

    Args:
      key: a typed key.
      data: examples sorted by class.
      batch_size: how many examples.
      num_rotations: 1, or 4 for quarter turns of every leaf, `(n, size, size, ...)`.

    Returns:
      `(examples, labels)`, of the dtype of the data and int32; class `c` turned by `r` quarters has
      the label `c * num_rotations + r`.
    """
    index_key, turn_key = jax.random.split(key)
    indices = jax.random.randint(index_key, (batch_size,), 0, data.sizes.sum())
    classes = jnp.searchsorted(data.starts, indices, side="right").astype(jnp.int32) - 1
    turns = jax.random.randint(turn_key, (batch_size,), 0, num_rotations)
    examples = jax.tree.map(lambda x: x[indices], data.examples)
    if num_rotations > 1:
        examples = jax.vmap(_rotate)(jax.tree.map(lambda x: x[:, None], examples), turns)
        examples = jax.tree.map(lambda x: x[:, 0], examples)
    return examples, classes * num_rotations + turns


def sample_distinct(key: PRNGKey, population: int | Int[Array, ""], count: int) -> Int[Array, "k"]:
    """`count` distinct integers below `population`, every ordered choice equally likely.

    Draw `i` is uniform over the `population - i` numbers not yet taken: it is drawn below that
    count and moved past each taken number, smallest first. Costs `count^2` comparisons whatever the
    population, which may be traced.
    """
    indices = jnp.arange(count)
    draws = jax.random.randint(key, (count,), 0, population - indices)

    def place(i, state):
        chosen, taken = state  # `taken` holds the first i choices in order, then the largest int
        value = draws[i] + (draws[i] >= taken - indices).sum()
        rank = (taken < value).sum()
        shifted = jnp.where(indices > rank, jnp.roll(taken, 1), taken)
        return chosen.at[i].set(value), shifted.at[rank].set(value)

    unfilled = jnp.full((count,), jnp.iinfo(jnp.int32).max, jnp.int32)
    return jax.lax.fori_loop(0, count, place, (jnp.zeros(count, jnp.int32), unfilled))[0]


def _rotate(images: PyTree, quarter_turns: Int[Array, ""]) -> PyTree:
    """Every leaf `(n, size, size, ...)` turned counter-clockwise by a traced number of quarters."""

    def rotate(x):
        turned = jnp.where(quarter_turns % 2 == 1, jnp.flip(jnp.swapaxes(x, 1, 2), 1), x)
        return jnp.where(quarter_turns >= 2, jnp.flip(turned, (1, 2)), turned)

    return jax.tree.map(rotate, images)
