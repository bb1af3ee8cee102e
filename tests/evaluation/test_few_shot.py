"""Few-shot evaluation: the same numbers as a plain loop, however the work is split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagen_jax.data.episodes import group_by_class, sample_episode
from metagen_jax.evaluation.few_shot import (
    both_modes,
    evaluate_few_shot,
    inductive,
    transductive,
)
from metagen_jax.meta.maml import maml_predict
from metagen_jax.nets.conv4 import Conv4
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.types import Episode

WAYS, FEATURES = 3, 4
SAMPLE = functools.partial(sample_episode, num_ways=WAYS, num_shots=2, num_queries=3)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(8), 6)
    centres = rng.normal(size=(8, FEATURES))
    noisy = centres[labels] + 0.8 * rng.normal(size=(48, FEATURES))
    return group_by_class(noisy.astype(np.float32), labels)


def linear(params, inputs):
    return inputs @ params


def maml_of_a_linear_model(predict_fn=None, **options):
    return maml_predict(
        cross_entropy_loss(linear),
        predict_fn or (lambda params, support, inputs: linear(params, inputs)),
        inner_optimizer=optax.sgd(0.5),
        num_steps=2,
        **options,
    )


def noisy_predict(params, support, inputs, key):
    return inputs @ params + jax.random.normal(key, (len(inputs), WAYS))


def initial_params():
    return 0.3 * jax.random.normal(jax.random.key(7), (FEATURES, WAYS))


def reference_accuracies(predict, params, sample, data, key, num_tasks):
    """Task by task on the host, with keys made as the documentation says."""
    predict, sample = jax.jit(predict), jax.jit(sample)
    accuracies = []
    for i in range(num_tasks):
        episode_key, predict_key = jax.random.split(jax.random.fold_in(key, i))
        episode = sample(episode_key, data)
        logits = predict(params, episode.support, episode.query[0], predict_key)
        predicted = np.asarray(logits).argmax(-1)
        accuracies.append(np.mean(predicted == np.asarray(episode.query[1]), axis=-1))
    return np.array(accuracies)


@pytest.fixture(scope="module")
def reference(data):
    """A learner and its accuracies on 13 tasks, `(13, 3)`: before and after each of two steps."""
    args = (maml_of_a_linear_model(every_step=True), initial_params(), SAMPLE, data)
    return args, reference_accuracies(*args, jax.random.key(3), 13)


# 13 tasks divide by none of these, and so show that filling up and dropping is right as well. The
# inner gradients of replicated parameters must stay on their own device.
@pytest.mark.parametrize(("num_devices", "chunk"), [(1, 1), (2, 3), (8, 1)])
def test_equals_a_loop_over_tasks_at_every_step(reference, num_devices, chunk):
    args, expected = reference
    devices = jax.devices()[:num_devices]
    assert len(devices) == num_devices, "tests/conftest.py makes eight, before JAX starts"
    accuracy = evaluate_few_shot(
        *args, key=jax.random.key(3), num_tasks=13, chunk=chunk, devices=devices
    )
    np.testing.assert_allclose(accuracy.per_task, expected, atol=1e-6)
    np.testing.assert_allclose(accuracy.mean, expected.mean(0), atol=1e-6)
    assert len({tuple(steps) for steps in expected}) > 2


def test_prediction_noise_depends_on_the_key_of_the_task_alone(data):
    args = (noisy_predict, initial_params(), SAMPLE, data)
    few, many = (evaluate_few_shot(*args, key=jax.random.key(3), num_tasks=n) for n in (5, 9))
    np.testing.assert_array_equal(few.per_task, many.per_task[:5])
    other = evaluate_few_shot(*args, key=jax.random.key(4), num_tasks=9)
    assert np.any(other.per_task != many.per_task)


@pytest.mark.slow
def test_two_learners_see_the_same_episodes(data):
    def fingerprint(params, support, inputs, key):
        """Logits by which query `i` is right exactly if the inputs' sum is above a threshold."""
        right = (support[0].sum() + inputs.sum()) > params
        return jnp.where(right, jnp.eye(WAYS)[jnp.repeat(jnp.arange(WAYS), 3)], -jnp.inf)

    def same_with_noise(params, support, inputs, key):
        return fingerprint(params, support, inputs, key) + jax.random.uniform(key) * 0

    first, second = (
        evaluate_few_shot(
            predict, jnp.float32(0), SAMPLE, data, key=jax.random.key(0), num_tasks=40
        )
        for predict in (fingerprint, same_with_noise)
    )
    np.testing.assert_array_equal(first.per_task, second.per_task)
    assert 0 < first.mean < 1


