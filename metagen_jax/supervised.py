"""Losses of labelled examples, the ones that a learner most often adapts by."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from metagen_jax.types import Batch, LossFn, Metrics, Params, PRNGKey

Apply = Callable[[Params, PyTree], Array]
"""`apply(params, inputs) -> outputs`, such as the `apply` of a flax module."""


def cross_entropy_loss(apply: Apply) -> LossFn:
    """Mean negative log-probability, in nats, of integer labels under softmax logits.

    Args:
      apply: `(params, inputs) -> logits (n, classes)`.

    Returns:
      A loss over batches `(inputs, labels (n,))`, with the metric `accuracy`.
    """

    def loss_fn(params: Params, batch: Batch, key: PRNGKey) -> tuple[Array, Metrics]:
        del key
        inputs, labels = batch
        logits = apply(params, inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), {"accuracy": (logits.argmax(-1) == labels).mean()}

    return loss_fn


def squared_error_loss(apply: Apply) -> LossFn:
    """Mean over examples and outputs of `(output - target)^2`.

    Args:
      apply: `(params, inputs) -> outputs`, of the shape of the targets.

    Returns:
      A loss over batches `(inputs, targets)`, without metrics of its own.
    """

    def loss_fn(params: Params, batch: Batch, key: PRNGKey) -> tuple[Array, Metrics]:
        del key
        inputs, targets = batch
        return jnp.square(apply(params, inputs) - targets).mean(), {}

    return loss_fn
