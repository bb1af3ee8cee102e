"""A linear probe where labels are too few to spare any for validation."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from metagen_jax.errors import UserError
from metagen_jax.evaluation.probes import Labelled, LinearClassifier, fit_logistic


class CrossValidatedProbe(NamedTuple):
    """What a linear probe got right, and how its penalty was chosen.

    Attributes:
      correct: of each test example.
      validation_accuracy: over the examples that the fits left out, at the penalty that was chosen.
      penalty: of the fit to all training examples.
    """

    correct: Bool[np.ndarray, " n"]
    validation_accuracy: float
    penalty: float


def folds(labels: Int[np.ndarray, " n"], num_folds: int) -> list[Int[np.ndarray, " _"]]:
    """The examples in so many parts, of each class as evenly as can be.

    Args:
      labels: `(n,)`.
      num_folds: how many parts; sizes differ by one at most.

    Raises:
      UserError: there are fewer than two parts, or fewer examples than parts.
    """
    if not 2 <= num_folds <= len(labels):
        raise UserError(f"num_folds is {num_folds} for {len(labels)} examples; give 2 to as many")
    shuffled = np.random.default_rng(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return [np.sort(by_class[part::num_folds]) for part in range(num_folds)]


def cross_validated_probe(
    train: Labelled,
    test: Labelled,
    *,
    num_classes: int,
    penalties: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    num_folds: int = 5,
    num_steps: int = 100,
) -> CrossValidatedProbe:
    """A linear classifier of frozen features, its penalty chosen by cross-validation.

    Each penalty is judged on every training example by a fit that did not see it; the best, of
    equals the largest, is fitted to all. Features are standardised by the training set's means and
    deviations.

    Args:
      train: features and labels to fit and to choose by.
      test: to report.
      num_classes: how many.
      penalties: to try.
      num_folds: parts of the training set, of which each is left out once.
      num_steps: of L-BFGS, at most.

    Raises:
      UserError: there are no penalties, fewer than two folds, or fewer examples than folds.
    """
    if not penalties:
        raise UserError("penalties is empty; give those to try")
    features, labels = np.asarray(train[0], np.float32), np.asarray(train[1])
    mean, deviation = features.mean(0), features.std(0)
    scale = 1 / np.where(deviation > 0, deviation, 1)
    known, asked = ((jnp.asarray(x) - mean) * scale for x in (features, test[0]))
    parts = folds(labels, num_folds)
    # One size for all, so that they are fitted as one batch: a fold may leave out one more.
    size = len(labels) - max(map(len, parts))
    kept = np.stack([np.setdiff1d(np.arange(len(labels)), part)[-size:] for part in parts])
    order = sorted(penalties, reverse=True)
    of_folds = _fit(
        known,
        jnp.asarray(labels),
        jnp.asarray(kept),
        jnp.asarray(order),
        num_classes=num_classes,
        num_steps=num_steps,
    )
    predicted = jax.vmap(jax.vmap(lambda classifier: classifier(known).argmax(1)))(of_folds)
    right = np.asarray(predicted == jnp.asarray(labels))
    left_out = np.concatenate([right[:, i, part] for i, part in enumerate(parts)], axis=1)
    accuracies = left_out.mean(1)
    best = int(accuracies.argmax())
    of_all = _fit(
        known,
        jnp.asarray(labels),
        jnp.arange(len(labels))[None],
        jnp.asarray(order[best : best + 1]),
        num_classes=num_classes,
        num_steps=num_steps,
    )
    classifier = jax.tree.map(lambda x: x[0, 0], of_all)
    correct = np.asarray(classifier(asked).argmax(1)) == np.asarray(test[1])
    return CrossValidatedProbe(correct, float(accuracies[best]), order[best])


# Compiled once for all features of one shape.
@functools.partial(jax.jit, static_argnames=("num_classes", "num_steps"))
def _fit(features, labels, chosen, penalties, *, num_classes, num_steps) -> LinearClassifier:
    """The classifier of each penalty and each choice of examples `(choices, n)`."""

    def fit(chosen: jax.Array, penalty: jax.Array) -> LinearClassifier:
        return fit_logistic(
            features[chosen],
            labels[chosen],
            num_classes=num_classes,
            penalty=penalty,
            num_steps=num_steps,
        )

    return jax.vmap(jax.vmap(fit, (0, None)), (None, 0))(chosen, penalties)
