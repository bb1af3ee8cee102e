"""Full context embeddings against the published equations in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from metagen_jax.errors import UserError
from metagen_jax.nets.context_embedding import FullContextEmbedding

FEATURES, STEPS = 3, 4
NET = FullContextEmbedding(STEPS)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def parameters():
    """Parameters in float64, far enough from zero that leaving one out shows."""
    shapes = jax.eval_shape(NET.init, jax.random.key(0), *example())
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda p: rng.normal(size=p.shape), shapes)


def example(num_support=5, num_queries=2):
    rng = np.random.default_rng(0)
    support, queries = (rng.normal(size=(n, FEATURES)) for n in (num_support, num_queries))
    return jnp.asarray(support), jnp.asarray(queries)


apply = jax.jit(NET.apply)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(gates, x, state, cell):
    """One step of `LSTM(x, state, cell)`; the state may be longer than the cell."""
    i, f, g, o = (x @ w_x + state @ w_h + bias for w_x, w_h, bias in gates)
    cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(cell), cell


def gates_of(params):
    """`[(input weights, state weights, bias)]` of the four gates; what an input has beyond the
    features is read from the support set and belongs to the state."""
    gates = []
    for name in "ifgo":
        weights, hidden = np.asarray(params[f"i{name}"]["kernel"]), params[f"h{name}"]
        state = np.concatenate([np.asarray(hidden["kernel"]), weights[FEATURES:]])
        gates.append((weights[:FEATURES], state, np.asarray(hidden["bias"])))
    return gates


def in_numpy(params, support, queries, num_steps):
    support, queries = np.asarray(support), np.asarray(queries)
    told = np.zeros_like(support)
    for name, order in (("forward", 1), ("backward", -1)):
        state = cell = np.zeros(FEATURES)
        for i in range(len(support))[::order]:
            state, cell = lstm(gates_of(params[name]), support[i], state, cell)
            told[i] += state
    support = support + told
    in_context = []
    for query in queries:
        state, cell = query, np.zeros(FEATURES)
        for _ in range(num_steps):
            attention = np.exp(support @ state)
            read = attention / attention.sum() @ support
            joined = np.concatenate([state, read])
            state, cell = lstm(gates_of(params["attention"]), query, joined, cell)
            state = state + query
        in_context.append(state)
    return support, np.stack(in_context)


@pytest.mark.parametrize("num_steps", [1, STEPS])
def test_equals_the_published_equations_one_query_and_step_at_a_time(num_steps):
    support, queries = example()
    net = FullContextEmbedding(num_steps)
    actual = jax.jit(net.apply)(parameters(), support, queries)
    expected = in_numpy(parameters()["params"], support, queries, num_steps)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_an_lstm_of_zeros_leaves_the_embeddings_as_they_are():
    """All gates are open by half and there is nothing to let in: each LSTM says zero."""
    zeros = jax.tree.map(np.zeros_like, parameters())
    for actual, expected in zip(apply(zeros, *example()), example(), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_all_processing_steps_share_their_parameters():
    key = jax.random.key(0)
    few, many = (jax.eval_shape(FullContextEmbedding(k).init, key, *example()) for k in (1, 7))
    assert few == many
    assert set(few["params"]) == {"forward", "backward", "attention"}


def test_a_query_s_embedding_depends_on_no_other_query():
    support, queries = example(num_queries=4)
    _, together = apply(parameters(), support, queries)
    for i in range(4):
        _, alone = apply(parameters(), support, queries[i : i + 1])
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-12)


def test_both_depend_on_the_support_set_and_on_its_order():
    support, queries = example()
    in_order = apply(parameters(), support, queries)
    backwards = apply(parameters(), support[::-1], queries)
    assert np.abs(in_order[0] - backwards[0][::-1]).max() > 1e-3
    assert np.abs(in_order[1] - backwards[1]).max() > 1e-3
    other = apply(parameters(), support.at[-1].add(1), queries)
    assert np.abs(in_order[0][:-1] - other[0][:-1]).max(-1).min() > 1e-6, "read from both ends"
    assert np.abs(in_order[1] - other[1]).max(-1).min() > 1e-6


def loss(params, support, queries):
    return sum(jnp.sum(x**2) for x in NET.apply(params, support, queries))


def test_gradient_equals_finite_differences():
    support, queries = example(num_support=2, num_queries=1)
    arguments = (parameters(), support, queries)
    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)
    value = jax.jit(loss)
    numerical = references.finite_differences(lambda x: value(*x), arguments)
    for actual, expected in zip(*map(jax.tree.leaves, (grads, numerical)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_jit_and_vmap_change_nothing():
    tasks = [example(), tuple(2 * x for x in example())]
    one = jax.jit(jax.value_and_grad(loss))
    loop = [one(parameters(), *task) for task in tasks]
    np.testing.assert_allclose(loss(parameters(), *tasks[0]), loop[0][0], rtol=1e-12)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *tasks)
    vmapped = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0, 0)))(parameters(), *stacked)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *loop)
    for actual, wanted in zip(*map(jax.tree.leaves, (vmapped, expected)), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.slow
def test_is_finite_with_its_gradient_and_of_the_inputs_type_at_extremes(dtype):
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), parameters())

    @jax.jit
    def evaluate(support, queries):
        grads = jax.grad(lambda *args: loss(*args).astype(jnp.float32), argnums=(0, 1, 2))(
            params, support, queries
        )
        return NET.apply(params, support, queries), grads

    for scale in (0.0, 1e4):
        outputs, grads = evaluate(*(jnp.asarray(scale * x, dtype) for x in example()))
        assert all(x.dtype == dtype for x in outputs)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((outputs, grads)))


def test_refuses_to_process_a_query_in_no_steps():
    with pytest.raises(UserError, match="num_steps is 0; give 1 or more"):
        FullContextEmbedding(0).init(jax.random.key(0), *example())
