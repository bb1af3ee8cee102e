"""Counts of neighbours against dictionaries in a loop, and by hand."""

from collections import Counter

import numpy as np
import pytest

from metagen_jax.errors import UserError
from metagen_jax.evaluation.neighbour_counts import (
    fit_neighbour_counts,
    neighbour_log_prob,
    neighbours,
)

NUM_TOKENS = 5


def by_loop(tokens, before, after, left, right):
    """The probabilities of all tokens between two others, from counts in dictionaries."""

    def conditional(contexts, context, lower):
        pairs = Counter(zip(contexts, tokens, strict=True))
        once, twice = (sum(n == k for n in pairs.values()) for k in (1, 2))
        discount = once / (once + 2 * twice) if once else 0.5
        here = {w: n for (c, w), n in pairs.items() if c == context}
        if not here:
            return lower
        total = sum(here.values())
        return [
            max(here.get(w, 0) - discount, 0) / total + discount * len(here) / total * lower[w]
            for w in range(NUM_TOKENS)
        ]

    counts = [1 + sum(t == w for t in tokens) for w in range(NUM_TOKENS)]
    frequencies = [n / sum(counts) for n in counts]
    a, b = conditional(before, left, frequencies), conditional(after, right, frequencies)
    product = [x * y / p for x, y, p in zip(a, b, frequencies, strict=True)]
    product = [x / sum(product) for x in product]
    return conditional(list(zip(before, after, strict=True)), (left, right), product)


def test_probabilities_are_those_of_a_loop_and_sum_to_one():
    rng = np.random.default_rng(0)
    # Few tokens, so that pairs are seen once, twice, often, and some never.
    tokens, before, after = rng.integers(0, 4, (3, 30)) * rng.integers(0, 2, (3, 30))
    model = fit_neighbour_counts(tokens, before, after, num_tokens=NUM_TOKENS)
    left, right = (x.ravel() for x in np.meshgrid(np.arange(5), np.arange(5)))
    log_prob = neighbour_log_prob(model, left, right)
    for i in range(25):
        expected = by_loop(tokens.tolist(), before.tolist(), after.tolist(), left[i], right[i])
        np.testing.assert_allclose(np.exp(log_prob[i]), expected, rtol=1e-12)
    np.testing.assert_allclose(np.exp(log_prob).sum(1), 1, rtol=1e-12)
    # The token 4 was never anywhere: neighbours that tell nothing.
    np.testing.assert_allclose(np.exp(log_prob[-1]), model.frequencies, rtol=1e-12)


def test_what_both_neighbours_say_is_found_where_neither_says_it_alone():
    """The token is 1 where the neighbours are alike, and otherwise 0."""
    rng = np.random.default_rng(1)
    before, after = rng.integers(2, 4, (2, 4000))
    tokens = (before == after).astype(int)
    model = fit_neighbour_counts(tokens, before, after, num_tokens=4)
    log_prob = neighbour_log_prob(model, np.array([2, 2]), np.array([2, 3]))
    assert np.exp(log_prob[0, 1]) > 0.99
    assert np.exp(log_prob[1, 0]) > 0.99


def test_neighbours_are_of_the_same_document():
    tokens = np.array([[5, 6, 7, 8, 9, 0]])
    documents = np.array([[1, 1, 2, 2, 2, 0]])
    before, after = neighbours(tokens, documents, 3)
    np.testing.assert_array_equal(before, [[3, 5, 3, 7, 8, 3]])
    np.testing.assert_array_equal(after, [[6, 3, 8, 9, 3, 3]])


def test_says_what_is_needed():
    ones = np.ones(3, int)
    with pytest.raises(UserError, match="tokens are 1 to 7; give at least one, all from 0 to 4"):
        fit_neighbour_counts(ones, ones, 7 * ones, num_tokens=5)
    with pytest.raises(UserError, match="tokens are none"):
        fit_neighbour_counts(ones[:0], ones[:0], ones[:0], num_tokens=5)
