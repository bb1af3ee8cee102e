"""Support sets with generated examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.errors import UserError
from metagen_jax.evaluation.generated_examples import with_generated_examples

KEY = jax.random.key(0)


def see(params, support, inputs, key):
    """Everything that a classifier is given."""
    return params, support, inputs


def draw(params, shown, keys):
    """The mean of a class's examples, times a factor, plus small draws."""
    return params * shown.mean(0) + jax.vmap(jax.random.uniform)(keys)[:, None] / 100


def test_each_class_has_new_examples_made_of_its_own():
    examples = jnp.array([[1.0], [3.0], [10.0], [20.0], [5.0], [5.0]])
    labels = jnp.repeat(jnp.arange(3), 2)
    predict = jax.jit(with_generated_examples(see, draw, num_ways=3, num_samples=4))
    params, (more, more_labels), inputs = predict((7.0, 2.0), (examples, labels), 8.0, KEY)
    assert (params, inputs) == (7.0, 8.0)
    np.testing.assert_array_equal(more[:6], examples)
    np.testing.assert_array_equal(more_labels, [0, 0, 1, 1, 2, 2] + [0] * 4 + [1] * 4 + [2] * 4)
    expected = np.repeat([4.0, 30.0, 10.0], 4)
    assert np.all((more[6:, 0] > expected) & (more[6:, 0] < expected + 0.01))
    assert len(np.unique(more[6:10])) == 4


def test_examples_that_are_no_multiple_of_the_classes_are_refused():
    predict = with_generated_examples(see, draw, num_ways=3, num_samples=1)
    with pytest.raises(UserError, match="4 support examples of 3 classes; give as many of each"):
        predict((1.0, 1.0), (jnp.zeros((4, 1)), jnp.array([0, 1, 2, 2])), 0.0, KEY)
