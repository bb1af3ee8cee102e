"""Episodes of one class for generative models: examples to learn from, and new ones to explain.

An example is what a model sees: 0 and 1, drawn anew or as stored, or levels as stored.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from metagen_jax.data.episodes import ClassData, sample_episode
from metagen_jax.errors import UserError
from metagen_jax.types import Episode, PRNGKey

Drawn = Literal["stored", "bernoulli"]
"""Whether values are as stored, or 0 and 1 with the stored grey value of 255 for probability."""


def sample_set_episode(
    key: PRNGKey,
    data: ClassData,
    *,
    num_shots: int,
    num_queries: int,
    num_rotations: int = 1,
    values: Drawn = "stored",
    replacement: bool = False,
) -> Episode:
    """K examples of one class and Q others of it, without labels; a pure function of the key.

    Args:
      key: a typed key.
      data: images sorted by class; check it once with `check_episodes`, for one way. Of 8 bits, or
        of 0 and 1.
      num_shots: support examples K, 0 or more.
      num_queries: query examples Q.
      num_rotations: 1, or 4: the class may be turned by quarters, all its examples alike.
      values: "stored", or "bernoulli" for each example binarised once in the episode.
      replacement: whether an example may be drawn twice, so that a query may be a support example:
        of classes of 20 it is one with probability `1 - 0.95^K`. So are the episodes of the program
        of Bartunov and Vetrov 2018, Few-shot Generative Modelling with Generative Matching
        Networks; those of others never are.

    Returns:
      `Episode(support (K, ...), query (Q, ...))` of int32.

    Raises:
      UserError: for unknown `values`, and as `sample_episode`.
    """
    if values not in ("stored", "bernoulli"):
        raise UserError(f'values is {values!r}; give "stored" or "bernoulli"')
    episode_key, value_key = jax.random.split(key)
    drawn = sample_episode(
        episode_key,
        data,
        num_ways=1,
        num_shots=num_shots,
        num_queries=num_queries,
        num_rotations=num_rotations,
        replacement=replacement,
    )
    parts = Episode(drawn.support[0], drawn.query[0])
    if values == "bernoulli":
        keys = jax.random.split(value_key)
        parts = Episode(
            *(jax.random.bernoulli(k, x / 255) for k, x in zip(keys, parts, strict=True))
        )
    return jax.tree.map(lambda x: x.astype(jnp.int32), parts)


def first_shots(episode: Episode, num_shots: int) -> Episode:
    """The episode with the first `num_shots` support examples and the same queries.

    So that one draw serves every number of shots, and differences between these are those of the
    same queries.

    Raises:
      UserError: if the support set has fewer.
    """
    lengths = sorted({len(x) for x in jax.tree.leaves(episode.support)})
    if num_shots < 0 or lengths[0] < num_shots:
        raise UserError(f"num_shots is {num_shots} and there are {lengths[0]}; give 0 to as many")
    return Episode(jax.tree.map(lambda x: x[:num_shots], episode.support), episode.query)


def vary_shots(key: PRNGKey, episode: Episode) -> Episode:
    """The episode with 1 to K of its support examples, again and again up to K, all equally likely.

    A meta-learner so meets every number of shots in one compiled step: the mean loss of the support
    set is that of the examples that are left, up to one more copy of some.

    Args:
      key: of the number that is left, `n`; place `i` then holds example `i mod n`.
      episode: with K support examples, 1 or more.
    """
    num_shots = len(jax.tree.leaves(episode.support)[0])
    num_left = jax.random.randint(key, (), 1, num_shots + 1)
    chosen = jnp.arange(num_shots) % num_left

    def take(support: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.take(x, chosen, axis=0), support)

    return Episode(take(episode.support), episode.query)
