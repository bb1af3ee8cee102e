"""What frozen features are worth: linear and nearest-neighbour probes, few shots, collapse.

    features = extract_features(embed, params, images)
    probe = linear_probe(train, val, test, num_classes=10)

Features are arrays by then, so that no probe can change the net; `fingerprint` of its parameters
before and after shows it.

Roy, Vetterli: The effective rank: a measure of effective dimensionality, 2007.
Wang, Isola: Understanding Contrastive Representation Learning through Alignment and Uniformity on
the Hypersphere, 2020.
Wu, Xiong, Yu, Lin: Unsupervised Feature Learning via Non-Parametric Instance Discrimination, 2018.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Integer, PyTree

from metagen_jax.errors import UserError
from metagen_jax.meta.metric import Embed, embed_episode
from metagen_jax.similarity import unit_rows
from metagen_jax.types import AnyArray, Batch, Params, PredictFn, PRNGKey

# Of the features' norm, and of a unit length, below which nothing is left but rounding.
_ROUNDING, _ALIKE = 1e-5, 0.02

Labelled = tuple[Float[AnyArray, "_n features"], Integer[AnyArray, " _n"]]
"""Features `(n, features)` and their classes `(n,)`."""


class LinearClassifier(NamedTuple):
    """`logits = x weights + bias`."""

    weights: Float[Array, "features classes"]
    bias: Float[Array, " classes"]

    def __call__(self, x: Float[AnyArray, "n features"]) -> Float[Array, "n classes"]:
        return jnp.matmul(x, self.weights, precision="highest") + self.bias


class Probe(NamedTuple):
    """A linear probe's test accuracy, a fraction, and how it was chosen."""

    accuracy: float
    validation_accuracy: float
    penalty: float
    classifier: LinearClassifier


def extract_features(
    embed: Callable[[Params, Array], Any],
    params: Params,
    images: AnyArray,
    *,
    block_size: int = 256,
) -> Float[np.ndarray, "n features"]:
    """Features of images, in blocks of one size, of which the last is filled up.

    Args:
      embed: `(params, images) -> (n, features)`, each image by itself: with a norm over the batch
        features would depend on the block.
      params: of the net.
      images: `(n, ...)`.
      block_size: images at once.
    """
    apply = jax.jit(embed)
    blocks = []
    for start in range(0, len(images), block_size):
        block = jnp.asarray(images[start : start + block_size])
        missing = min(block_size, len(images)) - len(block)
        filled = jnp.concatenate([block, jnp.repeat(block[:1], missing, axis=0)])
        blocks.append(np.asarray(apply(params, filled))[: len(block)])
    return np.concatenate(blocks)


