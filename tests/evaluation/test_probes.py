"""Probes against SciPy and loops; measures of collapse by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from metagen_jax.errors import UserError
from metagen_jax.evaluation.probes import (
    LinearClassifier,
    alignment,
    describe_collapse,
    effective_rank,
    extract_features,
    fingerprint,
    fit_logistic,
    linear_probe,
    logistic_predict,
    nearest_neighbour_accuracy,
    uniformity,
)

KEY = jax.random.key(0)


def blobs(seed, num=60, shift=0.0):
    """Three classes around three centres, in four features of unlike scale."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, num)
    centres = np.array([[2, 0, 0, 0], [0, 20, 0, 0], [0, 0, 0.2, 0]])
    noise = rng.normal(size=(num, 4)) * [1, 10, 0.1, 1]
    return (centres[labels] + noise + shift).astype(np.float32), labels


def test_logistic_regression_equals_scipys_minimum():
    with jax.enable_x64(True):
        x, y = blobs(0)
        x = x.astype(np.float64) / [1, 10, 0.1, 1]

        def objective(flat):
            weights, bias = flat[:12].reshape(4, 3), flat[12:]
            log_probs = scipy.special.log_softmax(x @ weights + bias, axis=1)
            return -log_probs[np.arange(60), y].mean() + 0.02 / 2 * np.square(weights).sum()

        expected = scipy.optimize.minimize(objective, np.zeros(15), tol=1e-12).x
        fitted = jax.jit(lambda x: fit_logistic(x, y, num_classes=3, penalty=0.02, tolerance=1e-8))(
            x
        )
        np.testing.assert_allclose(fitted.weights.ravel(), expected[:12], atol=1e-5)
        # A constant added to all biases changes nothing.
        bias = expected[12:] - expected[12:].mean()
        np.testing.assert_allclose(fitted.bias - fitted.bias.mean(), bias, atol=1e-5)


@pytest.mark.slow
def test_the_probe_finds_blobs_whatever_their_scale_and_place():
    train, val, test = (blobs(seed, 300, shift=50.0) for seed in range(3))
    probe = linear_probe(train, val, test, num_classes=3)
    assert probe.accuracy > 0.75
    x, y = test
    assert float((probe.classifier(x).argmax(1) == y).mean()) == probe.accuracy
    shuffled = np.random.default_rng(0).permutation(train[1])
    assert linear_probe((train[0], shuffled), val, test, num_classes=3).accuracy < 0.6
    with_constant = [(np.pad(x, ((0, 0), (0, 1))), y) for x, y in (train, val, test)]
    other = linear_probe(*with_constant, num_classes=3)
    assert abs(other.accuracy - probe.accuracy) < 0.01


def test_the_penalty_is_chosen_by_validation_alone():
    """One that forbids weights answers by the most frequent class."""
    train, test = blobs(0, 300), blobs(1, 300)
    penalties = (1e6, 1e-3)
    assert linear_probe(train, test, test, num_classes=3, penalties=penalties).penalty == 1e-3
    flattering = np.zeros((50, 4), np.float32), np.full(50, np.bincount(train[1]).argmax())
    probe = linear_probe(train, flattering, test, num_classes=3, penalties=penalties)
    assert probe.penalty == 1e6
    assert probe.accuracy < 0.5


@pytest.mark.parametrize("num_neighbours", [1, 5])
def test_nearest_neighbours_equal_a_loop(num_neighbours):
    (x, y), (queries, labels) = blobs(0), blobs(1, 41)
    right = 0
    for query, label in zip(queries, labels, strict=True):
        cosines = x @ query / np.linalg.norm(x, axis=1) / np.linalg.norm(query)
        votes = np.zeros(3)
        for i in np.argsort(-cosines)[:num_neighbours]:
            votes[y[i]] += np.exp(cosines[i] / 0.07)
        right += votes.argmax() == label
    accuracy = nearest_neighbour_accuracy(
        (x, y), (queries, labels), num_classes=3, num_neighbours=num_neighbours, block_size=8
    )
    assert accuracy == pytest.approx(right / 41)


