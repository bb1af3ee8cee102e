"""The sinusoid experiment, end to end on little and piece by piece."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import sinusoid
from metagen_jax.data.sinusoid import sample_sinusoid_task
from metagen_jax.errors import UserError
from metagen_jax.evaluation.estimates import estimate
from metagen_jax.nets.mlp import MLP

TINY = dataclasses.replace(
    sinusoid.PRESETS["smoke"],
    hidden_sizes=(4,),
    steps=4,
    num_tasks=2,
    num_validation_tasks=3,
    num_test_tasks=7,
    test_steps=2,
)


def sgd_in_numpy(params, x, y, rate):
    """One step of gradient descent on the mean squared error of a net with one hidden layer."""
    w, b = params["hidden0"]["kernel"], params["hidden0"]["bias"]
    v, c = params["head"]["kernel"], params["head"]["bias"]
    before = x @ w + b
    hidden = np.maximum(before, 0)
    delta = 2 * (hidden @ v + c - y) / len(x)
    back = (delta @ v.T) * (before > 0)
    return {
        "hidden0": {"kernel": w - rate * x.T @ back, "bias": b - rate * back.sum(0)},
        "head": {"kernel": v - rate * hidden.T @ delta, "bias": c - rate * delta.sum(0)},
    }


def test_errors_after_each_step_equal_gradient_descent_written_out():
    net = MLP((8,), 1)
    variables = net.init(jax.random.key(0), jnp.zeros((1, 1)))
    keys = jax.random.split(jax.random.key(1), 3)
    tasks = jax.vmap(lambda key: sample_sinusoid_task(key, num_shots=5, num_queries=20))(keys)
    errors = sinusoid.squared_errors(net, variables, tasks.episode, 0.01, num_steps=3)
    assert errors.shape == (3, 4)
    for i in range(3):
        task = jax.tree.map(lambda x: np.asarray(x[i], np.float64), tasks)  # noqa: B023
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
        x, y = task.episode.query
        for step in range(4):
            hidden = np.maximum(x @ params["hidden0"]["kernel"] + params["hidden0"]["bias"], 0)
            answer = hidden @ params["head"]["kernel"] + params["head"]["bias"]
            np.testing.assert_allclose(errors[i, step], np.mean((answer - y) ** 2), rtol=1e-4)
            params = sgd_in_numpy(params, *task.episode.support, 0.01)


def test_test_tasks_are_those_of_their_seed_with_even_queries_and_those_of_more_tasks_begin_alike():
    few = sinusoid.sample_test_tasks(TINY, seed=5, num_tasks=3)
    more = sinusoid.sample_test_tasks(TINY, seed=5, num_tasks=6)
    np.testing.assert_array_equal(few.amplitude, more.amplitude[:3])
    np.testing.assert_allclose(few.episode.query[0][1].ravel(), np.linspace(-5, 5, 100), atol=1e-5)
    others = sinusoid.sample_test_tasks(TINY, seed=6, num_tasks=3)
    assert not np.isin(others.amplitude, more.amplitude).any()


def test_one_diverged_task_makes_the_mean_infinite_not_a_nan_and_only_after_that_step():
    net = MLP((8,), 1)
    variables = net.init(jax.random.key(0), jnp.zeros((1, 1)))
    tasks = sinusoid.sample_test_tasks(TINY, seed=5, num_tasks=4)
    errors = sinusoid.squared_errors(net, variables, tasks.episode, 1e12, num_steps=4)
    curve = estimate(errors)
    assert np.isfinite(curve.mean[0])
    assert curve.mean[-1] == np.inf
    assert curve.interval[-1] == np.inf
    assert not np.isnan(errors).any()


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    config = dataclasses.replace(TINY, run_dir=tmp_path_factory.mktemp("run"))
    return config, sinusoid.main(config)


def test_the_experiment_gives_an_error_with_interval_for_each_network_and_step(result):
    _, numbers = result
    for name, steps in {"maml": 2, "pretrained": 2, "oracle": 0}.items():
        for step in range(steps + 1):
            assert numbers[f"{name}_mse_after_{step}"] > 0
            assert numbers[f"{name}_interval_after_{step}"] > 0
    assert "oracle_mse_after_1" not in numbers
    assert numbers["num_tasks"] == 7
    assert numbers["pretrained_rate"] in sinusoid.PRETRAINED_RATES
    json.dumps(numbers)


def test_the_experiment_draws_its_figure(result):
    config, _ = result
    assert (config.run_dir / "sinusoid.png").stat().st_size > 10_000


def test_a_finished_experiment_gives_the_same_numbers_again_when_resumed(result):
    config, numbers = result
    again = sinusoid.main(dataclasses.replace(config, resume=True))
    measured = {name for name in numbers if "mse" in name or "interval" in name}
    assert {name: again[name] for name in measured} == {name: numbers[name] for name in measured}


def test_tasks_that_the_devices_do_not_divide_are_a_user_error(tmp_path):
    config = dataclasses.replace(TINY, num_tasks=3, num_devices=2, run_dir=tmp_path)
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    with pytest.raises(UserError, match="3 tasks cannot be split evenly over 2 devices"):
        sinusoid.main(config)


@pytest.mark.slow
def test_the_mean_errors_of_maml_reach_the_published_ones(tmp_path):
    config = dataclasses.replace(sinusoid.PRESETS["default"], run_dir=tmp_path)
    numbers = sinusoid.main(config)
    assert numbers["maml_mse_after_1"] < 0.67
    assert numbers["maml_mse_after_10"] < 0.35
    assert numbers["pretrained_mse_after_10"] > 1
    assert numbers["oracle_mse_after_0"] < 0.1
