"""The multilayer perceptron against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.nets.mlp import MLP


def mlp_in_numpy(params, x, activation):
    for i in range(len(params) - 1):
        x = activation(x @ params[f"hidden{i}"]["kernel"] + params[f"hidden{i}"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("hidden_sizes", [(), (5,), (7, 4, 6)])
@pytest.mark.parametrize(
    ("activation", "in_numpy"), [(jax.nn.relu, lambda x: np.maximum(x, 0)), (jnp.tanh, np.tanh)]
)
def test_equals_numpy_with_an_activation_after_each_layer_but_the_last(
    hidden_sizes, activation, in_numpy
):
    net = MLP(hidden_sizes, 2, activation=activation)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(11, 3)), jnp.float32)
    variables = net.init(jax.random.key(0), x)
    # Biases that are not zero, so that leaving one out shows.
    variables = jax.tree.map(lambda p: p + 0.1, variables)
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), variables["params"])
    expected = mlp_in_numpy(params, x.astype(np.float64), in_numpy)
    np.testing.assert_allclose(net.apply(variables, x), expected, rtol=1e-5, atol=1e-5)


def test_hidden_units_are_normalised_by_the_batch_before_their_activation():
    net = MLP((5,), 2, batch_norm=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(11, 3)), jnp.float32)
    variables = jax.tree.map(lambda p: p + 0.1, net.init(jax.random.key(0), x))
    params = jax.tree.map(np.asarray, variables["params"])
    hidden = x @ params["hidden0"]["kernel"] + params["hidden0"]["bias"]
    hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-3)
    hidden = np.maximum(hidden * params["norm0"]["scale"] + params["norm0"]["bias"], 0)
    expected = hidden @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(net.apply(variables, x), expected, rtol=1e-4, atol=1e-5)


def test_has_one_kernel_and_bias_a_layer_under_names_that_trainable_can_choose():
    params = MLP((40, 30), 1).init(jax.random.key(0), jnp.zeros((1, 3)))["params"]
    shapes = {
        f"{layer}/{name}": leaf.shape
        for layer, leaves in params.items()
        for name, leaf in leaves.items()
    }
    assert shapes == {
        "hidden0/kernel": (3, 40),
        "hidden0/bias": (40,),
        "hidden1/kernel": (40, 30),
        "hidden1/bias": (30,),
        "head/kernel": (30, 1),
        "head/bias": (1,),
    }


def test_without_outputs_gives_the_features_before_the_head():
    x = jax.random.normal(jax.random.key(1), (4, 3))
    net = MLP((8, 5), 2)
    variables = net.init(jax.random.key(0), x)
    body = {"params": {k: v for k, v in variables["params"].items() if k != "head"}}
    features = MLP((8, 5), None).apply(body, x)
    head = variables["params"]["head"]
    expected = features @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(net.apply(variables, x), expected, rtol=1e-6)


def test_leading_axes_are_batch_axes():
    x = jax.random.normal(jax.random.key(1), (2, 5, 3))
    net = MLP((8,), 4)
    variables = net.init(jax.random.key(0), x)
    one_by_one = [[net.apply(variables, row) for row in block] for block in x]
    np.testing.assert_allclose(net.apply(variables, x), one_by_one, rtol=1e-5, atol=1e-6)


def test_kernel_init_is_that_of_every_kernel_and_biases_start_at_zero():
    net = MLP((3, 4), 2, kernel_init=jax.nn.initializers.constant(0.25))
    params = net.init(jax.random.key(0), jnp.zeros((1, 5)))["params"]
    for layer in params.values():
        np.testing.assert_array_equal(layer["kernel"], 0.25)
        np.testing.assert_array_equal(layer["bias"], 0)


def test_head_init_is_that_of_the_head_alone():
    net = MLP((3,), 2, head_init=jax.nn.initializers.zeros)
    params = net.init(jax.random.key(0), jnp.zeros((1, 5)))["params"]
    np.testing.assert_array_equal(params["head"]["kernel"], 0)
    assert params["hidden0"]["kernel"].all()
