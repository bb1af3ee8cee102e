"""Maximum likelihood: one loss for every model that has a log-probability, exact or a bound."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from metagen_jax.errors import UserError
from metagen_jax.gradients import count_tasks, task_keys
from metagen_jax.types import Batch, LossFn, Metrics, Params, PRNGKey

LogProb = Callable[[Params, Any, PRNGKey], Float[Array, ""]]
"""`log_prob(params, example, key) -> nats` of ONE example, any pytree of arrays: an image, or an
image and its label. Models that are exact ignore the key; bounds draw their noise from it."""


def negative_log_likelihood_loss(log_prob: LogProb) -> LossFn:
    """`-1/N sum_n log_prob(params, x_n, k_n)`, in nats an example.

    Args:
      log_prob: of one example, a scalar: summed over its elements.

    Returns:
      A loss over batches of `N` examples, any pytree with leading axis `N`. Its key may be one
      key, of which example `n` gets `fold_in(key, n)`, or `N` keys, as `data_parallel` gives them.
      It raises a UserError for a log-probability that is not a scalar.
    """

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        num_examples = count_tasks(batch)
        keys = task_keys(key, num_examples) if key.ndim == 0 else key
        log_probs = jax.vmap(log_prob, in_axes=(None, 0, 0))(params, batch, keys)
        if jnp.shape(log_probs) != (num_examples,):
            raise UserError(
                f"the log-probability of an example has shape {jnp.shape(log_probs)[1:]}; "
                "give one number, summed over its elements"
            )
        return -log_probs.mean(), {}

    return loss_fn
