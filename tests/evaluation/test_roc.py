"""The area under the ROC against a count of all pairs, balanced accuracy against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.evaluation.roc import balanced_accuracy, roc_auc


def count_pairs(scores, labels):
    pairs = [
        float(a > b) + 0.5 * float(a == b) for a in scores[labels == 1] for b in scores[labels == 0]
    ]
    return np.mean(pairs)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_area_equals_the_count_of_all_pairs_with_few_and_many_ties(levels):
    rng = np.random.default_rng(levels)
    for size in (2, 7, 40):
        labels = rng.permutation(np.arange(size) % 3 == 0).astype(np.int32)
        scores = rng.integers(0, levels, size).astype(np.float32) - 1
        expected = count_pairs(scores, labels)
        np.testing.assert_allclose(roc_auc(scores, labels), expected, rtol=1e-6)
        np.testing.assert_allclose(roc_auc(scores, labels == 1), expected, rtol=1e-6)


def test_area_of_four_examples_worked_by_hand():
    """Of four pairs, two are right, one is a tie and one is wrong."""
    scores, labels = jnp.array([0.8, 0.4, 0.4, 0.5]), jnp.array([1, 1, 0, 0])
    assert roc_auc(scores, labels) == pytest.approx(2.5 / 4)


def test_area_of_a_perfect_order_is_one_of_its_reverse_zero_of_equal_scores_a_half():
    labels = jnp.array([0, 0, 1, 1, 1])
    scores = jnp.arange(5.0)
    assert roc_auc(scores, labels) == 1
    assert roc_auc(-scores, labels) == 0
    assert roc_auc(jnp.zeros(5), labels) == 0.5


def test_area_does_not_depend_on_the_scale_or_the_order_of_examples():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=30).astype(np.float32), rng.integers(0, 2, 30)
    order = rng.permutation(30)
    area = roc_auc(scores, labels)
    assert roc_auc(np.exp(scores), labels) == area
    assert roc_auc(scores[order], labels[order]) == area
    assert roc_auc(-scores, labels) == pytest.approx(1 - area)


def test_infinite_scores_are_in_order_and_those_that_are_not_a_number_are_wrong():
    labels = jnp.array([1, 1, 0, 0])
    assert roc_auc(jnp.array([jnp.inf, 1.0, 0.0, -jnp.inf]), labels) == 1
    assert roc_auc(jnp.full(4, jnp.nan), labels) == 0
    assert roc_auc(jnp.array([jnp.nan, 1.0, 0.0, 0.0]), labels) == 0.5


def test_area_without_one_of_the_classes_is_not_a_number():
    assert jnp.isnan(roc_auc(jnp.arange(3.0), jnp.zeros(3, int)))
    assert jnp.isnan(roc_auc(jnp.arange(3.0), jnp.ones(3, int)))


def test_balanced_accuracy_gives_a_rare_class_its_full_weight():
    labels = jnp.array([0, 0, 0, 0, 1])
    always_first = balanced_accuracy(jnp.zeros(5, int), labels, num_classes=2)
    assert always_first == 0.5
    assert balanced_accuracy(jnp.array([0, 0, 1, 1, 1]), labels, num_classes=2) == 0.75
    assert balanced_accuracy(labels, labels, num_classes=2) == 1
    three = balanced_accuracy(
        jnp.array([0, 1, 1, 2, 0, 0]), jnp.array([0, 0, 1, 2, 2, 2]), num_classes=3
    )
    assert three == pytest.approx((1 / 2 + 1 + 1 / 3) / 3)


def test_jit_and_vmap_give_the_same():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (4, 12)).astype(np.float32)
    labels = np.tile([0, 1], 6)
    predicted = rng.integers(0, 2, (4, 12))

    def both(scores, predicted):
        return roc_auc(scores, labels), balanced_accuracy(predicted, labels, num_classes=2)

    together = jax.jit(jax.vmap(both))(scores, predicted)
    alone = [both(s, p) for s, p in zip(scores, predicted, strict=True)]
    np.testing.assert_allclose(together, np.transpose(alone), rtol=1e-6)
