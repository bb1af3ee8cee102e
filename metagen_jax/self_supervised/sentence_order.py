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
from jaxtyping import Array, Key

from metagen_jax.errors import UserError
from metagen_jax.gradients import task_keys
from metagen_jax.types import Batch, LossFn, Metrics, Params

Apply = Callable[[Params, Array, Array, Array], Any]
"""`apply(params, tokens (n, t), documents (n, t), types (n, t)) -> logits (n,)`, of the segments of
each row being in order."""


def sentence_order_loss(apply: Apply) -> LossFn:
    """The mean over pairs of `-log p(in order, or swapped)`, each with probability 1/2, in nats.

    Section 3.1 of Lan et al. 2020. By chance it is log 2.

    Args:
      apply: the net.

    Returns:
      A loss over pairs `(tokens, documents, types, ...)`, each `(n, 2, t)`, at 0 in the right order
      and at 1 in the wrong one, such as `metagen_jax.data.text.sentence_pairs` makes. Its key may
      be one key, of which pair `i` gets `fold_in(key, i)`, or one for each pair. Metric:
      `accuracy`. It raises a UserError for logits of another shape.
    """

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        rows = tuple(batch[:3])
        keys = task_keys(key, len(rows[0])) if key.ndim == 0 else key
        in_order = jax.vmap(jax.random.bernoulli)(keys)
        chosen = jax.tree.map(lambda x: jax.vmap(jnp.where)(in_order, x[:, 0], x[:, 1]), rows)
        logits = apply(params, *chosen)
        if jnp.shape(logits) != in_order.shape:
            raise UserError(
                f"the logits have shape {jnp.shape(logits)} for {len(in_order)} pairs; give one "
                f"number for each, shape {in_order.shape}"
            )
        losses = optax.sigmoid_binary_cross_entropy(logits, in_order)
        return losses.mean(), {"accuracy": ((logits > 0) == in_order).mean()}

    return loss_fn
