"""How well a score tells two classes apart, whatever the threshold and however rare one is."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from metagen_jax.types import AnyArray


def roc_auc(
    scores: Float[AnyArray, " n"], labels: Int[AnyArray, " n"] | Bool[AnyArray, " n"]
) -> Float[Array, ""]:
    """The area under the receiver operating characteristic.

    `P(s_i > s_j) + P(s_i = s_j) / 2` for a positive example `i` and a negative one `j`, from the
    ranks of the scores (Mann and Whitney 1947):
    `(sum of the ranks of positives - P (P + 1) / 2) / (P N)`, equal scores sharing their mean rank.

    Args:
      scores: `(n,)`, larger for what is held more positive. A NaN is wrong: it ranks a positive
        example below and a negative one above all others.
      labels: `(n,)`, 1 or True for positive.

    Returns:
      A scalar; 1 for a perfect order, 0.5 for chance, NaN without positives or without negatives.
    """
    positive = labels.astype(bool)
    scores = jnp.where(jnp.isnan(scores), jnp.where(positive, -jnp.inf, jnp.inf), scores)
    ordered = jnp.sort(scores)
    below = jnp.searchsorted(ordered, scores, side="left")
    not_above = jnp.searchsorted(ordered, scores, side="right")
    ranks = (below + not_above + 1) / 2
    num_positive = positive.sum().astype(ranks.dtype)
    num_negative = len(scores) - num_positive
    surplus = jnp.where(positive, ranks, 0).sum() - num_positive * (num_positive + 1) / 2
    return surplus / (num_positive * num_negative)


def balanced_accuracy(
    predicted: Int[AnyArray, " n"], labels: Int[AnyArray, " n"], *, num_classes: int
) -> Float[Array, ""]:
    """The mean over classes of the fraction of each that is predicted right.

    Args:
      predicted: `(n,)` integers.
      labels: `(n,)` integers 0..num_classes-1.
      num_classes: how many classes.

    Returns:
      A scalar; `1 / num_classes` for chance, NaN if a class has no example.
    """
    is_class = labels == jnp.arange(num_classes)[:, None]
    right = is_class & (predicted == labels)
    return (right.sum(1) / is_class.sum(1)).mean()