def test_is_traced_once_for_new_params_and_key(data):
    traces = []

    def predict(params, support, inputs, key):
        traces.append(None)
        return inputs @ params

    for seed in range(3):
        params = initial_params() + seed
        evaluate_few_shot(predict, params, SAMPLE, data, key=jax.random.key(seed), num_tasks=4)
    assert len(traces) == 1


def test_keeps_the_pytree_of_the_predictions(data):
    modes = both_modes(lambda params, inputs, num_reference=None: linear(params, inputs))
    accuracy = evaluate_few_shot(
        maml_of_a_linear_model(modes, every_step=True),
        initial_params(),
        SAMPLE,
        data,
        key=jax.random.key(0),
        num_tasks=6,
    )
    assert set(accuracy) == {"transductive", "inductive"}
    for of_mode in accuracy.values():
        assert of_mode.mean.shape == of_mode.interval.shape == (3,)
        assert of_mode.per_task.shape == (6, 3)


def test_nan_logits_count_as_wrong(data):
    def predict(params, support, inputs, key):
        logits = jax.nn.one_hot(jnp.repeat(jnp.arange(WAYS), 3), WAYS)
        return logits.at[0].set(jnp.nan).at[1, 2].set(-jnp.inf)

    accuracy = evaluate_few_shot(predict, (), SAMPLE, data, key=jax.random.key(0), num_tasks=2)
    np.testing.assert_allclose(accuracy.per_task, 8 / 9, rtol=1e-6)


def an_image_episode():
    keys = jax.random.split(jax.random.key(0), 2)
    support = jax.random.normal(keys[0], (5, 16, 16, 1))
    query = 1 + 2 * jax.random.normal(keys[1], (6, 16, 16, 1))
    return Episode((support, jnp.arange(5)), (query, jnp.arange(6) % 5))


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_only_transductive_answers_with_batch_norm_depend_on_the_other_queries(norm):
    net = Conv4(5, num_filters=16, norm=norm)
    support, (images, _) = an_image_episode()
    params = jax.jit(net.init)(jax.random.key(1), images)
    predict_fn = jax.jit(both_modes(net.apply))
    before = predict_fn(params, support, images)
    after = predict_fn(params, support, images.at[1:].set(-images[:-1]))
    changes = jax.tree.map(lambda a, b: np.abs(a - b).max(axis=-1), before, after)
    assert changes["inductive"].shape == (6,)
    assert changes["inductive"][0] < 1e-6
    assert changes["inductive"][1:].min() > 1e-3
    if norm == "batch":
        assert changes["transductive"][0] > 1e-3
    else:
        assert changes["transductive"][0] < 1e-6
        np.testing.assert_allclose(before["transductive"], before["inductive"], atol=1e-5)


def test_each_mode_alone_answers_as_both_do():
    def apply(params, inputs, num_reference=None):
        return (inputs - inputs[:num_reference].mean(0)) @ params

    support, inputs = (jnp.arange(12.0).reshape(3, 4), jnp.arange(3)), jnp.ones((2, 4))
    arguments = (initial_params(), support, inputs)
    both = both_modes(apply)(*arguments)
    np.testing.assert_array_equal(both["transductive"], transductive(apply)(*arguments))
    np.testing.assert_array_equal(both["inductive"], inductive(apply)(*arguments))
    # The support's mean is (4, 5, 6, 7), the queries' (1, 1, 1, 1).
    np.testing.assert_array_equal(both["transductive"], np.zeros((2, WAYS)))
    expected = (inputs - jnp.array([4.0, 5.0, 6.0, 7.0])) @ initial_params()
    np.testing.assert_allclose(both["inductive"], expected, rtol=1e-5)


def test_rejects_what_gives_no_figure(data):
    args = (noisy_predict, initial_params(), SAMPLE, data)
    with pytest.raises(ValueError, match="num_tasks is 1; an interval needs 2"):
        evaluate_few_shot(*args, key=jax.random.key(0), num_tasks=1)
    with pytest.raises(ValueError, match="chunk is 0"):
        evaluate_few_shot(*args, key=jax.random.key(0), chunk=0)

    def transposed(params, support, inputs, key):
        return (inputs @ params).T

    with pytest.raises(ValueError, match=r"shape \(3, 9\) for 9 queries; .* \(..., 9, ways\)"):
        evaluate_few_shot(transposed, *args[1:], key=jax.random.key(0), num_tasks=2)
