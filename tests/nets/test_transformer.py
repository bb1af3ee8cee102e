"""The transformer in NumPy; what sees what, by its Jacobian; one token at a time."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from pixel_models import random_params

from metagen_jax.errors import UserError
from metagen_jax.nets.transformer import Transformer, attend, begins, positions_within

PRE = Transformer(9, 12, width=6, depth=2, num_heads=3, hidden_width=5, num_types=2)
POST = PRE.clone(norm="post")
CAUSAL = PRE.clone(causal=True, begin=8)
# One head a side, of three features each.
NEAR = PRE.clone(num_heads=2, by_distance=True)
NEAR_CAUSAL = CAUSAL.clone(by_distance=True)
TOKENS = np.random.default_rng(0).integers(0, 8, (2, 10))
# The second row begins with padding, and ends with it.
DOCUMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 3, 0], [0, 4, 4, 4, 4, 4, 5, 5, 0, 0]])
TYPES = np.random.default_rng(1).integers(0, 2, (2, 10))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def slope(net, head, gap):
    """How much less a head sees for each token farther away."""
    if net.causal:
        return -(16.0**-head)
    back, ahead = range(net.num_heads // 2), range(net.num_heads // 2, net.num_heads)
    if (gap < 0 and head in back) or (gap > 0 and head in ahead):
        return -np.inf
    return -(16.0 ** -(head % (net.num_heads // 2)))


def by_loop(net, params, tokens, types):
    """The logits of one document, a token and a head at a time."""
    params = jax.tree.map(np.asarray, params["params"])

    def dense(name, x, inside=params):
        return x @ inside[name]["kernel"] + inside[name]["bias"]

    def norm(name, x, inside=params):
        deviation = x - x.mean(-1, keepdims=True)
        scaled = deviation / np.sqrt(np.square(deviation).mean(-1, keepdims=True) + net.epsilon)
        return scaled * inside[name]["scale"] + inside[name]["bias"]

    def gelu(x):
        return x * scipy.special.ndtr(x)

    words = params["tokens"]["embedding"]
    x = words[tokens] + params["positions"]["embedding"][: len(tokens)]
    x = x + params["types"]["embedding"][types]
    x = norm("outer_norm", x) if net.norm == "post" else x
    size = net.width // net.num_heads
    for i in range(net.depth):
        p = params[f"blocks_{i}"]
        before = norm("attention_norm", x, p) if net.norm == "pre" else x
        attended = np.zeros_like(x)
        for t in range(len(x)):
            seen = before[: t + 1] if net.causal else before
            for head in range(net.num_heads):
                part = slice(head * size, (head + 1) * size)
                scores = dense("key", seen, p)[:, part] @ dense("query", before[t], p)[part]
                scores = scores / np.sqrt(size)
                if net.by_distance:
                    scores += [slope(net, head, t - s) * abs(t - s) for s in range(len(seen))]
                weights = scipy.special.softmax(scores)
                attended[t, part] = weights @ dense("value", seen, p)[:, part]
        x = x + dense("out", attended, p)
        x = norm("attention_norm", x, p) if net.norm == "post" else x
        before = norm("dense_norm", x, p) if net.norm == "pre" else x
        x = x + dense("dense1", gelu(dense("dense0", before, p)), p)
        x = norm("dense_norm", x, p) if net.norm == "post" else x
    x = norm("outer_norm", x) if net.norm == "pre" else x
    return norm("head_norm", gelu(dense("head_dense", x))) @ words.T + params["head_bias"]


@pytest.mark.parametrize("net", [PRE, POST, CAUSAL, NEAR, NEAR.clone(num_heads=6), NEAR_CAUSAL])
@pytest.mark.slow
def test_documents_packed_into_rows_have_the_logits_of_a_loop_over_each_alone(net):
    params = random_params(net, TOKENS)
    logits = jax.jit(net.apply)(params, TOKENS, DOCUMENTS, TYPES)
    for document in range(1, 6):
        here = document == DOCUMENTS
        expected = by_loop(net, params, TOKENS[here], TYPES[here])
        np.testing.assert_allclose(logits[here], expected, rtol=1e-9, atol=1e-12)
    alone = net.apply(params, TOKENS[0], types=TYPES[0])
    np.testing.assert_allclose(alone, by_loop(net, params, TOKENS[0], TYPES[0]), rtol=1e-9)


def test_positions_count_from_the_first_token_of_each_document():
    documents = jnp.asarray(DOCUMENTS)
    expected = [[0, 1, 2, 0, 1, 2, 3, 4, 0, 0], [0, 0, 1, 2, 3, 4, 0, 1, 0, 1]]
    np.testing.assert_array_equal(positions_within(documents), expected)
    np.testing.assert_array_equal(begins(documents), np.array(expected) == 0)


@pytest.mark.parametrize("net", [PRE, CAUSAL, NEAR])
def test_a_token_sees_its_own_document_and_padding_sees_and_is_seen_by_nothing(net):
    """By the Jacobian with respect to what each token adds to the embeddings."""
    params = random_params(net, TOKENS)
    table = params["params"]["tokens"]["embedding"]
    distinct = np.arange(10)

    def logits(rows, documents):
        # Each token has a row of its own in the table of types, so that its gradient is its own.
        inner = {**params["params"], "types": {"embedding": rows}}
        wide = net.clone(num_types=10)
        features = wide.apply({"params": inner}, TOKENS[0], documents, distinct, method="encode")
        return features.sum(-1)

    rows = jnp.asarray(np.random.default_rng(2).normal(size=(10, table.shape[1])))
    for documents in jnp.asarray(DOCUMENTS):
        jacobian = jax.jit(jax.jacobian(logits))(rows, documents)
        expected = (documents[:, None] == documents) & (documents[:, None] != 0)
        expected = jnp.tril(expected) if net.causal else expected
        # The residual path: a token depends on itself, padding too.
        expected |= jnp.eye(10, dtype=bool)
        np.testing.assert_array_equal(np.abs(jacobian).max(-1) > 1e-12, expected)


@pytest.mark.slow
def test_the_next_token_is_predicted_from_those_before_it_in_its_document():
    params = random_params(CAUSAL, TOKENS)
    predict = functools.partial(CAUSAL.apply, params, method="predict_next")
    logits = jax.jit(predict)(TOKENS, DOCUMENTS)
    for document in range(1, 6):
        here = document == DOCUMENTS
        tokens = TOKENS[here]
        shifted = np.array([CAUSAL.begin, *tokens[:-1]])
        expected = by_loop(CAUSAL, params, shifted, np.zeros_like(shifted))
        np.testing.assert_allclose(logits[here], expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(predict(tokens), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("net", [CAUSAL, CAUSAL.clone(norm="post"), NEAR_CAUSAL])
@pytest.mark.slow
def test_one_token_at_a_time_gives_the_logits_of_all_at_once(net):
    params = random_params(net, TOKENS)
    tokens = np.random.default_rng(3).integers(0, 8, net.max_length)
    step = jax.jit(functools.partial(net.apply, method="next_token"))
    cache, logits = net.blank_cache(jnp.dtype(jnp.float64)), []
    for index in range(len(tokens)):
        previous = jnp.asarray(tokens[index - 1] if index else 5)
        cache, output = step(params, cache, jnp.asarray(index), previous)
        logits.append(output)
    expected = net.apply(params, tokens, method="predict_next")
    np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_values_and_gradients_of_tasks_with_parameters_of_their_own_are_those_of_a_loop():
    tasks = [random_params(PRE, TOKENS, seed=s) for s in (0, 1)]

    def energy(params):
        return jnp.square(PRE.apply(params, TOKENS, DOCUMENTS, TYPES)).sum()

    evaluate = jax.value_and_grad(energy)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *tasks)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *map(jax.jit(evaluate), tasks))
    vmapped = jax.jit(jax.vmap(evaluate))(stacked)
    chex.assert_trees_all_close(vmapped, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_values_and_gradients_are_finite_at_extremes_in_float32():
    with jax.enable_x64(False):
        queries = 1e4 * jax.random.normal(jax.random.key(0), (4, 1, 3))
        mask = jnp.array([[True] * 4, [False] * 4, [True] + [False] * 3, [False] * 4])

        def energy(queries):
            return attend(queries, -queries, queries, mask).sum()

        assert np.isfinite(jax.grad(energy)(queries)).all()
        attended = attend(queries, queries, queries, mask)
        np.testing.assert_array_equal(attended[1::2], 0)
        params = jax.jit(PRE.init)(jax.random.key(0), TOKENS)
        padding = np.zeros_like(TOKENS)
        both = jax.jit(jax.value_and_grad(lambda p: PRE.apply(p, TOKENS, padding).sum()))
        for x in jax.tree.leaves(both(params)):
            assert np.isfinite(x).all()
        params = jax.jit(NEAR.init)(jax.random.key(0), TOKENS)
        for documents in (padding, DOCUMENTS):
            slopes = jax.grad(lambda p, d=documents: NEAR.apply(p, TOKENS, d).sum())(params)
            for x in jax.tree.leaves(slopes):
                assert np.isfinite(x).all()


@pytest.mark.slow
def test_padding_beyond_the_longest_document_is_harmless():
    params = random_params(PRE, TOKENS)
    tokens = np.pad(TOKENS, ((0, 0), (0, 20)))
    documents = np.pad(DOCUMENTS, ((0, 0), (0, 20)))
    logits = PRE.apply(params, tokens, documents)
    assert np.isfinite(logits).all()
    expected = PRE.apply(params, TOKENS, DOCUMENTS)
    np.testing.assert_allclose(logits[:, :8], expected[:, :8], rtol=1e-9)


def test_says_what_is_needed():
    key = jax.random.key(0)
    for settings, message in (
        ({"num_heads": 4}, "width is 6 for 4 heads; give a multiple of num_heads"),
        ({"by_distance": True}, "num_heads is 3; by_distance half of the heads look back"),
        ({"begin": 9}, "begin is 9; give a token, 0 to 8, that no document has"),
    ):
        with pytest.raises(UserError, match=message):
            PRE.clone(**settings).init(key, TOKENS)
    with pytest.raises(UserError, match="a row has 13 tokens and max_length is 12"):
        PRE.init(key, np.zeros(13, int))
    with pytest.raises(UserError, match="give causal=True"):
        PRE.init(key, TOKENS, method="predict_next")


@pytest.mark.usefixtures("ill_typed")
def test_says_what_norms_there_are():
    with pytest.raises(UserError, match="norm is 'middle'; give"):
        PRE.clone(norm="middle").init(jax.random.key(0), TOKENS)
