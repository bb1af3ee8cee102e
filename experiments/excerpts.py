"""Excerpts of one length of sequences of any length, for training and for exact evaluation."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from metagen_jax.counted import counted_mean
from metagen_jax.evaluation.estimates import Estimate, estimate_ratio
from metagen_jax.generative.likelihoods import categorical_log_prob
from metagen_jax.types import AnyArray, Batch, LossFn, Metrics, Params, PRNGKey


class Excerpt(NamedTuple):
    """A piece of a sequence.

    Attributes:
      values: of its elements, and anything after the sequence's end.
      counted: of which elements the probability counts; the others are there to be seen.
    """

    values: Integer[AnyArray, "*n t"]
    counted: Bool[AnyArray, "*n t"]


class Sequences(NamedTuple):
    """Sequences as a model takes them.

    Attributes:
      values: the elements of all, one sequence after the other.
      starts: where each begins, and at the end how many elements there are.
      conditions: what the model is told of each; of no entries if that is nothing.
    """

    values: Integer[AnyArray, " total"]
    starts: Int[AnyArray, " n_plus_1"]
    conditions: Float[AnyArray, "n d"]


class Cut(NamedTuple):
    """Sequences cut into excerpts, in which every element counts once.

    Attributes:
      excerpts: of all sequences.
      conditions: of each excerpt.
      owners: the sequence of each excerpt.
    """

    excerpts: Excerpt
    conditions: Float[np.ndarray, "m d"]
    owners: Int[np.ndarray, " m"]


def as_list(sequences: Sequences) -> list[np.ndarray]:
    """The elements of each sequence."""
    return np.split(np.asarray(sequences.values), np.asarray(sequences.starts)[1:-1])


def draw_excerpts(
    key: PRNGKey, sequences: Sequences, *, count: int, length: int, warm_up: int
) -> tuple[Excerpt, Float[Array, "count d"]]:
    """Excerpts from places that are drawn evenly, so that all elements count about as often.

    From its place on `length` elements count, as far as the sequence goes, and `warm_up` before it
    are seen; near the beginning of a sequence the excerpt begins there, and all of it counts. A
    place near the end is moved back until `length` elements follow, or the sequence begins. A
    sequence of less than `length` has `length` places: it would else be drawn the more seldom the
    shorter it is, though each time it counts as a whole.
    """
    starts = sequences.starts
    places = jnp.cumsum(jnp.maximum(jnp.diff(starts), length))
    drawn = jax.random.randint(key, (count,), 0, places[-1])
    owners = jnp.searchsorted(places, drawn, side="right")
    place = starts[owners] + drawn - jnp.where(owners > 0, places[owners - 1], 0)
    return _excerpts_at(sequences, owners, place, length=length, warm_up=warm_up)


def draw_excerpt_of_each(
    key: PRNGKey, sequences: Sequences, owners: Int[Array, " n"], *, length: int, warm_up: int
) -> tuple[Excerpt, Float[Array, "n d"]]:
    """Likewise one excerpt of each of these sequences, which are given by number."""
    first, after = sequences.starts[owners], sequences.starts[owners + 1]
    place = jax.random.randint(key, owners.shape, first, after)
    return _excerpts_at(sequences, owners, place, length=length, warm_up=warm_up)


def _excerpts_at(
    sequences: Sequences,
    owners: Int[Array, " n"],
    place: Int[Array, " n"],
    *,
    length: int,
    warm_up: int,
) -> tuple[Excerpt, Float[Array, "n d"]]:
    """As `draw_excerpts` has them, from a place in each of these sequences."""
    values, starts, conditions = sequences
    place = jnp.minimum(place, jnp.maximum(starts[owners + 1] - length, starts[owners]))
    begin = jnp.maximum(place - warm_up, starts[owners])
    first = jnp.where(begin == starts[owners], begin, place)
    index = begin[:, None] + jnp.arange(warm_up + length)
    counted = (index >= first[:, None]) & (index < starts[owners + 1][:, None])
    return Excerpt(values[jnp.minimum(index, len(values) - 1)], counted), conditions[owners]


def cut(sequences: Sequences, *, length: int, reach: int) -> Cut:
    """All sequences in pieces of `length` that count, each with `reach` elements before it.

    The first piece has nothing before it, and so many more that count. Of a net that sees no
    further than `reach` this is the exact likelihood; of others that of the model which sees as far
    as the excerpt goes.
    """
    values, starts = np.asarray(sequences.values), np.asarray(sequences.starts)
    pieces = [
        (owner, first, after)
        for owner, (start, end) in enumerate(itertools.pairwise(starts))
        for first, after in itertools.pairwise(
            [start, *range(start + reach + length, end, length), end]
        )
    ]
    owners, first, after = np.array(pieces).T
    begin = np.maximum(first - reach, starts[owners])
    index = begin[:, None] + np.arange(reach + length)
    counted = (index >= first[:, None]) & (index < after[:, None])
    excerpts = Excerpt(values[np.minimum(index, len(values) - 1)], counted)
    return Cut(excerpts, np.asarray(sequences.conditions)[owners], owners)


def excerpt_loss(
    predict: Callable[[Params, Array, Array], Any], *, axis_name: str | None = "tasks"
) -> LossFn:
    """The mean negative log-probability, in nats, of the elements that count, exact over devices.

    Args:
      predict: `(params, values (n, t), conditions (n, d)) -> logits (n, t, classes)`, of each
        element given those before it.
      axis_name: of the devices over whose excerpts the mean is taken; None in an inner loop, where
        each has tasks of its own.

    Returns:
      A loss over `(excerpts, conditions)`, whose metric `count` is how many count, for
      `weighted_by_count`.
    """

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        del key
        excerpts, conditions = batch
        log_probs = categorical_log_prob(
            excerpts.values, predict(params, excerpts.values, conditions)
        )
        count = excerpts.counted.sum().astype(log_probs.dtype)
        return -counted_mean(log_probs, excerpts.counted, axis_name=axis_name), {"count": count}

    return loss_fn


def ratio_over_sequences(
    of_pieces: Float[np.ndarray, " m"], pieces: Cut, counts: Int[np.ndarray, " n"]
) -> Estimate:
    """The sum over all pieces by that of the counts, with its interval over sequences."""
    return estimate_ratio(np.bincount(pieces.owners, weights=of_pieces), counts)
