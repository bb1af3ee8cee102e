"""Losses of labelled examples, the ones that a learner most often adapts by."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from metagen_jax.errors import UserError
from metagen_jax.types import Batch, LossFn, Metrics, Params

Apply = Callable[..., Any]
"""`apply(params, inputs) -> outputs`, such as the `apply` of a flax module."""


def cross_entropy_loss(apply: Apply) -> LossFn:
    """Mean negative log-probability, in nats, of integer labels under softmax logits.

    Args:
      apply: `(params, inputs) -> logits (n, classes)`.

    Returns:
      A loss over batches `(inputs, labels (n,))`, with the metric `accuracy`. It raises a
      UserError for labels of another shape, such as one-hot ones.
    """

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        del key
        inputs, labels = batch
        logits = apply(params, inputs)
        if jnp.shape(labels) != logits.shape[:-1]:
            raise UserError(
                f"the labels have shape {jnp.shape(labels)} for logits of shape {logits.shape}; "
                f"give one integer for each row, shape {logits.shape[:-1]}"
            )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), {"accuracy": (logits.argmax(-1) == labels).mean()}

    return loss_fn


def squared_error_loss(apply: Apply) -> LossFn:
    """Mean over examples and outputs of `(output - target)^2`.

    Args:
      apply: `(params, inputs) -> outputs`, of the shape of the targets.

    Returns:
      A loss over batches `(inputs, targets)`, without metrics of its own. It raises a UserError
      for targets of another shape, which would be broadcast.
    """

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        del key
        inputs, targets = batch
        outputs = apply(params, inputs)
        if jnp.shape(targets) != outputs.shape:
            raise UserError(
                f"the targets have shape {jnp.shape(targets)} for outputs of shape "
                f"{outputs.shape}; give them the same shape"
            )
        return jnp.square(outputs - targets).mean(), {}

    return loss_fn