def test_features_are_those_of_the_net_and_leave_it_as_it_is():
    images = np.random.default_rng(0).normal(size=(11, 2, 3)).astype(np.float32)
    params = {"w": jax.random.normal(KEY, (6, 4)), "b": jnp.zeros(4)}
    before = fingerprint(params)

    def embed(params, images):
        return images.reshape(len(images), -1) @ params["w"] + params["b"]

    for block_size in (4, 11, 50):
        features = extract_features(embed, params, images, block_size=block_size)
        np.testing.assert_allclose(features, embed(params, images), atol=1e-5)
    labels = np.arange(11) % 2
    linear_probe(*[(features, labels)] * 3, num_classes=2, num_steps=5)
    assert fingerprint(params) == before
    assert fingerprint({**params, "b": params["b"].at[0].set(1e-30)}) != before
    assert fingerprint({"w": params["w"], "c": params["b"]}) != before


def test_few_shots_by_logistic_regression():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 4)
    centres = rng.normal(size=(5, 16))
    support, queries = (
        (centres[labels] + 0.3 * rng.normal(size=(20, 16))).astype(np.float32) for _ in range(2)
    )
    predict = jax.jit(logistic_predict(lambda params, x: x * params, num_ways=5))
    logits = predict(jnp.array(2.0), (support, jnp.asarray(labels)), queries, KEY)
    assert logits.shape == (20, 5)
    assert (logits.argmax(1) == labels).mean() > 0.9
    # Lengths don't matter: the classifier sees directions.
    np.testing.assert_allclose(
        predict(jnp.array(20.0), (support, jnp.asarray(labels)), queries, KEY), logits, atol=1e-3
    )


def test_alignment_and_uniformity_equal_loops():
    z_a, z_b = np.random.default_rng(0).normal(size=(2, 7, 3))
    unit_a, unit_b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (z_a, z_b))
    apart = [np.square(a - b).sum() for a, b in zip(unit_a, unit_b, strict=True)]
    np.testing.assert_allclose(alignment(z_a, z_b), np.mean(apart), rtol=1e-5)
    terms = [
        np.exp(-2 * np.square(unit_a[i] - unit_a[j]).sum())
        for i in range(7)
        for j in range(7)
        if i != j
    ]
    np.testing.assert_allclose(uniformity(z_a), np.log(np.mean(terms)), rtol=1e-5)
    np.testing.assert_allclose(uniformity(np.ones((5, 3))), 0, atol=1e-5)
    np.testing.assert_allclose(alignment(z_a, -z_a), 4, rtol=1e-5)


def test_effective_rank_by_hand():
    plus_minus = np.concatenate([np.eye(6), -np.eye(6)])
    np.testing.assert_allclose(effective_rank(plus_minus), 6, rtol=1e-5)
    np.testing.assert_allclose(effective_rank(plus_minus + 7), 6, rtol=1e-3)
    line = np.outer(np.arange(12.0), np.ones(6))
    np.testing.assert_allclose(effective_rank(line), 1, rtol=1e-3)
    # Singular values of 3, 1 and no other: shares of 3/4 and 1/4.
    shares = np.array([0.75, 0.25])
    np.testing.assert_allclose(
        effective_rank(plus_minus * [3, 1, 0, 0, 0, 0]), np.exp(-shares @ np.log(shares)), rtol=1e-5
    )
    assert effective_rank(np.full((12, 6), 0.3)) == 0


def test_collapse_is_detected_and_named():
    rng = np.random.default_rng(0)
    healthy = rng.normal(size=(200, 32))
    assert describe_collapse(healthy) is None
    alike = 1 + 1e-3 * healthy
    assert "complete collapse" in describe_collapse(alike)
    assert "complete collapse" in describe_collapse(np.zeros((20, 8)))
    flat = healthy[:, :2] @ rng.normal(size=(2, 32))
    assert "dimensional collapse: an effective rank of 1.9 of 32" in describe_collapse(flat) or (
        "dimensional collapse: an effective rank of 2.0 of 32" in describe_collapse(flat)
    )


def test_what_can_not_be_probed_is_refused(ill_typed):
    x, y = blobs(0)
    with pytest.raises(UserError, match="60 rows of features and 59 labels"):
        linear_probe((x, y[1:]), (x, y), (x, y), num_classes=3)
    with pytest.raises(UserError, match="penalties is empty"):
        linear_probe((x, y), (x, y), (x, y), num_classes=3, penalties=())
    with pytest.raises(UserError, match="num_neighbours is 61 of 60"):
        nearest_neighbour_accuracy((x, y), (x, y), num_classes=3, num_neighbours=61)


def test_a_classifier_is_linear():
    classifier = LinearClassifier(jnp.eye(3), jnp.ones(3))
    chex.assert_trees_all_close(classifier(2 * jnp.eye(3)), 2 * jnp.eye(3) + 1)
