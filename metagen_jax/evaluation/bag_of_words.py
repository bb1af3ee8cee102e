"""Classifiers of how often each token stands in a text: what a net that reads it must beat.

    bags = count_tokens(tokens, num_tokens=2000, ignore=SPECIAL)
    classifier = fit_bags(train, labels, val, val_labels, num_classes=10)

On the host, in SciPy's sparse matrices.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.special
from jaxtyping import Float, Int

from metagen_jax.errors import UserError

Bags = Any
"""A sparse array of SciPy's, `(n, tokens)`; its own types don't say that it has a shape."""

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)


class BagClassifier(NamedTuple):
    """`logits = bags weights + bias`, and the penalty with which they were fitted."""

    weights: Float[np.ndarray, "tokens classes"]
    bias: Float[np.ndarray, " classes"]
    penalty: float

    def __call__(self, bags: Bags) -> Float[np.ndarray, "n classes"]:
        return bags @ self.weights + self.bias


def count_tokens(
    tokens: Int[np.ndarray, "n t"], *, num_tokens: int, ignore: Sequence[int] = ()
) -> Bags:
    """`log(1 + how often)` each token stands in each row, at length 1: `(n, num_tokens)`.

    Args:
      tokens: 0..num_tokens-1.
      num_tokens: how many different ones there are.
      ignore: tokens that are not counted, such as padding.
    """
    row, column = np.nonzero(~np.isin(tokens, ignore))
    shape = len(tokens), num_tokens
    counts = scipy.sparse.csr_array((np.ones(len(row)), (row, tokens[row, column])), shape=shape)
    counts.sum_duplicates()
    counts.data = np.log1p(counts.data)
    rows = np.repeat(np.arange(len(tokens)), np.diff(counts.indptr))
    squares = np.bincount(rows, counts.data**2, minlength=len(tokens))
    counts.data /= np.sqrt(squares)[rows]
    return counts


def fit_bags(
    train: Bags,
    labels: Int[np.ndarray, " n"],
    val: Bags,
    val_labels: Int[np.ndarray, " m"],
    *,
    num_classes: int,
    penalties: Sequence[float] = PENALTIES,
) -> BagClassifier:
    """Multinomial logistic regression by L-BFGS, its penalty chosen by validation.

    Minimises `-1/n sum_i log softmax(x_i W + b)[y_i] + penalty/2 |W|^2`.

    Args:
      train: `(n, tokens)`, from `count_tokens`, or differences of such.
      labels: 0..num_classes-1.
      val, val_labels: to choose by; among equal accuracies the first penalty is taken.
      num_classes: how many.
      penalties: to try.

    Raises:
      UserError: there are no penalties, or not one label for each row.
    """
    if not penalties or train.shape[0] != len(labels) or val.shape[0] != len(val_labels):
        raise UserError(
            f"there are {len(penalties)} penalties, {train.shape[0]} and {val.shape[0]} rows and "
            f"{len(labels)} and {len(val_labels)} labels; give a penalty or more and a label for "
            "each row"
        )
    fits = [_fit(train, labels, num_classes, penalty) for penalty in penalties]
    return max(fits, key=lambda fit: (fit(val).argmax(1) == val_labels).mean())


def _fit(bags: Bags, labels: np.ndarray, num_classes: int, penalty: float) -> BagClassifier:
    num, num_tokens = len(labels), bags.shape[1]
    targets = np.eye(num_classes)[labels]

    def unpack(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights = flat[:-num_classes].reshape(num_tokens, num_classes)
        return weights, flat[-num_classes:]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = unpack(flat)
        log_probs = scipy.special.log_softmax(bags @ weights + bias, axis=1)
        value = -(targets * log_probs).sum() / num + penalty / 2 * np.square(weights).sum()
        error = (np.exp(log_probs) - targets) / num
        slope = bags.T @ error + penalty * weights
        return value, np.concatenate([slope.ravel(), error.sum(0)])

    start = np.zeros((num_tokens + 1) * num_classes)
    options = {"maxiter": 200}
    best = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return BagClassifier(*unpack(best.x), penalty)
