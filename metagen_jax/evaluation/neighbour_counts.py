"""A token from the one before it and the one after it, by counts: what a masked model must beat.

On the host, in NumPy and SciPy's sparse matrices.

Ney, Essen, Kneser: On structuring probabilistic dependences in stochastic language modelling, 1994.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

from metagen_jax.errors import UserError


class _Conditional(NamedTuple):
    """Counts of tokens in contexts, which are sorted numbers, after discounting.

    Attributes:
      contexts: those that were seen.
      own: of each context and token `max(n - D, 0) / n(context)`.
      left_over: of each context `D m / n(context)`, the share of the lower order.
    """

    contexts: np.ndarray
    own: scipy.sparse.csr_array
    left_over: np.ndarray


class NeighbourCounts(NamedTuple):
    """Counts of tokens and of their neighbours, from `fit_neighbour_counts`.

    Attributes:
      frequencies: `(n(w) + 1) / sum_w (n(w) + 1)`, the unigram model.
      before, after, both: by the token before, the one after, and these two together.
    """

    frequencies: Float[np.ndarray, " vocab"]
    before: _Conditional
    after: _Conditional
    both: _Conditional


def neighbours(
    tokens: Int[np.ndarray, "n t"], documents: Int[np.ndarray, "n t"], nothing: int
) -> tuple[Int[np.ndarray, "n t"], Int[np.ndarray, "n t"]]:
    """The tokens before and after each one in its document, `nothing` where there is none."""
    same = documents[:, 1:] == documents[:, :-1]
    edge = np.full((len(tokens), 1), nothing, tokens.dtype)
    before = np.where(same, tokens[:, :-1], nothing)
    after = np.where(same, tokens[:, 1:], nothing)
    return np.concatenate([edge, before], 1), np.concatenate([after, edge], 1)


def fit_neighbour_counts(
    tokens: Int[np.ndarray, " n"],
    before: Int[np.ndarray, " n"],
    after: Int[np.ndarray, " n"],
    *,
    num_tokens: int,
) -> NeighbourCounts:
    """Counts tokens 0..num_tokens-1 and the neighbours of each, from `neighbours`.

    Raises:
      UserError: there are no tokens, or some are out of range.
    """
    everything = np.concatenate([tokens, before, after])
    if not len(tokens) or everything.min() < 0 or everything.max() >= num_tokens:
        found = f"{everything.min()} to {everything.max()}" if len(tokens) else "none"
        raise UserError(f"tokens are {found}; give at least one, all from 0 to {num_tokens - 1}")
    counts = np.bincount(tokens, minlength=num_tokens) + 1
    pairs = before.astype(np.int64) * num_tokens + after
    return NeighbourCounts(
        counts / counts.sum(),
        *(_condition(tokens, context, num_tokens) for context in (before, after, pairs)),
    )


def neighbour_log_prob(
    model: NeighbourCounts, before: Int[np.ndarray, " n"], after: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n vocab"]:
    """The log-probabilities of all tokens between two others.

    With `P(w)` the frequencies, and `n`, `m`, `D` as in `metagen_jax.evaluation.ngrams`,

        P(w | l) = max(n(l w) - D, 0) / n(l) + D m(l) / n(l) P(w), and so P(w | r),
        Q(w | l, r) = P(w | l) P(w | r) / P(w), divided by its sum over w,
        P(w | l, r) = max(n(l w r) - D, 0) / n(l r) + D m(l r) / n(l r) Q(w | l, r).

    Q is what follows from both neighbours where they are independent given the token. A neighbour
    that was never seen, such as a mask, tells nothing.

    Args:
      model: the counts.
      before: the tokens before.
      after: those after.

    Returns:
      In nats.
    """
    num_tokens = len(model.frequencies)
    left = _conditioned(model.before, before, model.frequencies)
    right = _conditioned(model.after, after, model.frequencies)
    product = left * right / model.frequencies
    product /= product.sum(1, keepdims=True)
    pairs = before.astype(np.int64) * num_tokens + after
    return np.log(_conditioned(model.both, pairs, product))


def _condition(tokens: np.ndarray, context: np.ndarray, num_tokens: int) -> _Conditional:
    contexts, row = np.unique(context, return_inverse=True)
    shape = len(contexts), num_tokens
    counts = scipy.sparse.csr_array((np.ones(len(tokens)), (row, tokens)), shape=shape)
    counts.sum_duplicates()
    once, twice = (counts.data == 1).sum(), (counts.data == 2).sum()
    discount = once / (once + 2 * twice) if once else 0.5
    totals, kinds = np.bincount(row), np.diff(counts.indptr)
    counts.data = np.maximum(counts.data - discount, 0) / np.repeat(totals, kinds)
    return _Conditional(contexts, counts, discount * kinds / totals)


def _conditioned(of: _Conditional, context: np.ndarray, lower: np.ndarray) -> np.ndarray:
    row = np.minimum(np.searchsorted(of.contexts, context), len(of.contexts) - 1)
    seen = of.contexts[row] == context
    own = of.own[row].toarray() * seen[:, None]
    return own + np.where(seen, of.left_over[row], 1)[:, None] * lower
