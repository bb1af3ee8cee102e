"""Interpolated n-grams of tokens or codes, with Kneser and Ney's counts or plain ones.

What a model of sequences has to be better than. On the host, in NumPy: counts are sorted arrays of
whole numbers, each the tokens of an n-gram as digits.

Kneser, Ney: Improved backing-off for m-gram language modeling, 1995. Ney, Essen, Kneser: On
structuring probabilistic dependences in stochastic language modelling, 1994. Chen, Goodman: An
empirical study of smoothing techniques for language modeling, 1999.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from metagen_jax.errors import UserError

_BEGIN = 0  # The digit of what stands before a sequence; token `v` is the digit `v + 1`.


class _Counts(NamedTuple):
    """The n-grams of one order and their contexts, each sorted, and what is counted of them."""

    ngrams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray
    discount: float


class NGrams(NamedTuple):
    """Counts of sequences, from `fit_ngrams`.

    Attributes:
      num_tokens: tokens are 0..num_tokens-1.
      orders: of the 1-grams, the 2-grams, and so on.
    """

    num_tokens: int
    orders: list[_Counts]


def fit_ngrams(
    sequences: Iterable[Integer[np.ndarray, "_"]],
    *,
    order: int,
    num_tokens: int,
    continuation: bool = True,
) -> NGrams:
    """Counts n-grams of all orders up to the highest, each within its sequence.

    Args:
      sequences: of tokens 0..num_tokens-1. If a model is to say when one ends, give each a token
        for that.
      order: of the highest n-grams, 1 or more.
      num_tokens: how many different tokens there are.
      continuation: lower orders count after how many different tokens an n-gram stands, as Kneser
        and Ney do (but at the beginning of sequences, where there is nothing before); otherwise
        how often it does, which is Ney's absolute discounting.

    Returns:
      The counts, for `ngram_log_prob`.

    Raises:
      UserError: for no tokens, some out of range, or more than 2^63 different n-grams.
    """
    if order < 1 or (num_tokens + 1) ** order >= 2**63:
        raise UserError(
            f"order is {order} for {num_tokens} tokens; give 1 or more, and as low that there are "
            "less than 2^63 different n-grams"
        )
    numbers = [_numbers(x, order, num_tokens) for x in sequences]
    if not sum(map(len, numbers)):
        raise UserError("the sequences have no tokens; give at least one")
    base = num_tokens + 1
    longest = np.concatenate(numbers)
    orders, longer = [], None
    for k in range(order, 0, -1):
        ngrams, counts = np.unique(longest % base**k, return_counts=True)
        if longer is not None and continuation:
            different = np.unique(longer % base**k, return_counts=True)[1]
            counts = np.where(ngrams // base ** (k - 1) == _BEGIN, counts, different)
        orders.append(_count_contexts(ngrams, counts, base))
        longer = ngrams
    return NGrams(num_tokens, orders[::-1])


def _numbers(tokens: np.ndarray, order: int, num_tokens: int) -> np.ndarray:
    """At each token the n-gram that ends there, as a number with its tokens for digits."""
    tokens = np.asarray(tokens)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= num_tokens):
        raise UserError(
            f"tokens are from {tokens.min()} to {tokens.max()}; give 0 to {num_tokens - 1}"
        )
    digits = np.concatenate([np.full(order - 1, _BEGIN), tokens.astype(np.int64) + 1])
    numbers = np.zeros(len(tokens), np.int64)
    for first in range(order):
        numbers = numbers * (num_tokens + 1) + digits[first : first + len(tokens)]
    return numbers


def _count_contexts(ngrams: np.ndarray, counts: np.ndarray, base: int) -> _Counts:
    contexts, first, kinds = np.unique(ngrams // base, return_index=True, return_counts=True)
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice) if once else 0.5
    totals = np.add.reduceat(counts, first)
    return _Counts(ngrams, counts, contexts, totals, kinds, float(discount))


def ngram_log_prob(model: NGrams, tokens: Integer[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    """The log-probability of each token of a sequence given those before it.

    `P_k(w | c) = max(n(cw) - D, 0) / n(c) + D m(c) / n(c) P_{k-1}(w | c')`, where `n(c)` sums
    `n(cw)` over the m(c) different w, c' is c without its first token, `D = n_1 / (n_1 + 2 n_2)`
    of the numbers of n-grams counted once and twice, and `P_0` is uniform; `P_k = P_{k-1}` where c
    was never seen: section 2.7 of Chen and Goodman 1999.

    Args:
      model: the counts.
      tokens: the sequence.

    Returns:
      In nats; the sum is the sequence's.

    Raises:
      UserError: for tokens out of range.
    """
    base, probabilities = model.num_tokens + 1, np.full(len(tokens), 1 / model.num_tokens)
    numbers = _numbers(tokens, len(model.orders), model.num_tokens)
    for k, order in enumerate(model.orders, start=1):
        ngrams = numbers % base**k
        counts = _look_up(order.ngrams, [order.counts], ngrams)[0]
        totals, kinds = _look_up(order.contexts, [order.totals, order.kinds], ngrams // base)
        own = np.maximum(counts - order.discount, 0) + order.discount * kinds * probabilities
        probabilities = np.where(totals > 0, own / np.maximum(totals, 1), probabilities)
    return np.log(probabilities)


def _look_up(
    keys: np.ndarray, values: Sequence[np.ndarray], wanted: np.ndarray
) -> list[np.ndarray]:
    """Of each wanted key its values, 0 if it isn't there."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found = keys[index] == wanted
    return [np.where(found, of[index], 0) for of in values]
