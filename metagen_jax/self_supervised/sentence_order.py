"""Sentence order: does the first of two neighbouring segments of a document come first?

Unlike a segment of another document, a swapped one is of the same topic, so that the topic tells
nothing.

Lan, Chen, Goodman, Gimpel, Sharma, Soricut: ALBERT: A Lite BERT for Self-supervised Learning of
Language Representations, 2020.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from metagen_jax.errors import UserError
from metagen_jax.gradients import task_keys
from metagen_jax.types import AnyArray, Batch, LossFn, Metrics, Params

Apply = Callable[[Params, Array], Any]
"""`apply(params, pairs (n, t)) -> logits (n,)`, of the two segments being in order."""


def sentence_order_loss(apply: Apply) -> LossFn:
    """The mean over pairs of `-log p(in order, or swapped)`, each with probability 1/2, in nats.

    Section 3.1 of Lan et al. 2020. By chance it is log 2.

    Args:
      apply: the net.

    Returns:
      A loss over pairs `(in_order, swapped)`, each tokens `(n, t)`, such as
      `metagen_jax.data.sentence_pairs` makes. Its key may be one key, or one for each pair. Metric:
      `accuracy`. It raises a UserError for logits of another shape.
    """

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        in_order, swapped = batch
        tokens, labels = draw_order(key, in_order, swapped)
        logits = apply(params, tokens)
        if logits.shape != labels.shape:
            raise UserError(
                f"logits have shape {logits.shape} for {len(labels)} pairs; give one number for "
                f"each, shape {labels.shape}"
            )
        losses = optax.sigmoid_binary_cross_entropy(logits, labels)
        return losses.mean(), {"accuracy": ((logits > 0) == labels).mean()}

    return loss_fn


def draw_order(
    key: Key[Array, "..."], in_order: Int[AnyArray, "n t"], swapped: Int[AnyArray, "n t"]
) -> tuple[Int[Array, "n t"], Int[Array, " n"]]:
    """Each pair in one of its orders, and 1 where it is the order of the document, otherwise 0.

    Args:
      key: one key, of which pair `i` gets `fold_in(key, i)`, or one for each pair.
      in_order: tokens of the pairs.
      swapped: the same with the second segment first.
    """
    keys = task_keys(key, len(in_order)) if key.ndim == 0 else key
    kept = jax.vmap(jax.random.bernoulli)(keys)
    tokens = jnp.where(kept[:, None], jnp.asarray(in_order), jnp.asarray(swapped))
    return tokens, kept.astype(jnp.int32)
