"""Few-shot learners that compare embeddings: Prototypical Networks and Matching Networks.

Nothing is adapted to a task: what is learned is an embedding in which the support set classifies
the queries at once.

Snell, Swersky, Zemel: Prototypical Networks for Few-shot Learning, 2017.
Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra: Matching Networks for One Shot Learning, 2016.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, PyTree

from metagen_jax.errors import UserError
from metagen_jax.similarity import unit_rows
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.types import Batch, Episode, LossFn, Metrics, Params, PredictFn, PRNGKey

Distance = Literal["squared_euclidean", "cosine"]
"""How a query is compared with a prototype or an example."""

Embed = Callable[..., Any]
"""`embed(params, inputs) -> (n, features)`; for inductive predictions also `num_reference=m`, by
which batch norm takes its statistics from the first `m` inputs alone."""

Contextualise = Callable[[Params, Array, Array], tuple[Array, Array]]
"""`contextualise(params, support, queries) -> (support, queries)`, embeddings that know the set."""


def prototypes(
    support: Float[Array, "support features"],
    labels: Integer[Array, " support"],
    *,
    num_ways: int,
) -> tuple[Float[Array, "{num_ways} features"], Bool[Array, " {num_ways}"]]:
    """The mean embedding of each class: equation 1 of Snell et al. 2017.

    Args:
      support: embeddings `(support, features)`.
      labels: `(support,)`, classes 0..num_ways-1; an example of another class counts nowhere.
      num_ways: how many classes.

    Returns:
      The means `(num_ways, features)`, zero for a class without examples, and whether a class has
      any, `(num_ways,)`.
    """
    belongs = (labels == jnp.arange(num_ways)[:, None]).astype(support.dtype)
    counts = belongs.sum(1)
    sums = jnp.matmul(belongs, support, precision="highest")
    return sums / jnp.maximum(counts, 1)[:, None], counts > 0


def prototypical_logits(
    support: Float[Array, "support features"],
    labels: Integer[Array, " support"],
    queries: Float[Array, "queries features"],
    *,
    num_ways: int,
    distance: Distance = "squared_euclidean",
) -> Float[Array, "queries {num_ways}"]:
    """How near each query is to the mean embedding of each class.

    `logits[q, k] = -|q - c_k|^2`, or `q . c_k / (|q| |c_k|)` by cosine: equations 1 and 2 of
    Snell et al. 2017, whose softmax they are to be put in. By the squared distance it is a linear
    classifier, of weights `2 c_k` and biases `-|c_k|^2` (their equation 8).

    Args:
      support: embeddings `(support, features)`.
      labels: `(support,)`, classes 0..num_ways-1.
      queries: embeddings `(queries, features)`.
      num_ways: how many classes.
      distance: "squared_euclidean", or "cosine", whose logits stay within -1 and 1: no class of
        many gets a probability near 1, which the paper finds to train worse. A vector of zeros has
        a cosine of 0 with all.

    Returns:
      `(queries, num_ways)`; `-inf` for a class without support.

    Raises:
      UserError: for an unknown distance.
    """
    centres, present = prototypes(support, labels, num_ways=num_ways)
    return jnp.where(present, _similarities(queries, centres, distance), -jnp.inf)


def matching_log_probs(
    support: Float[Array, "support features"],
    labels: Integer[Array, " support"],
    queries: Float[Array, "queries features"],
    *,
    num_ways: int,
    distance: Distance = "cosine",
) -> Float[Array, "queries {num_ways}"]:
    """Log-probability of each class as the attention that a query pays to its examples.

    `p(k | q) = sum_{s in class k} a(q, s)`, `a(q, .) = softmax_s(q . s / (|q| |s|))`: equation 1
    and section 2.1.1 of Vinyals et al. 2016; by the squared distance `softmax_s(-|q - s|^2)`,
    which with one example a class is `prototypical_logits`.

    Args:
      support: embeddings `(support, features)`.
      labels: `(support,)`, classes 0..num_ways-1.
      queries: embeddings `(queries, features)`; by cosine one of zeros pays equal attention to all.
      num_ways: how many classes.
      distance: "cosine", as published, or "squared_euclidean". By cosine a class of `n` examples
        among `m` gets at most `e^2 n / (e^2 n + m - n)`, and `e n / (e n + m - n)` where no
        embedding has a negative entry: 0.40 of 5 ways, which trains slowly.

    Returns:
      `(queries, num_ways)`, of which the exponentials of a row sum to 1; `-inf` for a class without
      support.

    Raises:
      UserError: for an unknown distance.
    """
    similarities = _similarities(queries, support, distance)
    belongs = labels == jnp.arange(num_ways)[:, None]
    of_class = jnp.where(belongs, similarities[:, None, :], -jnp.inf)
    # A class without examples has no finite term, and a sum of none has no derivative.
    present = belongs.any(1)
    attended = jax.nn.logsumexp(jnp.where(present[:, None], of_class, 0), axis=-1)
    log_probs = attended - jax.nn.logsumexp(similarities, axis=-1, keepdims=True)
    return jnp.where(present, log_probs, -jnp.inf)


def prototypical_loss(
    embed: Embed, *, num_ways: int, distance: Distance = "squared_euclidean"
) -> LossFn:
    """The cross-entropy of the queries under `prototypical_logits`, over one `Episode`.

    `-mean_q log softmax(logits[q])[label_q]`: algorithm 1 of Snell et al. 2017. Support and
    queries are embedded as one batch, and so is what batch norm sees.

    Args:
      embed: `(params, inputs) -> (n, features)`.
      num_ways: classes of a training episode; those of a test episode may be fewer or more.
      distance: see `prototypical_logits`.

    Returns:
      A `LossFn` over `Episode((inputs, labels), (inputs, labels))` with the metric `accuracy`.
      It raises a UserError for embeddings that are not vectors, or not one integer label each.
    """
    return _query_loss(prototypical_predict(embed, num_ways=num_ways, distance=distance))


def prototypical_predict(
    embed: Embed,
    *,
    num_ways: int,
    distance: Distance = "squared_euclidean",
    inductive: bool = False,
) -> PredictFn:
    """Classifies queries by their distances from the prototypes of the support set.

    Args:
      embed: `(params, inputs) -> (n, features)`, with `inductive` also `num_reference=m`.
      num_ways: classes of an episode; may differ from training.
      distance: see `prototypical_logits`.
      inductive: take batch norm's statistics from the support set alone, so that each query is
        answered by itself; otherwise queries and support are one batch, as in training.

    Returns:
      `predict(params, (inputs, labels), inputs, key) -> logits (queries, num_ways)`.
    """

    def predict(params: Params, support: Batch, inputs: PyTree, key: PRNGKey) -> Array:
        del key
        examples, labels, queries = embed_episode(
            embed, params, support, inputs, inductive=inductive
        )
        return prototypical_logits(examples, labels, queries, num_ways=num_ways, distance=distance)

    return predict


def matching_loss(
    embed: Embed,
    *,
    num_ways: int,
    distance: Distance = "cosine",
    contextualise: Contextualise | None = None,
) -> LossFn:
    """The negative log-probability of the queries' classes, over one `Episode`.

    `-mean_q log p(label_q | q)` by `matching_log_probs`: equation 2 of Vinyals et al. 2016. Support
    and queries are embedded as one batch, and so is what batch norm sees.

    Args:
      embed: `(params, inputs) -> (n, features)`.
      num_ways: classes of a training episode; those of a test episode may be fewer or more.
      distance: see `matching_log_probs`.
      contextualise: full context embeddings, `(params, support, queries) -> (support, queries)`,
        such as `metagen_jax.nets.context_embedding.FullContextEmbedding` gives; None attends to the
        embeddings as they are. Its params are those of `embed`: `{"embed": ..., "context": ...}`,
        of which each takes its own, will do.

    Returns:
      A `LossFn` over `Episode((inputs, labels), (inputs, labels))` with the metric `accuracy`.
      It raises a UserError for embeddings that are not vectors, or not one integer label each.
    """
    return _query_loss(
        matching_predict(embed, num_ways=num_ways, distance=distance, contextualise=contextualise)
    )


def matching_predict(
    embed: Embed,
    *,
    num_ways: int,
    distance: Distance = "cosine",
    contextualise: Contextualise | None = None,
    inductive: bool = False,
) -> PredictFn:
    """Classifies queries by their attention to the examples of the support set.

    Args:
      embed: `(params, inputs) -> (n, features)`, with `inductive` also `num_reference=m`.
      num_ways: classes of an episode; may differ from training.
      distance: see `matching_log_probs`.
      contextualise: as in `matching_loss`.
      inductive: take batch norm's statistics from the support set alone, so that each query is
        answered by itself; otherwise queries and support are one batch, as in training.

    Returns:
      `predict(params, (inputs, labels), inputs, key) -> log-probabilities (queries, num_ways)`.
    """

    def predict(params: Params, support: Batch, inputs: PyTree, key: PRNGKey) -> Array:
        del key
        examples, labels, queries = embed_episode(
            embed, params, support, inputs, inductive=inductive
        )
        if contextualise is not None:
            examples, queries = contextualise(params, examples, queries)
        return matching_log_probs(examples, labels, queries, num_ways=num_ways, distance=distance)

    return predict


def embed_episode(
    embed: Embed, params: Params, support: Batch, inputs: PyTree, *, inductive: bool
) -> tuple[Array, Array, Array]:
    """Embeds a support set and queries as one batch.

    Args:
      embed: `(params, inputs) -> (n, features)`.
      params: of `embed`.
      support: `(inputs, labels (support,))`.
      inputs: of the queries.
      inductive: pass `embed` the size of the support set as `num_reference`.

    Returns:
      The support's embeddings `(support, features)` and labels, the queries' embeddings.

    Raises:
      UserError: for embeddings that are not vectors, or not one integer label each.
    """
    examples, labels = support
    num_support = len(jax.tree.leaves(examples)[0])
    options = {"num_reference": num_support} if inductive else {}
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), examples, inputs)
    embeddings = embed(params, both, **options)
    check_labelled(embeddings[:num_support], labels)
    return embeddings[:num_support], jnp.asarray(labels), embeddings[num_support:]


def check_labelled(embeddings: Array, labels: ArrayLike) -> None:
    """Raises a UserError for embeddings that are not vectors, or not one integer label each."""
    if embeddings.ndim != 2:
        raise UserError(
            f"the embeddings have shape {embeddings.shape}; give one vector for each input, "
            "(n, features)"
        )
    kind, shape = jnp.result_type(labels), jnp.shape(labels)
    if shape != embeddings.shape[:1] or not jnp.issubdtype(kind, jnp.integer):
        raise UserError(
            f"the support set has {kind} labels of shape {shape} for embeddings of shape "
            f"{embeddings.shape}; give one integer for each, shape {embeddings.shape[:1]}"
        )


def _query_loss(predict: PredictFn) -> LossFn:
    """The cross-entropy of the queries under what `predict` makes of the support set."""

    def episode_loss(params: Params, episode: Episode, key: PRNGKey) -> tuple[Array, Metrics]:
        predict_key, loss_key = jax.random.split(key)

        def apply(params: Params, inputs: PyTree) -> Array:
            return predict(params, episode.support, inputs, predict_key)

        return cross_entropy_loss(apply)(params, episode.query, loss_key)

    return episode_loss


def _similarities(
    a: Float[Array, "n features"], b: Float[Array, "m features"], distance: Distance
) -> Float[Array, "n m"]:
    """Cosines, or negative squared distances, of all pairs."""
    if distance == "squared_euclidean":
        # Expanded to |a|^2 - 2 a . b + |b|^2 it would cancel far from the origin.
        return -jnp.square(a[:, None] - b).sum(-1)
    if distance == "cosine":
        return jnp.matmul(unit_rows(a), unit_rows(b).T, precision="highest")
    raise UserError(f'distance is {distance!r}; give "squared_euclidean" or "cosine"')
