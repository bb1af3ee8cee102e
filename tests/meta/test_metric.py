"""Prototypical and Matching Networks against NumPy loops, and what the theory says of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references

from metagen_jax.errors import UserError
from metagen_jax.gradients import gradients, mean_over_tasks
from metagen_jax.meta.metric import (
    matching_log_probs,
    matching_loss,
    matching_predict,
    prototypes,
    prototypical_logits,
    prototypical_loss,
    prototypical_predict,
)
from metagen_jax.nets.context_embedding import FullContextEmbedding
from metagen_jax.nets.conv4 import BatchNorm
from metagen_jax.types import Episode

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


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def prototypical_in_numpy(support, labels, queries, distance):
    logits = np.full((len(queries), WAYS), -np.inf)
    for q, k in np.ndindex(logits.shape):
        members = [x for x, label in zip(support, labels, strict=True) if label == k]
        if members:
            centre = sum(members) / len(members)
            near = cosine(queries[q], centre)
            logits[q, k] = near if distance == "cosine" else -((queries[q] - centre) ** 2).sum()
    return logits


def matching_in_numpy(support, labels, queries):
    probabilities = np.zeros((len(queries), WAYS))
    for q, query in enumerate(queries):
        attention = np.exp([cosine(query, x) for x in support])
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


CLASSIFIERS = (squared_euclidean, by_cosine, matching)


def test_equal_a_loop_over_queries_classes_and_examples():
    numpy = [np.asarray(x) for x in example()]
    for classifier, distance in ((squared_euclidean, None), (by_cosine, "cosine")):
        assert_close(classifier(*example()), prototypical_in_numpy(*numpy, distance))
    assert_close(jnp.exp(matching(*example())), matching_in_numpy(*numpy))


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
    support, labels, queries = (jnp.asarray(x) for x in example(num_queries=4))
    zero, twin = support.at[1].set(0), queries.at[0].set(support[3])
    return {
        "a query on an example": (support, labels, twin),
        "zero rows": (zero, labels, queries.at[1].set(0)),
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
            assert jnp.isfinite(leaf).all(), name


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


def episode(num_ways=3, num_shots=2, num_queries=2, seed=0):
    """An episode of inputs `(n, 4)` and its labels."""
    rng = np.random.default_rng(seed)

    def part(count):
        labels = np.repeat(np.arange(num_ways), count)
        return jnp.asarray(rng.normal(size=(len(labels), 4))), jnp.asarray(labels)

    return Episode(part(num_shots), part(num_queries))


def normalised(params, inputs, num_reference=None):
    """A linear embedding with batch norm."""
    norm = {"scale": jnp.ones(4), "bias": jnp.full(4, 0.3)}
    return BatchNorm().apply({"params": norm}, inputs, num_reference) @ params


def normalised_in_numpy(params, inputs, num_reference=None):
    scale, bias = np.ones(4), np.full(4, 0.3)
    return (
        references.batch_norm(inputs, scale, bias, epsilon=1e-3, num_reference=num_reference)
        @ params
    )


def weights():
    return jnp.asarray(np.random.default_rng(5).normal(size=(4, 3)))


METHODS = {
    "euclidean": (prototypical_loss, prototypical_predict, {}, squared_euclidean),
    "cosine": (prototypical_loss, prototypical_predict, {"distance": "cosine"}, by_cosine),
    "matching": (matching_loss, matching_predict, {}, matching),
}


@pytest.mark.parametrize("method", METHODS)
def test_loss_is_the_cross_entropy_of_queries_normalised_with_the_support_set(method):
    make_loss, make_predict, options, classifier = METHODS[method]
    task, params = episode(), weights()
    (inputs, labels), (queries, targets) = task
    embedded = normalised_in_numpy(np.asarray(params), np.concatenate([inputs, queries]))
    logits = np.asarray(classifier(*map(jnp.asarray, (embedded[:6], labels, embedded[6:]))))[:, :3]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)

    loss_fn = jax.jit(make_loss(normalised, num_ways=3, **options))
    loss, metrics = loss_fn(params, task, KEY)
    assert_close(loss, -np.log(probabilities[np.arange(6), np.asarray(targets)]).mean())
    assert list(metrics) == ["accuracy"]
    accuracy = (logits.argmax(1) == np.asarray(targets)).mean()
    assert_close(metrics["accuracy"], accuracy, rtol=1e-6)
    predict = jax.jit(make_predict(normalised, num_ways=3, **options))
    assert_close(predict(params, task.support, queries, KEY), logits)


@pytest.mark.parametrize("method", METHODS)
def test_inductive_answers_come_from_the_support_set_s_statistics_alone(method):
    _, make_predict, options, classifier = METHODS[method]
    params = weights()
    (inputs, labels), (queries, _) = episode()
    embedded = normalised_in_numpy(
        np.asarray(params), np.concatenate([inputs, queries]), num_reference=6
    )
    expected = classifier(*map(jnp.asarray, (embedded[:6], labels, embedded[6:])))[:, :3]
    inductive = jax.jit(make_predict(normalised, num_ways=3, inductive=True, **options))
    transductive = jax.jit(make_predict(normalised, num_ways=3, **options))
    for predict in (inductive, transductive):
        together = predict(params, (inputs, labels), queries, KEY)
        alone = predict(params, (inputs, labels), queries[:1], KEY)
        difference = jnp.abs(alone[0] - together[0]).max()
        if predict is inductive:
            assert_close(together, expected)
            assert difference < 1e-12
        else:
            assert difference > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_classes_at_test_may_be_fewer_or_more_than_in_training(method):
    make_loss, make_predict, options, classifier = METHODS[method]
    loss_fn = jax.jit(make_loss(normalised, num_ways=7, **options))
    loss, _ = loss_fn(weights(), episode(7, 1), KEY)
    assert jnp.isfinite(loss)
    for num_ways in (2, 4):
        support, (queries, _) = episode(num_ways, 1)
        predict = jax.jit(make_predict(normalised, num_ways=num_ways, **options))
        logits = predict(weights(), support, queries, KEY)
        embedded = normalised_in_numpy(weights(), np.concatenate([support[0], queries]))
        examples, asked = jnp.asarray(embedded[:num_ways]), jnp.asarray(embedded[num_ways:])
        all_ways = classifier(examples, support[1], asked)
        assert_close(logits, all_ways[:, :num_ways])


def test_attention_is_paid_in_context():
    """Here support and queries each move by a learned part of the other's mean."""
    task = episode()
    (inputs, labels), (queries, targets) = task
    params = {"embed": weights(), "context": jnp.array([0.7, -1.2])}

    def embed(params, inputs):
        return normalised(params["embed"], inputs)

    def contextualise(params, support, queries):
        to_support, to_queries = params["context"]
        return support + to_support * queries.mean(0), queries + to_queries * support.mean(0)

    embedded = embed(params, jnp.concatenate([inputs, queries]))
    support, asked = contextualise(params, embedded[:6], embedded[6:])
    log_probs = matching(support, labels, asked)[:, :3]
    loss_fn = matching_loss(embed, num_ways=3, contextualise=contextualise)
    (loss, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, task, KEY)
    assert_close(loss, -log_probs[jnp.arange(6), targets].mean())
    assert all(jnp.all(g != 0) for g in jax.tree.leaves(grads))
    predict = jax.jit(matching_predict(embed, num_ways=3, contextualise=contextualise))
    assert_close(predict(params, task.support, queries, KEY), log_probs)


