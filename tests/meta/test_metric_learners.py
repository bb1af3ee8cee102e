"""Losses and predictions of Prototypical and Matching Networks over episodes."""

import functools

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
    prototypical_logits,
    prototypical_loss,
    prototypical_predict,
)
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


squared_euclidean = jax.jit(functools.partial(prototypical_logits, num_ways=WAYS))
by_cosine = jax.jit(functools.partial(prototypical_logits, num_ways=WAYS, distance="cosine"))
matching = jax.jit(functools.partial(matching_log_probs, num_ways=WAYS))
matching_by_distance = jax.jit(
    functools.partial(matching_log_probs, num_ways=WAYS, distance="squared_euclidean")
)


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
    "matching_by_distance": (
        matching_loss,
        matching_predict,
        {"distance": "squared_euclidean"},
        matching_by_distance,
    ),
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
@pytest.mark.slow
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


@pytest.mark.slow
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
