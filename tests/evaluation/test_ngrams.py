"""N-grams against their definition in dictionaries; probabilities sum to 1; by hand."""

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest

from metagen_jax.errors import UserError
from metagen_jax.evaluation.ngrams import fit_ngrams, ngram_log_prob

BEGIN = "begin"


def some_sequences(num_tokens, *, seed=0, count=12):
    """A chain in which the next token is often the last one or the next number."""
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(count):
        tokens = [int(rng.integers(num_tokens))]
        for _ in range(rng.integers(0, 9)):
            near = [tokens[-1], (tokens[-1] + 1) % num_tokens, rng.integers(num_tokens)]
            tokens.append(int(rng.choice(near)))
        sequences.append(np.array(tokens))
    return sequences


def by_definition(sequences, order, num_tokens, continuation):
    """`probability(token, context)`, from sets and counters of tuples."""
    raw, before = [Counter() for _ in range(order + 1)], [defaultdict(set) for _ in range(order)]
    for tokens in sequences:
        padded = [BEGIN] * (order - 1) + tokens.tolist()
        for end in range(order, len(padded) + 1):
            for k in range(1, order + 1):
                raw[k][tuple(padded[end - k : end])] += 1
            for k in range(1, order):
                before[k][tuple(padded[end - k : end])].add(padded[end - k - 1])

    def count(ngram):
        k = len(ngram)
        if k == order or not continuation or ngram[0] == BEGIN:
            return raw[k][ngram]
        return len(before[k][ngram])

    def probability(token, context):
        k = len(context) + 1
        lower = 1 / num_tokens if k == 1 else probability(token, context[1:])
        ones, twos = (sum(count(x) == n for x in raw[k]) for n in (1, 2))
        discount = ones / (ones + 2 * twos) if ones else 0.5
        follow = {x[-1]: count(x) for x in raw[k] if x[:-1] == context}
        total = sum(follow.values())
        if not total:
            return lower
        own = max(follow.get(token, 0) - discount, 0)
        return (own + discount * len(follow) * lower) / total

    return probability


@pytest.mark.parametrize("continuation", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_are_those_of_the_definition(order, continuation):
    sequences = some_sequences(4)
    model = fit_ngrams(sequences, order=order, num_tokens=4, continuation=continuation)
    probability = by_definition(sequences, order, 4, continuation)
    for tokens in some_sequences(4, seed=1, count=6):
        padded = [BEGIN] * (order - 1) + tokens.tolist()
        expected = [
            probability(token, tuple(padded[i : i + order - 1])) for i, token in enumerate(tokens)
        ]
        np.testing.assert_allclose(np.exp(ngram_log_prob(model, tokens)), expected, rtol=1e-12)


@pytest.mark.parametrize("continuation", [True, False])
def test_probabilities_of_all_sequences_of_a_length_sum_to_one(continuation):
    """With one token, 4, that was never seen, and contexts that never were."""
    sequences = some_sequences(4)
    model = fit_ngrams(sequences, order=3, num_tokens=5, continuation=continuation)
    every = np.array(list(itertools.product(range(5), repeat=4)))
    log_probs = [ngram_log_prob(model, tokens).sum() for tokens in every]
    assert np.exp(log_probs).sum() == pytest.approx(1, rel=1e-12)
    assert np.isfinite(log_probs).all()


def test_by_hand():
    """Of "0 1, 0 1, 1": 2-grams (^ 0) twice, (0 1) twice, (^ 1) once, so D = 1 / (1 + 2 2) = 1/5.
    1-grams by what stands before them: 0 one, 1 two; D = 1 / (1 + 2) = 1/3, and P(1) = (2 - 1/3 +
    2/3 / 3) / 3 = 17/27 with 3 tokens. P(1 | 0) = (2 - 1/5 + 1/5 17/27) / 2."""
    sequences = [np.array(x) for x in ([0, 1], [0, 1], [1])]
    model = fit_ngrams(sequences, order=2, num_tokens=3)
    second = np.exp(ngram_log_prob(model, np.array([0, 1])))[1]
    assert second == pytest.approx((2 - 1 / 5 + 17 / 27 / 5) / 2, rel=1e-12)
    # Never seen, after a context that never was: (2/3 / 3) / 3 of the lower order.
    last = np.exp(ngram_log_prob(model, np.array([1, 2])))[1]
    assert last == pytest.approx(2 / 27, rel=1e-12)


def test_kneser_and_ney_count_kinds_of_contexts_and_not_occurrences():
    """A token that is frequent after one other only is improbable after a third."""
    often = [np.array([0, 1])] * 20 + [np.array(x) for x in ([2, 3], [4, 3], [0, 3], [2, 4])]
    tokens = np.array([3, 1])
    kneser_ney, plain = (
        ngram_log_prob(fit_ngrams(often, order=2, num_tokens=5, continuation=c), tokens)[1]
        for c in (True, False)
    )
    assert kneser_ney < plain - 0.5


def test_a_chain_is_learned_to_its_entropy():
    rng = np.random.default_rng(0)
    steps = rng.choice([0, 1], p=[0.9, 0.1], size=(40, 500))
    train, test = np.split(np.cumsum(steps, axis=1) % 6, [30])
    model = fit_ngrams(list(train), order=3, num_tokens=6)
    nats = -np.mean([ngram_log_prob(model, tokens)[2:].mean() for tokens in test])
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    assert nats == pytest.approx(entropy, abs=0.02)


def test_says_what_is_needed():
    sequences = some_sequences(4)
    with pytest.raises(UserError, match="order is 0 for 4 tokens; give 1 or more"):
        fit_ngrams(sequences, order=0, num_tokens=4)
    with pytest.raises(UserError, match=r"order is 5 for 30000 tokens; .* less than 2"):
        fit_ngrams(sequences, order=5, num_tokens=30_000)
    with pytest.raises(UserError, match="tokens are from 0 to 3; give 0 to 2"):
        fit_ngrams([np.array([0, 3])], order=2, num_tokens=3)
    with pytest.raises(UserError, match="the sequences have no tokens"):
        fit_ngrams([], order=2, num_tokens=3)
    with pytest.raises(UserError, match="tokens are from -1 to 0"):
        ngram_log_prob(fit_ngrams(sequences, order=2, num_tokens=4), np.array([0, -1]))
