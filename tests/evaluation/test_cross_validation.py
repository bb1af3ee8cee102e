"""Cross-validation: its parts, its choice against a loop of single fits, what it leaves out."""

import numpy as np
import pytest

from metagen_jax.errors import UserError
from metagen_jax.evaluation.cross_validation import cross_validated_probe, folds
from metagen_jax.evaluation.probes import fit_logistic


def example(num, *, noise, seed):
    """Three classes in a plane, and eighteen features that tell nothing."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num) % 3
    angle = 2 * np.pi * labels / 3
    useful = 2 * np.stack([np.cos(angle), np.sin(angle)], 1) + rng.normal(0, noise, (num, 2))
    return np.concatenate([useful, rng.normal(size=(num, 18))], 1).astype(np.float32), labels


def test_folds_hold_every_example_once_and_every_class_evenly():
    labels = np.repeat([0, 1, 2], [7, 9, 10])
    parts = folds(labels, 4)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(26))
    assert {len(part) for part in parts} == {6, 7}
    for label in range(3):
        counts = [(labels[part] == label).sum() for part in parts]
        assert max(counts) - min(counts) <= 1


@pytest.mark.slow
def test_the_penalty_is_that_of_single_fits():
    train, test = (example(num, noise=1.5, seed=seed) for seed, num in enumerate((30, 300)))
    penalties = (1e-3, 1e-1, 1.0)
    probe = cross_validated_probe(train, test, num_classes=3, penalties=penalties, num_folds=5)
    x = (train[0] - train[0].mean(0)) / train[0].std(0)
    accuracies = {}
    for penalty in sorted(penalties, reverse=True):
        right = []
        for part in folds(train[1], 5):
            rest = np.setdiff1d(np.arange(30), part)
            fitted = fit_logistic(x[rest], train[1][rest], num_classes=3, penalty=penalty)
            right.append(np.asarray(fitted(x[part]).argmax(1)) == train[1][part])
        accuracies[penalty] = np.concatenate(right).mean()
    assert probe.penalty == pytest.approx(max(accuracies, key=accuracies.get))
    assert probe.validation_accuracy == pytest.approx(max(accuracies.values()))
    assert probe.correct.mean() > 0.6


@pytest.mark.slow
def test_labels_without_reason_are_at_chance_in_validation():
    features, _ = example(60, noise=1.0, seed=2)
    labels = np.random.default_rng(3).permutation(np.arange(60) % 3)
    probe = cross_validated_probe(
        (features, labels), (features, labels), num_classes=3, penalties=(1e-3,), num_folds=3
    )
    assert probe.validation_accuracy < 0.5
    # Of its own training examples it knows more.
    assert probe.correct.mean() > probe.validation_accuracy + 0.2


@pytest.mark.usefixtures("ill_typed")
def test_what_can_not_be_done_is_refused():
    data = example(6, noise=1.0, seed=0)
    with pytest.raises(UserError, match="num_folds is 7 for 6 examples"):
        cross_validated_probe(data, data, num_classes=3, num_folds=7)
    with pytest.raises(UserError, match="penalties is empty"):
        cross_validated_probe(data, data, num_classes=3, penalties=())
