"""Baselines: each against a slow and obvious version of itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagen_jax.data.episodes import group_by_class, sample_episode
from metagen_jax.evaluation.baselines import (
    choose_fine_tuning,
    fine_tune_predict,
    nearest_neighbour_predict,
    replace_head,
    squared_distances,
)
from metagen_jax.evaluation.few_shot import evaluate_few_shot
from metagen_jax.nets.mlp import MLP
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.types import MetaParams

SAMPLE = functools.partial(sample_episode, num_ways=3, num_shots=2, num_queries=4)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 6)
    centres = rng.normal(size=(10, 5))
    return group_by_class(
        (centres[labels] + 0.3 * rng.normal(size=(60, 5))).astype(np.float32), labels
    )


@pytest.fixture(scope="module")
def pretrained():
    return MLP((6,), 10).init(jax.random.key(2), jnp.zeros((1, 5)))


def test_nearest_neighbour_equals_a_search_over_all_pairs():
    rng = np.random.default_rng(1)
    examples = rng.normal(size=(7, 4, 4, 2)).astype(np.float32)
    labels = np.array([2, 0, 1, 1, 0, 2, 2])
    queries = rng.normal(size=(9, 4, 4, 2)).astype(np.float32)
    predict = nearest_neighbour_predict(4)
    logits = predict((), (examples, jnp.asarray(labels)), queries, jax.random.key(0))
    expected = np.full((9, 4), -np.inf)
    for q in range(9):
        for s in range(7):
            distance = ((queries[q] - examples[s]).astype(np.float64) ** 2).sum()
            expected[q, labels[s]] = max(expected[q, labels[s]], -distance)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


def test_nearest_neighbour_finds_a_repeated_example_among_bytes_and_trees():
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 1)).astype(np.uint8)
    inputs = {"image": jnp.asarray(images), "size": jnp.arange(6.0)}
    support = (inputs, jnp.array([3, 1, 4, 0, 5, 2]))
    logits = nearest_neighbour_predict(6)((), support, inputs, jax.random.key(0))
    np.testing.assert_array_equal(logits.argmax(-1), support[1])


def test_squared_distances_of_a_point_from_itself_are_not_negative():
    points = 1e3 + jax.random.normal(jax.random.key(0), (50, 30))
    assert squared_distances(points, points).min() >= 0


def test_new_head_makes_all_classes_equally_likely_and_keeps_the_body(pretrained):
    inputs = jax.random.normal(jax.random.key(0), (4, 5))
    params = replace_head(pretrained, 3)
    np.testing.assert_array_equal(MLP((6,), 3).apply(params, inputs), np.zeros((4, 3)))
    features = MLP((6,), None)
    np.testing.assert_array_equal(
        features.apply(params, inputs), features.apply(pretrained, inputs)
    )


def test_an_unknown_head_is_an_error():
    params = MLP((4,), 3).init(jax.random.key(0), jnp.zeros((1, 5)))
    with pytest.raises(ValueError, match="is in 'classifier'; name the head by `head`"):
        replace_head(params, 5, head="classifier")


def fine_tuning_of_an_mlp(num_steps, **options):
    net = MLP((6,), 3)
    return fine_tune_predict(
        cross_entropy_loss(net.apply),
        lambda params, support, inputs: net.apply(params, inputs),
        num_ways=3,
        num_steps=num_steps,
        **options,
    )


def test_fine_tuning_equals_a_loop_of_gradient_descent(data, pretrained):
    (inputs, labels), (queries, _) = jax.jit(SAMPLE)(jax.random.key(0), data)
    predict = fine_tuning_of_an_mlp(3, every_step=True)
    params = MetaParams(pretrained, jnp.float32(0.4))
    logits = jax.jit(predict)(params, (inputs, labels), queries, jax.random.key(1))

    net = MLP((6,), 3)
    tuned = replace_head(pretrained, 3)

    @jax.jit
    @jax.grad
    def slope(params):
        log_probs = jax.nn.log_softmax(net.apply(params, inputs))
        return -log_probs[jnp.arange(6), labels].mean()

    for step in range(4):
        np.testing.assert_allclose(logits[step], net.apply(tuned, queries), atol=1e-5)
        tuned = jax.tree.map(lambda x, g: x - 0.4 * g, tuned, slope(tuned))


def test_fine_tuning_only_the_head_leaves_the_body(data, pretrained):
    net = MLP((6,), 3)
    predict = fine_tune_predict(
        cross_entropy_loss(net.apply),
        lambda params, support, inputs: params,
        num_ways=3,
        num_steps=2,
        trainable=lambda path: "/head/" in path,
    )
    support, (queries, _) = jax.jit(SAMPLE)(jax.random.key(0), data)
    params = MetaParams(pretrained, jnp.float32(0.4))
    tuned = jax.jit(predict)(params, support, queries, jax.random.key(1))["params"]
    np.testing.assert_array_equal(
        tuned["hidden0"]["kernel"], pretrained["params"]["hidden0"]["kernel"]
    )
    assert np.abs(tuned["head"]["kernel"]).max() > 0


def test_chooses_the_best_of_the_grid_and_compiles_once(data, pretrained):
    traces = []

    def rule(rate):
        traces.append(None)
        return optax.sgd(rate)

    rates = (1e-4, 0.3, 1e4)
    predict = fine_tuning_of_an_mlp(3, every_step=True, rule=rule)
    key = jax.random.key(5)
    chosen = choose_fine_tuning(
        predict, pretrained, SAMPLE, data, key=key, rates=rates, num_tasks=50
    )
    assert len(traces) == 1
    grid = {}
    for rate in rates:
        params = MetaParams(pretrained, jnp.float32(rate))
        accuracy = evaluate_few_shot(predict, params, SAMPLE, data, key=key, num_tasks=50)
        grid |= {(rate, steps): accuracy.mean[steps] for steps in range(4)}
    best = max(grid, key=lambda at: grid[at])
    assert (chosen.rate, chosen.num_steps) == best
    np.testing.assert_allclose(chosen.accuracy.mean, grid[best], atol=1e-6)
    assert chosen.accuracy.per_task.shape == (50,)
    assert grid[best] > grid[0.3, 0] + 0.2  # better than chance


def test_a_choice_needs_rates_and_every_step(data, pretrained):
    args = (fine_tuning_of_an_mlp(2), pretrained, SAMPLE, data)
    with pytest.raises(ValueError, match="rates is empty"):
        choose_fine_tuning(*args, key=jax.random.key(0), rates=())
    with pytest.raises(ValueError, match="every_step=True"):
        choose_fine_tuning(*args, key=jax.random.key(0), rates=(0.1,), num_tasks=2)
