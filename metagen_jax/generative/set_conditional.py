"""Models of an example given other examples of its class, which learn from these in one pass.

    net = AttentionPixelCNN((28, 28, 1), num_outputs=1)
    encode = lambda params, images: net.apply(params, images, method="encode")
    log_prob = ...                                    # (params, Given(image, memory, present), key)
    set_loss(encode, log_prob)                        # over one Episode
    set_log_probs(encode, log_prob)                   # for `evaluate_nll`

Examples are encoded each by itself and once; which of them a model may see is a mask. So all
predictions of a set, each from those before it, are made from one encoding.

Bartunov, Vetrov: Few-shot Generative Modelling with Generative Matching Networks, 2018.
Edwards, Storkey: Towards a Neural Statistician, 2017.
Reed, Chen, Paine, van den Oord, Eslami, Rezende, Vinyals, de Freitas: Few-shot Autoregressive
Density Estimation: Towards Learning to Learn Distributions, 2018.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from metagen_jax.generative.maximum_likelihood import LogProb
from metagen_jax.gradients import count_tasks, task_keys
from metagen_jax.types import Batch, Episode, LossFn, Metrics, Params, PredictFn, PRNGKey


class Given(NamedTuple):
    """ONE example, and the set from which it is predicted.

    Attributes:
      example: any pytree of arrays.
      memory: of the set's `s` examples what `EncodeSet` gives, leading axis `s` in every leaf.
      present: which of them are given; the model depends on no other.
    """

    example: Any
    memory: Any
    present: Bool[Array, " s"]


EncodeSet = Callable[[Params, PyTree], PyTree]
"""`encode(params, examples (s, ...)) -> memory (s, ...)`, each example by itself."""


def set_loss(encode: EncodeSet, log_prob: LogProb) -> LossFn:
    """`-1/N sum_t log p(x_t | x_1, ..., x_{t-1})`, in nats, over all N examples of an episode.

    Equation 7 of Bartunov and Vetrov 2018, an example: support and query, in this order, are one
    set, of which every example is predicted from those before it, the first from none. All numbers
    of shots from 0 to N - 1 so have an equal part.

    Args:
      encode: `(params, examples) -> memory`.
      log_prob: of one `Given`, exact or a bound.

    Returns:
      A loss over one `Episode` of unlabelled examples, support and query of the same structure.
      Metrics are the terms of the first and of the last example, `nll_first` and `nll_last`.
    """

    def loss_fn(params: Params, episode: Episode, key: PRNGKey) -> tuple[Array, Metrics]:
        examples = jax.tree.map(lambda *parts: jnp.concatenate(parts), *episode)
        num_examples = count_tasks(examples)
        memory, order = encode(params, examples), jnp.arange(num_examples)
        given = Given(examples, memory, order < order[:, None])
        nll = -_log_probs(log_prob, params, given, key)
        return nll.mean(), {"nll_first": nll[0], "nll_last": nll[-1]}

    return loss_fn


def set_log_probs(encode: EncodeSet, log_prob: LogProb) -> PredictFn:
    """`log_probs(params, support, queries, key)`, each query given the whole support set alone.

    For `metagen_jax.evaluation.likelihood_by_shots.evaluate_nll`; the support set may be empty.

    Args:
      encode: `(params, examples) -> memory`.
      log_prob: of one `Given`, exact or a bound; may be of more samples than in the loss.
    """

    def log_probs(params: Params, support: Batch, queries: PyTree, key: PRNGKey) -> Array:
        num_queries, num_shots = count_tasks(queries), len(jax.tree.leaves(support)[0])
        present = jnp.ones((num_queries, num_shots), bool)
        return _log_probs(log_prob, params, Given(queries, encode(params, support), present), key)

    return log_probs


def _log_probs(
    log_prob: LogProb, params: Params, given: Given, key: PRNGKey
) -> Float[Array, " examples"]:
    """Of several examples with a set in common, each with a mask of its own."""
    keys = task_keys(key, count_tasks(given.example))
    axes: Any = Given(example=0, memory=None, present=0)  # pyright: ignore[reportArgumentType]
    return jax.vmap(log_prob, in_axes=(None, axes, 0))(params, given, keys)