def fingerprint(params: PyTree) -> str:
    """A hash of all numbers and of what they are called: equal for equal parameters alone."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def fit_logistic(
    features: Float[AnyArray, "n features"],
    labels: Integer[AnyArray, " n"],
    *,
    num_classes: int,
    penalty: float | Float[Array, ""],
    num_steps: int = 200,
    tolerance: float = 1e-5,
) -> LinearClassifier:
    """Multinomial logistic regression by L-BFGS, from zero.

    Minimises `-1/n sum_i log softmax(x_i W + b)[y_i] + penalty/2 |W|^2`, which is convex: the
    result depends on nothing else.

    Args:
      features: `(n, features)`; of like scale, or the penalty means another thing to each.
      labels: `(n,)`, classes 0..num_classes-1.
      num_classes: how many.
      penalty: at least 0; 0 has no minimum where classes can be separated.
      num_steps: at most.
      tolerance: norm of the gradient at which to stop.
    """
    features, labels = jnp.asarray(features), jnp.asarray(labels)

    def objective(classifier: LinearClassifier) -> Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(classifier(features), labels)
        return losses.mean() + penalty / 2 * jnp.square(classifier.weights).sum()

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def goes_on(carry):
        step, _, _, norm = carry
        return (step < num_steps) & (norm > tolerance)

    def improve(carry):
        step, classifier, state, _ = carry
        value, gradient = value_and_grad(classifier, state=state)
        updates, state = optimizer.update(
            gradient, state, classifier, value=value, grad=gradient, value_fn=objective
        )
        classifier: Any = optax.apply_updates(classifier, updates)
        # The norm is that before this step: it never stops too early.
        return step + 1, classifier, state, optax.tree.norm(gradient)

    zeros = LinearClassifier(
        jnp.zeros((features.shape[1], num_classes), features.dtype),
        jnp.zeros(num_classes, features.dtype),
    )
    start = (0, zeros, optimizer.init(zeros), jnp.asarray(jnp.inf, features.dtype))
    return jax.lax.while_loop(goes_on, improve, start)[1]


def linear_probe(
    train: Labelled,
    val: Labelled,
    test: Labelled,
    *,
    num_classes: int,
    penalties: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1),
    num_steps: int = 200,
) -> Probe:
    """The accuracy of a linear classifier of frozen features, its penalty chosen by validation.

    Features are standardised by the training set's means and deviations.

    Args:
      train: features and labels to fit.
      val: to choose by.
      test: to report.
      num_classes: how many.
      penalties: to try; among equals the first is taken.
      num_steps: of L-BFGS, at most.

    Raises:
      UserError: there are no penalties, or a set has not one label for each row of features.
    """
    if not penalties:
        raise UserError("penalties is empty; give those to try")
    for features, labels in (train, val, test):
        if len(features) != len(labels) or not len(labels):
            raise UserError(
                f"there are {len(features)} rows of features and {len(labels)} labels; give one "
                "label for each row"
            )
    mean, deviation = np.mean(train[0], axis=0), np.std(train[0], axis=0)
    scale = 1 / np.where(deviation > 0, deviation, 1)
    standard = (jnp.asarray(train[0]) - mean) * scale
    fit = jax.jit(
        lambda x, y, penalty: fit_logistic(
            x, y, num_classes=num_classes, penalty=penalty, num_steps=num_steps
        )
    )
    probes = []
    for penalty in penalties:
        weights, bias = fit(standard, jnp.asarray(train[1]), penalty)
        weights = weights * scale[:, None]
        classifier = LinearClassifier(weights, bias - mean @ weights)
        accuracy, of_val = (float((classifier(x).argmax(1) == y).mean()) for x, y in (test, val))
        probes.append(Probe(accuracy, of_val, penalty, classifier))
    return max(probes, key=lambda probe: probe.validation_accuracy)


def nearest_neighbour_accuracy(
    train: Labelled,
    test: Labelled,
    *,
    num_classes: int,
    num_neighbours: int = 20,
    temperature: float = 0.07,
    block_size: int = 256,
) -> float:
    """The accuracy of a weighted vote of the nearest training features, by cosines.

    Neighbour `i` votes for its class with the weight `exp(cos_i / T)`: section 3.4 of Wu et al.
    2018.

    Args:
      train: features and labels that vote.
      test: those that are asked about.
      num_classes: how many.
      num_neighbours: how many vote; published: 200 of a million.
      temperature: T.
      block_size: test features at once.

    Raises:
      UserError: there are fewer training features than neighbours.
    """
    if not 1 <= num_neighbours <= len(train[0]):
        raise UserError(
            f"num_neighbours is {num_neighbours} of {len(train[0])} training features; give 1 to "
            f"{len(train[0])}"
        )

    # An argument: closed over, the training features would be a constant of the program.
    @jax.jit
    def predict(known: Array, of_known: Array, queries: Array) -> Array:
        def of_one(query: Array) -> Array:
            cosines = jnp.matmul(query, known.T, precision="highest")
            nearest, indices = jax.lax.top_k(cosines, num_neighbours)
            # The largest weight is 1.
            weights = jnp.exp((nearest - nearest[0]) / temperature)
            return jax.ops.segment_sum(weights, of_known[indices], num_classes).argmax()

        return jax.lax.map(of_one, queries, batch_size=block_size)

    known, queries = (unit_rows(jnp.asarray(features)) for features, _ in (train, test))
    predictions = predict(known, jnp.asarray(train[1]), queries)
    return float((predictions == jnp.asarray(test[1])).mean())


def logistic_predict(
    embed: Embed, *, num_ways: int, penalty: float = 0.1, num_steps: int = 50
) -> PredictFn:
    """Few-shot classification by logistic regression on the support set's frozen features.

    Features have length 1. The nearest class mean, the other usual way, is
    `metagen_jax.meta.metric.prototypical_predict`.

    Args:
      embed: `(params, inputs) -> (n, features)`, each input by itself.
      num_ways: classes of an episode.
      penalty: see `fit_logistic`.
      num_steps: of L-BFGS, at most.

    Returns:
      `predict(params, (inputs, labels), inputs, key) -> logits (queries, num_ways)`.
    """

    def predict(params: Params, support: Batch, inputs: PyTree, key: PRNGKey) -> Array:
        del key
        examples, labels, queries = embed_episode(embed, params, support, inputs, inductive=False)
        classifier = fit_logistic(
            unit_rows(examples), labels, num_classes=num_ways, penalty=penalty, num_steps=num_steps
        )
        return classifier(unit_rows(queries))

    return predict


def alignment(
    z_a: Float[AnyArray, "n features"], z_b: Float[AnyArray, "n features"]
) -> Float[Array, ""]:
    """`mean |z_a - z_b|^2` of two views at length 1, 0 to 4: equation 1 of Wang and Isola 2020."""
    difference = unit_rows(jnp.asarray(z_a)) - unit_rows(jnp.asarray(z_b))
    return jnp.square(difference).sum(1).mean()


def uniformity(z: Float[AnyArray, "n features"]) -> Float[Array, ""]:
    """`log mean_{i != j} exp(-2 |z_i - z_j|^2)` at length 1: equation 2 of Wang and Isola 2020.

    From about -4, evenly spread, to 0, all alike.
    """
    z = unit_rows(jnp.asarray(z))
    exponents = 4 * jnp.matmul(z, z.T, precision="highest") - 4
    others = jnp.where(jnp.eye(len(z), dtype=bool), -jnp.inf, exponents)
    return jax.nn.logsumexp(others) - np.log(len(z) * (len(z) - 1))


def effective_rank(z: Float[AnyArray, "n features"]) -> Float[Array, ""]:
    """`exp(-sum_k p_k log p_k)`, `p` the shares of the singular values of the centred features.

    From 1, all on a line, to the number of features, equally large in all directions; 0 where all
    are alike. Definition 1 of Roy and Vetterli 2007, who do not centre.
    """
    z = jnp.asarray(z)
    values = jnp.linalg.svd(z - z.mean(0), compute_uv=False)
    floor = _ROUNDING * jnp.linalg.norm(z)
    values = jnp.where(values > floor, values, 0)
    total = values.sum()
    shares = values / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, jnp.exp(jax.scipy.special.entr(shares).sum()), 0)


def describe_collapse(z: Float[AnyArray, "n features"]) -> str | None:
    """What is wrong with collapsed features, in words; None for others.

    Complete collapse: their directions differ by less than 2 %. Dimensional collapse: an effective
    rank below a tenth of the features, or of the examples where these are fewer.
    """
    z = jnp.asarray(z)
    deviation = float(jnp.sqrt(unit_rows(z).var(0).sum()))
    if deviation < _ALIKE:
        return f"complete collapse: all features have one direction, to {100 * deviation:.1g} %"
    rank, most = float(effective_rank(z)), min(z.shape)
    if rank < most / 10:
        return f"dimensional collapse: an effective rank of {rank:.1f} of {most}"
    return None
