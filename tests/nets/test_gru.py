"""The GRU against its equations state by state and flax's cell; what a state may know."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from pixel_models import random_params

from metagen_jax.nets.gru import GRU


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def example(shape=(2, 5, 3)):
    x = np.random.default_rng(0).normal(size=shape)
    return random_params(GRU(4), x), x


def test_states_follow_the_equations():
    params, x = example()
    p = jax.tree.map(np.asarray, params["params"])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    expected, h = np.zeros((2, 5, 4)), np.zeros((2, 4))
    for t in range(5):
        inputs = x[:, t] @ p["input_to_state"]["kernel"] + p["input_to_state"]["bias"]
        r, z, g = np.split(inputs, 3, 1)
        r, z = (sigmoid(a + h @ k) for a, k in zip((r, z), p["state_to_state"], strict=False))
        g = np.tanh(g + r * (h @ p["state_to_state"][2] + p["state_bias"]))
        expected[:, t] = h = (1 - z) * g + z * h
    np.testing.assert_allclose(GRU(4).apply(params, x), expected, rtol=1e-12)


def test_it_is_the_cell_of_flax():
    params, x = example()
    p = params["params"]
    kernels = np.split(p["input_to_state"]["kernel"], 3, 1)
    biases = np.split(p["input_to_state"]["bias"], 3)
    cell = {
        f"i{name}": {"kernel": k, "bias": b}
        for name, k, b in zip("rzn", kernels, biases, strict=True)
    }
    cell |= {f"h{name}": {"kernel": p["state_to_state"][i]} for i, name in enumerate("rzn")}
    cell["hn"]["bias"] = p["state_bias"]
    expected = nn.RNN(nn.GRUCell(4, param_dtype=jnp.float64)).apply({"params": {"cell": cell}}, x)
    np.testing.assert_allclose(GRU(4).apply(params, x), expected, rtol=1e-12)


def test_a_state_knows_its_own_entry_and_all_before():
    params, x = example((6, 3))
    seen = jax.jacobian(lambda x: GRU(4).apply(params, x))(jnp.asarray(x))
    seen = np.abs(seen).max((1, 3)) > 0
    np.testing.assert_array_equal(seen, np.tri(6, dtype=bool))


def test_one_at_a_time_jit_and_vmap_over_weights_are_the_same():
    params, x = example()
    together = jax.jit(GRU(4).apply)(params, x)
    alone = np.stack([GRU(4).apply(params, row) for row in x])
    np.testing.assert_allclose(alone, together, rtol=1e-12)
    many = jax.tree.map(lambda p: jnp.stack([p, -p]), params)
    mapped = jax.vmap(GRU(4).apply)(many, x)
    np.testing.assert_allclose(mapped[0], together[0], rtol=1e-12)


@pytest.mark.slow
def test_is_finite_with_its_gradient_in_float32_at_extremes():
    params, x = example()
    params = jax.tree.map(lambda p: jnp.float32(100) * p.astype(jnp.float32), params)
    value, grads = jax.value_and_grad(lambda p: GRU(4).apply(p, np.float32(1e4 * x)).sum())(params)
    assert value.dtype == jnp.float32
    assert all(np.isfinite(g).all() for g in jax.tree.leaves((value, grads)))
