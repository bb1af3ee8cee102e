"""Bags by hand; the classifier against that of JAX; what bags can tell and what they can't."""

import jax
import numpy as np
import pytest
import scipy.sparse

from metagen_jax.errors import UserError
from metagen_jax.evaluation.bag_of_words import count_tokens, fit_bags
from metagen_jax.evaluation.probes import fit_logistic


def test_bags_by_hand():
    bags = count_tokens(np.array([[2, 1, 2, 0], [0, 0, 0, 0]]), num_tokens=4, ignore=(0,))
    a, b = np.log(2), np.log(3)
    expected = np.array([0, a, b, 0]) / np.hypot(a, b)
    np.testing.assert_allclose(bags.toarray(), [expected, [0, 0, 0, 0]], rtol=1e-12)


def test_the_classifier_is_the_one_that_jax_finds():
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(0, 9, (40, 6)), rng.integers(0, 3, 40)
    bags = count_tokens(tokens, num_tokens=9)
    classifier = fit_bags(bags, labels, bags, labels, num_classes=3, penalties=(0.01,))
    with jax.enable_x64(True):
        expected = fit_logistic(bags.toarray(), labels, num_classes=3, penalty=0.01)
        np.testing.assert_allclose(classifier.weights, expected.weights, atol=1e-3)
        np.testing.assert_allclose(classifier(bags), expected(bags.toarray()), atol=1e-3)


def test_the_penalty_that_validates_best_is_taken():
    """A token that tells by chance in training, and one that tells always but is rare."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    noise = rng.integers(2, 60, (200, 5))
    tokens = np.concatenate([noise, labels[:, None]], 1)
    bags = count_tokens(tokens, num_tokens=60)
    fits = [
        fit_bags(bags[:100], labels[:100], bags[100:], labels[100:], num_classes=2, penalties=p)
        for p in ((1e-4,), (1e3,), (1e3, 1e-4))
    ]
    assert (fits[0](bags[100:]).argmax(1) == labels[100:]).mean() == 1
    assert (fits[1](bags[100:]).argmax(1) == labels[100:]).mean() < 0.8
    assert fits[2].penalty == 1e-4


def test_says_what_is_needed():
    bags = scipy.sparse.csr_array(np.eye(3))
    labels = np.zeros(2, int)
    with pytest.raises(UserError, match="3 and 3 rows and 2 and 2 labels"):
        fit_bags(bags, labels, bags, labels, num_classes=2)
