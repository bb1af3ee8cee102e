"""MADE: what depends on what, by Jacobians; probabilities that sum to one; and NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.errors import UserError
from metagen_jax.generative.likelihoods import bernoulli_log_prob
from metagen_jax.nets.made import MADE

D = 5
KEY = jax.random.key(0)


def variables(net, condition=None, num_inputs=D):
    """Parameters far enough from zero that every path shows."""
    shapes = jax.eval_shape(net.init, KEY, jnp.zeros(num_inputs), condition)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.float32(0.5 + rng.uniform(size=p.shape)), shapes)


NETS = {
    "natural": MADE((9,), 1),
    "reversed": MADE((8, 7), 2, order="reversed"),
    "random": MADE((8, 8, 8), 3, order=4),
    "narrow": MADE((2,), 2),
    "direct": MADE((2, 3), 2, direct=True),
    "linear": MADE((), 2),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("num_condition", [None, 2])
def test_outputs_depend_on_the_inputs_before_them_and_on_all_of_those(name, num_condition):
    # Softplus passes some of every path, whatever its sign.
    net = NETS[name].clone(activation=jax.nn.softplus)
    condition = None if num_condition is None else jnp.ones(num_condition)
    params = variables(net, condition)
    x = jnp.asarray(np.random.default_rng(1).normal(size=D), jnp.float32)
    jacobian = jax.jit(jax.jacobian(net.apply, argnums=1))(params, x, condition)
    ranks = net.ranks(D)[0]
    allowed = np.broadcast_to(ranks[None, :, None] > ranks[None, None, :], jacobian.shape)
    assert (np.asarray(jacobian)[~allowed] == 0).all()
    if name != "narrow":
        assert (np.asarray(jacobian)[allowed] != 0).all()
    assert sorted(ranks) == list(range(D))
    if condition is not None:
        of_condition = jax.jit(jax.jacobian(net.apply, argnums=2))(params, x, condition)
        assert (of_condition != 0).all()


def test_the_first_output_is_no_linear_map_of_the_condition():
    net = MADE((6,), 1, activation=jnp.tanh)
    params = variables(net, jnp.ones(2))
    first = jax.jit(lambda c: net.apply(params, jnp.zeros(D), c)[0, 0])
    a, b = jnp.array([0.3, -0.2]), jnp.array([-0.1, 0.4])
    assert abs(first(a + b) + first(jnp.zeros(2)) - first(a) - first(b)) > 1e-2


@pytest.mark.parametrize("mask_index", [0, 1, 2])
@pytest.mark.parametrize("order", [3, "natural"])
def test_binary_probabilities_sum_to_one(order, mask_index):
    net = MADE((7, 6), 1, order=order, num_masks=3)
    params = variables(net)
    params = jax.tree.map(lambda p: p - 1, params)
    vectors = np.array(list(itertools.product([0, 1], repeat=D)), np.float32)

    @jax.jit
    def log_probs(index):
        logits = net.apply(params, vectors, mask_index=index)[:, 0]
        return bernoulli_log_prob(vectors, logits).sum(-1)

    log_probs = log_probs(mask_index)
    np.testing.assert_allclose(np.exp(log_probs).sum(), 1, rtol=1e-5)
    assert log_probs.std() > 0.1


def test_each_of_several_orders_has_masks_of_its_own_chosen_by_a_traced_index():
    net = MADE((8, 8), 1, order=0, num_masks=4, activation=jax.nn.softplus)
    params = variables(net)
    x = jnp.ones(D)
    jacobian = jax.jit(lambda i: jax.jacobian(lambda x: net.apply(params, x, mask_index=i)[0])(x))
    patterns = [np.asarray(jacobian(i)) != 0 for i in range(4)]
    for ranks, pattern in zip(net.ranks(D), patterns, strict=True):
        np.testing.assert_array_equal(pattern, ranks[:, None] > ranks)
    assert len({p.tobytes() for p in patterns}) == 4


def test_of_a_fixed_order_each_set_of_masks_connects_in_another_way():
    net = MADE((8, 8), 1, num_masks=3, activation=jax.nn.softplus)
    params = variables(net)
    x = jnp.asarray(np.random.default_rng(1).normal(size=D), jnp.float32)
    of_mask = jax.jit(lambda i: net.apply(params, x, mask_index=i)[0])
    jacobian = jax.jit(lambda i: jax.jacobian(lambda x: net.apply(params, x, mask_index=i)[0])(x))
    below = np.tril(np.ones((D, D), bool), -1)
    for i in range(3):
        np.testing.assert_array_equal(np.asarray(jacobian(i)) != 0, below)
    assert len({np.asarray(of_mask(i)).tobytes() for i in range(3)}) == 3


def test_equals_numpy():
    """Three inputs; the hidden units see none of them, x0, and two of them x0 and x1."""
    net = MADE((4,), 2, direct=True)
    params = variables(net, jnp.ones(2), 3)
    p = jax.tree.map(np.asarray, params["params"])
    x, c = np.float32([0.3, -0.7, 0.2]), np.float32([-1.2, 0.4])
    # Degrees -1, 0, 1, 1 of the hidden units: (j + 1) * 3 / 4, rounded up, less 2.
    sees = np.array([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]])
    h = x @ (p["hidden0"]["kernel"] * sees) + p["hidden0"]["bias"]
    h = np.maximum(h + c @ p["condition0"]["kernel"], 0)
    seen = np.tile([[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]], 2)
    expected = h @ (p["head"]["kernel"] * seen) + p["head"]["bias"]
    expected += x @ (p["direct"]["kernel"] * np.tile([[0, 1, 1], [0, 0, 1], [0, 0, 0]], 2))
    expected += c @ p["condition"]["kernel"]
    actual = net.apply(params, x, c)
    np.testing.assert_allclose(actual, expected.reshape(2, 3), rtol=1e-5)


def test_leading_axes_are_batch_axes_and_one_input_has_no_conditionals():
    net = MADE((6,), 2, order="reversed")
    params = variables(net)
    x = jax.random.normal(KEY, (2, 3, D))
    one_by_one = [[net.apply(params, row) for row in block] for block in x]
    np.testing.assert_allclose(net.apply(params, x), one_by_one, rtol=1e-5, atol=1e-6)
    alone = variables(net, num_inputs=1)
    np.testing.assert_array_equal(net.apply(alone, jnp.zeros(1)), net.apply(alone, jnp.ones(1)))


def test_a_head_of_zeros_gives_outputs_of_zero():
    net = MADE((6,), 2, direct=True, head_init=jax.nn.initializers.zeros)
    x, c = jnp.ones(D), jnp.ones(2)
    np.testing.assert_array_equal(net.apply(net.init(KEY, x, c), x, c), 0)


def test_random_orders_never_change():
    """Trained parameters are of no use with another."""
    expected = [[3, 2, 1, 0, 4, 5], [2, 4, 5, 0, 3, 1], [3, 0, 1, 4, 5, 2]]
    np.testing.assert_array_equal(MADE((), order=0, num_masks=3).ranks(6), expected)


def test_gradient_of_vmapped_tasks_equals_a_loop():
    net = MADE((6, 5), 2, order=1, activation=jnp.tanh)

    @jax.jit
    def gradient(params, x):
        return jax.grad(lambda params: jnp.sum(net.apply(params, x) ** 2))(params)

    tasks = [(net.init(key, jnp.zeros(D)), jax.random.normal(key, (3, D))) for key in (KEY,) * 2]
    tasks[1] = jax.tree.map(lambda a: -0.5 * a, tasks[1])
    stack = functools.partial(jax.tree.map, lambda *a: jnp.stack(a))
    together = jax.jit(jax.vmap(gradient))(*stack(*tasks))
    expected = stack(*[gradient(*task) for task in tasks])
    for a, b in zip(*map(jax.tree.leaves, (together, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("ill_typed")
def test_says_what_is_needed():
    for net, message in (
        (MADE((3,), order="backwards"), 'order is \'backwards\'; give "natural", "reversed" or'),
        (MADE((3,), num_masks=0), "num_masks is 0; give 1 or more"),
    ):
        with pytest.raises(UserError, match=message):
            net.init(KEY, jnp.zeros(D))
