"""Losses of labelled examples against NumPy, values worked by hand, and at the extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from metagen_jax.supervised import cross_entropy_loss, squared_error_loss

KEY = jax.random.key(0)


def linear(params, x):
    return x @ params


def identity(params, inputs):
    """The outputs are the parameters: gradients with respect to them are those of the outputs."""
    del inputs
    return params


def test_cross_entropy_of_values_worked_by_hand():
    logits = jnp.log(jnp.array([[1.0, 3.0], [1.0, 1.0], [4.0, 1.0]]))
    loss, metrics = cross_entropy_loss(identity)(logits, (None, jnp.array([1, 0, 1])), KEY)
    np.testing.assert_allclose(loss, (np.log(4 / 3) + np.log(2) + np.log(5)) / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], 2 / 3, rtol=1e-6)


def test_cross_entropy_and_its_gradient_equal_numpy_and_finite_differences():
    rng = np.random.default_rng(0)
    params, x, labels = rng.normal(size=(3, 4)), rng.normal(size=(6, 3)), rng.integers(4, size=6)
    with jax.enable_x64(True):
        value_and_grad = jax.jit(jax.value_and_grad(cross_entropy_loss(linear), has_aux=True))
        (loss, metrics), grads = value_and_grad(params, (x, labels), KEY)
        expected_grads = references.finite_differences(
            lambda p: value_and_grad(p, (x, labels), KEY)[0][0], params
        )
    logits = x @ params
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log(probabilities[np.arange(6), labels]).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(1) == labels).mean())
    np.testing.assert_allclose(grads, expected_grads, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_cross_entropy_is_finite_at_extreme_logits(logit):
    logits = jnp.array([[logit, 0.0], [0.0, logit]])
    batch = (None, jnp.array([0, 0]))
    (loss, _), grads = jax.value_and_grad(cross_entropy_loss(identity), has_aux=True)(
        logits, batch, KEY
    )
    np.testing.assert_allclose(loss, 5e3, rtol=1e-6)
    assert jnp.isfinite(grads).all()


@pytest.mark.parametrize("labels", [np.ones((3, 1), int), np.eye(3, dtype=int), np.ones(1, int)])
def test_cross_entropy_refuses_labels_of_another_shape_than_one_a_row(labels):
    with pytest.raises(ValueError, match=r"labels have shape .* for logits of shape \(3, 3\)"):
        cross_entropy_loss(identity)(jnp.zeros((3, 3)), (None, labels), KEY)


def test_squared_error_of_values_worked_by_hand():
    outputs, targets = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[0.0, 2.0], [3.0, 7.0]])
    (loss, metrics), grads = jax.value_and_grad(squared_error_loss(identity), has_aux=True)(
        outputs, (None, targets), KEY
    )
    assert loss == 2.5
    assert metrics == {}
    np.testing.assert_array_equal(grads, (outputs - targets) / 2)


def test_squared_error_refuses_targets_that_would_be_broadcast():
    with pytest.raises(
        ValueError, match=r"targets have shape \(3,\) for outputs of shape \(3, 1\)"
    ):
        squared_error_loss(identity)(jnp.zeros((3, 1)), (None, jnp.zeros(3)), KEY)
