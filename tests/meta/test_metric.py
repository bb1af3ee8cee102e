"""Prototypes and attention against NumPy loops, and what the theory says of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references

from metagen_jax.errors import UserError
from metagen_jax.meta.metric import (
    matching_log_probs,
    matching_predict,
    prototypes,
    prototypical_logits,
)
from metagen_jax.nets.context_embedding import FullContextEmbedding

KEY = jax.random.key(0)
WAYS = 4


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def assert_close(actual, expected, rtol=1e-11, atol=1e-12):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def example(num_queries=5, seed=0):
    """Embeddings of three unequal classes among four, in no order, and of queries."""
    rng = np.random.default_rng(seed)
    support, queries = rng.normal(size=(6, 3)), rng.normal(size=(num_queries, 3))
    return jnp.asarray(support), jnp.array([3, 0, 3, 1, 0, 3]), jnp.asarray(queries)


def similarity(a, b, distance):
    if distance == "cosine":
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    return -((a - b) ** 2).sum()


def prototypical_in_numpy(support, labels, queries, distance):
    logits = np.full((len(queries), WAYS), -np.inf)
    for q, k in np.ndindex(logits.shape):
        members = [x for x, label in zip(support, labels, strict=True) if label == k]
        if members:
            centre = sum(members) / len(members)
            logits[q, k] = similarity(queries[q], centre, distance)
    return logits


def matching_in_numpy(support, labels, queries, distance):
    probabilities = np.zeros((len(queries), WAYS))
    for q, query in enumerate(queries):
        attention = np.exp([similarity(query, x, distance) for x in support])
        for weight, label in zip(attention / attention.sum(), labels, strict=True):
            probabilities[q, label] += weight
    return probabilities


@jax.jit
def squared_euclidean(support, labels, queries):
    return prototypical_logits(support, labels, queries, num_ways=WAYS)


@jax.jit
def by_cosine(support, labels, queries):
    return prototypical_logits(support, labels, queries, num_ways=WAYS, distance="cosine")


@jax.jit
def matching(support, labels, queries):
    return matching_log_probs(support, labels, queries, num_ways=WAYS)


@jax.jit
def matching_by_distance(support, labels, queries):
    return matching_log_probs(support, labels, queries, num_ways=WAYS, distance="squared_euclidean")


CLASSIFIERS = (squared_euclidean, by_cosine, matching, matching_by_distance)


def test_equal_a_loop_over_queries_classes_and_examples():
    numpy = [np.asarray(x) for x in example()]
    for classifier, distance in ((squared_euclidean, None), (by_cosine, "cosine")):
        assert_close(classifier(*example()), prototypical_in_numpy(*numpy, distance))
    for classifier, distance in ((matching, "cosine"), (matching_by_distance, None)):
        assert_close(jnp.exp(classifier(*example())), matching_in_numpy(*numpy, distance))


def test_values_worked_by_hand():
    support = jnp.array([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    labels = jnp.array([0, 0, 1])
    centres, present = prototypes(support, labels, num_ways=3)
    assert_close(centres, jnp.array([[1.0, 0.0], [0.0, 3.0], [0.0, 0.0]]))
    assert present.tolist() == [True, True, False]
    queries = jnp.array([[1.0, 0.0], [3.0, 4.0]])
    euclidean = prototypical_logits(support, labels, queries, num_ways=3)
    assert_close(euclidean, jnp.array([[0.0, -10.0, -jnp.inf], [-20.0, -10.0, -jnp.inf]]))
    angles = prototypical_logits(support, labels, queries, num_ways=3, distance="cosine")
    assert_close(angles, jnp.array([[1.0, 0.0, -jnp.inf], [0.6, 0.8, -jnp.inf]]))
    # The example at the origin has a cosine of 0, the others 1 and 0, then 0.6 and 0.8.
    e = np.exp
    first, second = np.array([1 + e(1), 1]), np.array([1 + e(0.6), e(0.8)])
    expected = jnp.array([first / first.sum(), second / second.sum()])
    log_probs = matching_log_probs(support, labels, queries, num_ways=3)
    assert_close(jnp.exp(log_probs[:, :2]), expected)
    assert (log_probs[:, 2] == -jnp.inf).all()


def test_with_one_example_a_class_both_are_the_same_by_squared_distance():
    support, _, queries = example()
    one_each = (support[:WAYS], jnp.arange(WAYS), queries)
    log_probs = matching_by_distance(*one_each)
    assert_close(log_probs, jax.nn.log_softmax(squared_euclidean(*one_each)))


def test_squared_euclidean_is_a_linear_classifier_with_weights_2c_and_biases_minus_c_squared():
    support, labels, queries = example()
    centres, present = prototypes(support, labels, num_ways=WAYS)
    linear = jnp.where(present, queries @ (2 * centres.T) - (centres**2).sum(1), -jnp.inf)
    logits = squared_euclidean(support, labels, queries)
    assert_close(jax.nn.softmax(logits), jax.nn.softmax(linear))
    # They differ by what all classes share, the query's own square.
    shared = (linear - logits)[:, present]
    assert_close(shared, jnp.broadcast_to((queries**2).sum(1)[:, None], shared.shape))


def test_distances_far_from_the_origin_lose_nothing():
    """In float32, where the square of 10,000 has a grain of 8."""
    support = 1e4 + jnp.array([[0.0, 0.0], [1.0, 0.0]], jnp.float32)
    logits = prototypical_logits(
        support, jnp.array([0, 1]), support + jnp.array([0.0, 0.5], jnp.float32), num_ways=2
    )
    np.testing.assert_array_equal(logits, [[-0.25, -1.25], [-1.25, -0.25]])


@pytest.mark.parametrize("classifier", [by_cosine, matching])
def test_cosine_knows_no_lengths_even_of_vectors_whose_squares_leave_float32(classifier):
    support, labels, queries = example()
    expected = classifier(support, labels, queries)
    for scale in (1e-30, 1e-3, 1e30):
        # Of the support set a common scale, as prototypes are means.
        scaled = [jnp.float32(scale) * x.astype(jnp.float32) for x in (support, queries)]
        actual = classifier(scaled[0], labels, scaled[1])
        assert actual.dtype == jnp.float32
        assert_close(actual.astype(jnp.float64), expected, rtol=1e-5, atol=1e-5)


def test_matching_probabilities_sum_to_one_below_the_bound_of_cosine_attention():
    support, labels, _ = example()
    probabilities = jnp.exp(matching(support, labels, 7 * support))
    assert_close(probabilities.sum(1), jnp.ones(6))
    opposite = jnp.array([[1.0, 0.0], [-1.0, 0.0], [-2.0, 0.0]])
    log_probs = matching_log_probs(opposite, jnp.arange(3), opposite[:1], num_ways=3)
    assert_close(jnp.exp(log_probs[0, 0]), jnp.exp(2.0) / (jnp.exp(2.0) + 2))


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_order_of_the_support_set_does_not_matter(classifier):
    support, labels, queries = example()
    order = jnp.array([4, 2, 0, 5, 1, 3])
    assert_close(
        classifier(support[order], labels[order], queries), classifier(support, labels, queries)
    )


@pytest.mark.slow
def test_order_of_the_support_set_matters_to_full_context_embeddings():
    support, labels, queries = example()
    order = jnp.array([4, 2, 0, 5, 1, 3])
    net = FullContextEmbedding(2)
    params = jax.jit(net.init)(KEY, support, queries)

    for contextualise, matters in ((net.apply, True), (None, False)):
        predict = jax.jit(
            matching_predict(lambda params, x: x, num_ways=WAYS, contextualise=contextualise)
        )
        answers = [
            jnp.exp(predict(params, (support[i], labels[i]), queries, KEY))
            for i in (jnp.arange(6), order)
        ]
        change = jnp.abs(answers[0] - answers[1]).max()
        assert (change > 1e-3) if matters else (change < 1e-12)


def cross_entropy(classifier, support, labels, queries, targets):
    logits = classifier(support, labels, queries)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_gradient_equals_finite_differences_under_jit_and_vmap(classifier):
    targets = jnp.array([0, 3, 1, 3, 0])
    tasks = [example(seed=seed) for seed in (0, 1)]

    def loss(embeddings, labels):
        return cross_entropy(classifier, embeddings[0], labels, embeddings[1], targets)

    grad_fn = jax.value_and_grad(loss)
    jitted, jitted_loss = jax.jit(grad_fn), jax.jit(loss)
    loop = [jitted((support, queries), labels) for support, labels, queries in tasks]
    support, labels, queries = tasks[0]
    with jax.disable_jit():
        assert_close(loss((support, queries), labels), loop[0][0])
    numerical = references.finite_differences(lambda x: jitted_loss(x, labels), (support, queries))
    assert_close(loop[0][1], numerical, rtol=1e-8, atol=1e-9)
    support, labels, queries = jax.tree.map(lambda *x: jnp.stack(x), *tasks)
    vmapped = jax.jit(jax.vmap(grad_fn))((support, queries), labels)
    assert_close(vmapped, jax.tree.map(lambda *x: jnp.stack(x), *loop))


def extremes():
    """Zero rows, a query on an example, a class without support, large and tiny numbers."""
    support, labels, queries = (np.asarray(x) for x in example(num_queries=4))
    row = np.arange(len(support))[:, None]
    return {
        "a query on an example": (support, labels, np.where(row[:4] == 0, support[3], queries)),
        "zero rows": (np.where(row == 1, 0, support), labels, np.where(row[:4] == 1, 0, queries)),
        "nothing but zeros": (0 * support, labels, 0 * queries),
        "a single class": (support, 0 * labels, queries),
        "large": (1e4 * support, labels, -1e4 * queries),
        "tiny": (1e-6 * support, labels, 1e-6 * queries),
    }


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_finite_loss_gradient_and_second_derivative_at_extremes(classifier):
    """Targets of a class that has support; nothing is lost for the one that has none."""
    targets = jnp.zeros(4, int)

    @jax.jit
    def derivatives(support, labels, queries):
        def loss(embeddings):
            return cross_entropy(classifier, embeddings[0], labels, embeddings[1], targets)

        at = (support, queries)
        value, slope = jax.value_and_grad(loss)(at)
        _, curvature = jax.jvp(jax.grad(loss), (at,), (jax.tree.map(jnp.ones_like, at),))
        return value, slope, curvature

    for name, (support, labels, queries) in extremes().items():
        single = [x.astype(jnp.float32) for x in (support, queries)]
        for leaf in jax.tree.leaves(derivatives(single[0], labels, single[1])):
            assert np.isfinite(leaf).all(), name


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_a_query_of_a_class_without_support_costs_infinitely_much_and_spoils_no_gradient(
    classifier,
):
    support, labels, queries = example()
    targets = jnp.array([2, 0, 1, 3, 0])
    value, slope = jax.jit(
        jax.value_and_grad(lambda x: cross_entropy(classifier, x[0], labels, x[1], targets))
    )((support, queries))
    assert value == jnp.inf
    assert all(jnp.isfinite(x).all() for x in slope)


@pytest.mark.usefixtures("ill_typed")
def test_refuses_an_unknown_distance():
    with pytest.raises(UserError, match="distance is 'euclidean'; give \"squared_euclidean\" or"):
        prototypical_logits(*example(), num_ways=WAYS, distance="euclidean")
