"""The sinusoid experiment, end to end on little and piece by piece."""

import contextlib
import dataclasses
import io
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


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_shots": 0}, "num_shots is 0; give 1 or more"),
        ({"num_queries": 0}, "num_queries is 0; give 1 or more"),
        ({"num_tasks": 0}, "num_tasks is 0; give 1 or more"),
        ({"test_shots": 0}, "test_shots is 0; give 1 or more"),
        ({"steps": 0}, "steps is 0; give 1 or more"),
        ({"inner_steps": -1}, "inner_steps is -1; give 1 or more"),
        ({"test_steps": 0}, "test_steps is 0; give 1 or more"),
        ({"num_validation_tasks": 0}, "num_validation_tasks is 0; give 2 or more"),
        ({"num_test_tasks": 0}, "num_test_tasks is 0; give 2 or more"),
        ({"num_test_tasks": 1}, "num_test_tasks is 1; give 2 or more"),
        ({"inner_rate": 0.0}, "inner_rate is 0.0; give more than 0"),
        ({"outer_rate": float("nan")}, "outer_rate is nan; give more than 0"),
        ({"hidden_sizes": (40, 0)}, "hidden_sizes is (40, 0); give 1 or more units"),
    ],
)
def test_settings_that_would_fail_or_make_no_sense_are_refused_before_training(settings, says):
    with pytest.raises(UserError) as raised:
        sinusoid.main(dataclasses.replace(TINY, **settings))
    assert says in str(raised.value)


@pytest.mark.parametrize("preset", sinusoid.PRESETS)
def test_presets_are_settings_that_make_sense(preset):
    sinusoid.check(sinusoid.PRESETS[preset])


def test_the_least_settings_make_sense():
    least = {"steps": 1, "inner_steps": 1, "test_steps": 1, "num_tasks": 1, "num_test_tasks": 2}
    sinusoid.check(dataclasses.replace(TINY, hidden_sizes=(), **least))


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
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        numbers = sinusoid.main(config)
    return config, numbers, printed.getvalue()


@pytest.mark.slow
def test_the_experiment_gives_an_error_with_interval_for_each_network_and_step(result):
    _, numbers, _ = result
    for name, steps in {"maml": 2, "pretrained": 2, "oracle": 0}.items():
        for step in range(steps + 1):
            assert numbers[f"{name}_mse_after_{step}"] > 0
            assert numbers[f"{name}_interval_after_{step}"] > 0
    assert "oracle_mse_after_1" not in numbers
    assert numbers["num_tasks"] == 7
    assert numbers["pretrained_rate"] in sinusoid.PRETRAINED_RATES
    json.dumps(numbers)


@pytest.mark.slow
def test_the_experiment_names_each_network_before_its_training_and_its_picture_at_the_end(result):
    config, _, printed = result
    lines = printed.splitlines()
    for line, word in zip(lines[:3], ("MAML", "pretraining", "oracle"), strict=True):
        assert word in line
    assert lines[-1] == f"the picture is {config.run_dir / 'sinusoid.png'}"
    assert (config.run_dir / "sinusoid.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_finished_experiment_gives_the_same_numbers_again_when_resumed(result):
    config, numbers, _ = result
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
def test_a_short_training_already_adapts_where_a_pretrained_network_cannot(tmp_path):
    config = dataclasses.replace(
        sinusoid.PRESETS["default"],
        steps=4000,
        outer_rate=3e-3,
        num_devices=1,
        run_dir=tmp_path,
    )
    numbers = sinusoid.main(config)
    # Seed 0 gave 0.969 ± 0.033 and 0.516 ± 0.022, the whole training 0.657 and 0.231.
    for step, bound in ((1, 1.2), (10, 0.6)):
        mean, interval = (numbers[f"maml_{what}_after_{step}"] for what in ("mse", "interval"))
        assert mean + interval < bound
    assert numbers["pretrained_mse_after_10"] > 2
    assert numbers["oracle_mse_after_0"] < 0.1
