"""Proto-MAML: MAML whose linear head starts from the prototypes of each episode.

Triantafillou et al.: Meta-Dataset: A Dataset of Datasets for Learning to Learn from Few Examples,
2020.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from metagen_jax.meta.adapt import Gradient
from metagen_jax.meta.maml import maml_loss, maml_predict
from metagen_jax.meta.metric import Embed, check_labelled, embed_episode, prototypes
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.types import Batch, Episode, LossFn, Metrics, Params, PredictFn, PRNGKey


class Classifier(NamedTuple):
    """What the inner loop adapts: the parameters of the features, and a head for this episode."""

    body: Params
    kernel: Float[Array, "features ways"]
    bias: Float[Array, " ways"]


def proto_maml_loss(
    features: Embed,
    *,
    num_ways: int,
    inner_optimizer: optax.GradientTransformation,
    num_steps: int,
    gradient: Gradient = "remat",
) -> LossFn:
    """MAML's query loss from a head made of prototypes, over one `Episode`.

    `logits = features(x) W + b` is adapted by its cross-entropy on the support set, W, b and the
    parameters of the features alike, from `W_k = 2 c_k`, `b_k = -|c_k|^2`, c_k the mean of the
    features of class k: section 3 of Triantafillou et al. 2020. Before the first step it is the
    classifier of `prototypical_logits`. The outer gradient passes the prototypes too, also with
    `gradient="first_order"`.

    Args:
      features: `(params, inputs) -> (n, features)`.
      num_ways: classes of a training episode; those of a test episode may be fewer or more.
      inner_optimizer: any optax transformation; `metagen_jax.meta.adapt` says which are safe.
      num_steps: inner steps.
      gradient: see `maml_loss`.

    Returns:
      A `LossFn` over `Episode((inputs, labels), (inputs, labels))` with the metric `accuracy`. Its
      params are those of `features`. Support and queries are two batches to batch norm, as in MAML.
      It raises a UserError for features that are not vectors, or not one integer label each.
    """

    def episode_loss(params: Params, episode: Episode, key: PRNGKey) -> tuple[Array, Metrics]:
        start, head = _from_prototypes(features, params, episode.support, num_ways)

        def apply(adapted: Classifier, inputs: PyTree) -> Array:
            return head(adapted, features(adapted.body, inputs))

        learner = maml_loss(
            cross_entropy_loss(apply),
            inner_optimizer=inner_optimizer,
            num_steps=num_steps,
            gradient=gradient,
        )
        return learner(start, episode, key)

    return episode_loss


def proto_maml_predict(
    features: Embed,
    *,
    num_ways: int,
    inner_optimizer: optax.GradientTransformation,
    num_steps: int,
    every_step: bool = False,
    inductive: bool = False,
) -> PredictFn:
    """Logits of queries after adapting features and a head made of prototypes.

    Args:
      features: `(params, inputs) -> (n, features)`, with `inductive` also `num_reference=m`.
      num_ways: classes of an episode; may differ from training.
      inner_optimizer: as in `proto_maml_loss`.
      num_steps: inner steps; may differ from training.
      every_step: predict before the first and after each step; logits then have a leading axis of
        `num_steps + 1`.
      inductive: take batch norm's statistics from the support set, so that each query is answered
        by itself; otherwise the queries are one batch by themselves, as in training.

    Returns:
      `predict(params, (inputs, labels), inputs, key) -> logits (queries, num_ways)`; `-inf` for a
      class without support.
    """

    def predict(params: Params, support: Batch, inputs: PyTree, key: PRNGKey) -> Array:
        start, head = _from_prototypes(features, params, support, num_ways)

        def apply(adapted: Classifier, inputs: PyTree) -> Array:
            return head(adapted, features(adapted.body, inputs))

        def apply_inductively(adapted: Classifier, support: Batch, inputs: PyTree) -> Array:
            _, _, queries = embed_episode(features, adapted.body, support, inputs, inductive=True)
            return head(adapted, queries)

        learner = maml_predict(
            cross_entropy_loss(apply),
            apply_inductively if inductive else lambda adapted, _, inputs: apply(adapted, inputs),
            inner_optimizer=inner_optimizer,
            num_steps=num_steps,
            every_step=every_step,
        )
        return learner(start, support, inputs, key)

    return predict


def _from_prototypes(
    features: Embed, params: Params, support: Batch, num_ways: int
) -> tuple[Classifier, Callable[[Classifier, Array], Array]]:
    """The classifier before the first step, and `head(classifier, features) -> logits`."""
    inputs, labels = support
    embeddings = features(params, inputs)
    check_labelled(embeddings, labels)
    centres, present = prototypes(embeddings, jnp.asarray(labels), num_ways=num_ways)
    start = Classifier(params, kernel=2 * centres.T, bias=-jnp.square(centres).sum(1))

    def head(classifier: Classifier, features: Array) -> Array:
        # The difference of two large terms, that a matrix product of less precision would drown.
        scores = jnp.matmul(features, classifier.kernel, precision="highest") + classifier.bias
        return jnp.where(present, scores, -jnp.inf)

    return start, head
