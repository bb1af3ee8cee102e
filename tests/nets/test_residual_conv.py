"""The residual convolutional net against flax's convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from metagen_jax.nets.residual_conv import ResidualConv

KEY = jax.random.key(0)


def test_equals_flax_convolutions_in_residual_blocks():
    net = ResidualConv(3, 2, num_blocks=2)
    images = jax.random.normal(KEY, (2, 5, 4, 2))
    variables = jax.tree.map(lambda p: p + 0.1, net.init(KEY, images))

    def conv(name, x):
        params = variables["params"][name]
        return nn.Conv(3, (3, 3), precision="highest").apply({"params": params}, x)

    h = conv("stem", images)
    for i in range(2):
        h += conv(f"block{i}_conv1", jax.nn.relu(conv(f"block{i}_conv0", jax.nn.relu(h))))
    head = variables["params"]["head"]
    expected = jax.nn.relu(h) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(net.apply(variables, images), expected, rtol=1e-4, atol=1e-4)


def test_starts_at_zero():
    images = jnp.ones((1, 4, 4, 1))
    net = ResidualConv(3, 2)
    np.testing.assert_array_equal(net.apply(net.init(KEY, images), images), 0)
