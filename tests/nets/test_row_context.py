"""What a context sees: its own row and those above."""

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.nets.row_context import RowContext


def test_a_context_sees_its_own_row_and_as_many_above_as_there_are_layers():
    net = RowContext(features=4, num_layers=2)
    grid = jax.random.normal(jax.random.key(0), (1, 5, 4, 3))
    params = net.init(jax.random.key(1), grid)
    contexts = net.apply(params, grid)
    assert contexts.shape == (1, 5, 4, 4)

    def of_row(grid):
        return jnp.square(net.apply(params, grid)[0]).sum((1, 2))

    jacobian = jax.jit(jax.jacrev(of_row))(grid)[:, 0]
    reached = np.abs(jacobian).max((2, 3)) > 0
    expected = np.tril(np.ones((5, 5), bool)) & ~np.tril(np.ones((5, 5), bool), -3)
    np.testing.assert_array_equal(reached, expected)