def test_inputs_may_be_any_pytree_and_labels_numpy_s():
    (inputs, labels), (queries, _) = episode()

    def embed(params, inputs):
        return normalised(params, jnp.concatenate([inputs["left"], inputs["right"]], axis=1))

    predict, plain = (prototypical_predict(f, num_ways=3) for f in (embed, normalised))
    halves = [{"left": x[:, :2], "right": x[:, 2:]} for x in (inputs, queries)]
    actual = predict(weights(), (halves[0], np.asarray(labels)), halves[1], KEY)
    assert_close(actual, plain(weights(), (inputs, labels), queries, KEY))


@pytest.mark.parametrize("method", METHODS)
def test_learns_an_embedding_that_ignores_what_classes_do_not_differ_in(method):
    """Two of ten inputs tell 5 classes apart, the others are noise of five times the spread.

    Chance is 0.2; the embedding that is not yet trained does little better.
    """
    make_loss, make_predict, options, _ = METHODS[method]

    def sample(key):
        centre_key, noise_key = jax.random.split(key)
        centres = jax.random.normal(centre_key, (5, 2))

        def part(key, count):
            labels = jnp.repeat(jnp.arange(5), count)
            noise = jax.random.normal(key, (5 * count, 10))
            scales = jnp.where(jnp.arange(10) < 2, 0.1, 5.0)
            return (noise * scales).at[:, :2].add(centres[labels]), labels

        support_key, query_key = jax.random.split(noise_key)
        return Episode(part(support_key, 2), part(query_key, 3))

    def embed(params, inputs):
        return inputs @ params

    optimizer = optax.adam(0.03)
    loss_fn = make_loss(embed, num_ways=5, **options)
    grad_fn = mean_over_tasks(gradients(loss_fn))

    @jax.jit
    def train(params, key):
        def step(carry, key):
            params, state = carry
            grads, _ = grad_fn(params, jax.vmap(sample)(jax.random.split(key, 16)), key)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, 200)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    predict = make_predict(embed, num_ways=5, **options)

    @jax.jit
    def accuracy(params):
        def of_task(key):
            task = sample(key)
            logits = predict(params, task.support, task.query[0], key)
            return (logits.argmax(-1) == task.query[1]).mean()

        return jax.vmap(of_task)(jax.random.split(jax.random.key(7), 200)).mean()

    start = 0.3 * jax.random.normal(KEY, (10, 4))
    assert accuracy(start) < 0.4
    assert accuracy(train(start, jax.random.key(1))) > 0.8


@pytest.mark.parametrize("method", METHODS)
def test_refuses_what_is_no_embedding_and_no_label(method):
    make_loss, make_predict, options, _ = METHODS[method]
    (inputs, labels), query = episode()

    def square(params, inputs):
        return inputs.reshape(-1, 2, 2)

    with pytest.raises(UserError, match=r"shape \(6, 2, 2\); give one vector for each"):
        make_loss(square, num_ways=3, **options)(None, episode(), KEY)
    for wrong in (jax.nn.one_hot(labels, 3, dtype=int), labels[:-1], labels.astype(float)):
        predict = make_predict(normalised, num_ways=3, **options)
        with pytest.raises(UserError, match=r"give one integer for each, shape \(6,\)"):
            predict(weights(), (inputs, wrong), query[0], KEY)
    with pytest.raises(UserError, match="the labels have shape"):
        make_loss(normalised, num_ways=3, **options)(
            weights(), Episode((inputs, labels), (query[0], query[1][:2])), KEY
        )


@pytest.mark.usefixtures("ill_typed")
def test_refuses_an_unknown_distance():
    with pytest.raises(UserError, match="distance is 'euclidean'; give \"squared_euclidean\" or"):
        prototypical_logits(*example(), num_ways=WAYS, distance="euclidean")
