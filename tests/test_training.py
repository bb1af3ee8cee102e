"""The compiled step and the loop around it."""

import contextlib
import re
import struct
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_run import (
    DATA,
    KEY,
    NUM_STEPS,
    OPTIMIZER,
    PARAMS,
    STEP,
    assert_same,
    calling,
    fail,
    fresh,
    lines,
    loss_fn,
    run,
    sample,
    validate,
)

from metagen_jax.gradients import gradients
from metagen_jax.runs.checkpoints import BEST, load_params, saved_steps
from metagen_jax.training import init_state, train_step

pytest.importorskip("orbax.checkpoint")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has interrupted, and its folder."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    return run(run_dir), run_dir


def test_a_step_is_the_update_of_a_plain_loop():
    state = init_state(PARAMS, optax.sgd(0.1), KEY)
    step = train_step(gradients(loss_fn), optax.sgd(0.1), sample)
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    params = PARAMS
    for i in range(3):
        state, metrics = step(state, DATA)
        sample_key, grad_key = jax.random.split(jax.random.fold_in(KEY, i))
        (loss, _), grads = value_and_grad(params, sample(sample_key, DATA), grad_key)
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
        np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-6)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), state.params, params)
    assert int(state.step) == 3


def test_every_task_comes_with_the_values_of_the_schedule():
    def grad_fn(params, batch, key):
        (inputs, _), weights = batch
        assert weights["half"].shape == (len(inputs),)
        assert weights["pair"].shape == (len(inputs), 2)
        return jax.tree.map(jnp.ones_like, params), {"loss": weights["half"].sum()}

    def schedule(step):
        return {"half": step / 2, "pair": jnp.stack([step, -step])}

    step = train_step(grad_fn, optax.sgd(0.1), sample, schedule=schedule)
    state = init_state(PARAMS, optax.sgd(0.1), KEY)
    for i in range(3):
        state, metrics = step(state, DATA)
        assert metrics["loss"] == len(sample(KEY, DATA)[0]) * i / 2


def test_slow_leaves_follow_the_update_with_a_key_of_their_own():
    def grad_fn(params, batch, key):
        return {"fast": jnp.ones(2), "slow": jnp.zeros(2)}, {"key": jax.random.uniform(key)}

    def update_slow(params, batch, key):
        slow = params["slow"] + params["fast"] + len(batch[0]) + jax.random.uniform(key)
        return {**params, "slow": slow}

    step = train_step(grad_fn, optax.sgd(0.5), sample, update_slow=update_slow)
    state = init_state({"fast": jnp.zeros(2), "slow": jnp.zeros(2)}, optax.sgd(0.5), KEY)
    slow = 0.0
    for i in range(2):
        state, metrics = step(state, DATA)
        key = jax.random.fold_in(jax.random.fold_in(KEY, i), 2)
        slow += -0.5 * (i + 1) + len(sample(KEY, DATA)[0]) + jax.random.uniform(key)
        assert metrics["key"] != jax.random.uniform(key)
        np.testing.assert_allclose(state.params["slow"], slow, rtol=1e-6)
        np.testing.assert_allclose(state.params["fast"], -0.5 * (i + 1))


def test_donation_leaves_the_arrays_of_the_caller_alone():
    params = {"a": jnp.ones(3), "tied": None, "number": 2.0}
    params["tied"] = params["a"]
    keeps_params = optax.GradientTransformation(lambda p: p, lambda g, s, p=None: (g, s))
    key = jax.random.key(0)

    def total(params, batch, key):
        return params["a"].sum() * params["number"] + params["tied"].sum() + batch.sum(), {}

    step = train_step(gradients(total), keeps_params, lambda key, data: data)
    data = jnp.ones(2)
    state = init_state(params, keeps_params, key)
    for _ in range(2):
        state, _ = step(state, data)
    np.testing.assert_array_equal(params["a"], np.ones(3))
    np.testing.assert_array_equal(data, np.ones(2))
    assert jax.random.key_data(key).shape == (2,)


def test_the_step_is_compiled_once_whatever_the_first_parameters_were():
    traces = []

    def counted(params, batch, key):
        traces.append(1)
        return params["number"] ** 2 + params["array"].sum() * batch.sum(), {}

    step = train_step(gradients(counted), OPTIMIZER, lambda key, data: data)
    params = {"number": 1.5, "array": np.ones(2, np.float32)}
    state = init_state(params, OPTIMIZER, KEY)
    for _ in range(3):
        state, _ = step(state, DATA[0])
    assert len(traces) == 1


def test_fit_takes_the_same_steps_as_a_bare_loop(whole):
    state = fresh()
    for _ in range(NUM_STEPS):
        state, _ = STEP(state, DATA)
    assert_same(whole[0].state, state)


def test_fit_without_a_run_dir_keeps_nothing_and_gives_the_same(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(None)
    assert_same(result.state, whole[0].state)
    assert_same(result.best_params, whole[0].best_params)
    assert list(tmp_path.iterdir()) == []


def test_lines_hold_the_means_of_each_interval_and_the_validations(whole):
    state, losses = fresh(), []
    for _ in range(NUM_STEPS):
        state, metrics = STEP(state, DATA)
        losses.append(float(metrics["loss"]))
    train = [line for line in lines(whole[1]) if "loss" in line]
    validations = [line for line in lines(whole[1]) if "validation_loss" in line]
    assert [line["step"] for line in train] == [4, 8, 12, 16, 20]
    means = np.reshape(losses, (5, 4)).mean(1)
    np.testing.assert_allclose([line["loss"] for line in train], means, rtol=1e-12)
    assert {"accuracy", "gradient_norm"} <= train[0].keys()
    assert [line["step"] for line in validations] == [6, 12, 18, 20]
    assert validations[-1]["validation_accuracy"] == float(state.params["bias"])


def test_tensorboard_gets_the_same_numbers(whole):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    (file,) = whole[1].glob("events.out.tfevents.*")
    data, scalars = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[16 + length :]
    expected = {
        (line["step"], "train/loss" if name == "loss" else "validation/loss"): line[name]
        for line in lines(whole[1])
        for name in ("loss", "validation_loss")
        if name in line
    }
    written = {(step, tag): value for step, tag, value in scalars if tag.endswith("/loss")}
    assert written.keys() == expected.keys()
    for place, value in expected.items():
        assert written[place] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("direction", "numbers", "best"),
    [("max", [1, 3, 2, 3], 12), ("min", [2, 1, float("nan"), 0], 20), ("max", [4, 3, 2, 1], 6)],
)
def test_the_best_parameters_are_kept(tmp_path, direction, numbers, best):
    steps, seen = (6, 12, 18, 20), {}

    def scripted(params):
        step = steps[len(seen)]
        seen[step] = jax.tree.map(jnp.copy, params)
        return {"score": numbers[steps.index(step)]}

    result = run(tmp_path, validate=scripted, best_metric=("score", direction))
    assert result.best_step == best
    assert result.best_validation == {"score": numbers[steps.index(best)]}
    assert_same(result.best_params, seen[best])
    assert_same(load_params(tmp_path, PARAMS), seen[best])
    assert saved_steps(tmp_path / BEST)[-1] == best


def test_without_validation_the_last_parameters_are_the_best(tmp_path):
    result = run(tmp_path, validate=None)
    assert_same(result.best_params, result.state.params)
    assert_same(load_params(tmp_path, PARAMS), result.state.params)
    assert (result.best_step, result.best_validation) == (NUM_STEPS, {})


def test_seconds_add_up_over_resumptions_and_leave_validation_out(tmp_path):
    def slow_validate(params):
        time.sleep(0.2)
        return validate(params)

    with contextlib.suppress(RuntimeError):
        run(tmp_path, step_fn=calling(13, fail), validate=slow_validate)
    kept = lines(tmp_path, but=())[-1]["train_seconds"]
    start = time.perf_counter()
    result = run(tmp_path, resume=True, validate=slow_validate)
    wall = time.perf_counter() - start
    assert result.validation_seconds >= 0.8
    assert kept < result.train_seconds < kept + wall - 0.4
    assert 0 < result.compile_seconds < result.train_seconds
    timed = result.train_seconds - result.compile_seconds
    assert result.steps_per_second == pytest.approx(18 / timed)


def test_progress_off_a_terminal_is_plain_lines(tmp_path, capsys):
    run(tmp_path, progress=True, tasks_per_step=32)
    out, err = capsys.readouterr()
    assert out == ""
    shown = err.splitlines()
    assert shown[0] == "compiling the first step ..."
    assert re.fullmatch(r"step 1/20  loss \S+  accuracy \S+ %", shown[1])
    assert any(re.match(r"step 6/20  validation: loss .*\(best so far\)", line) for line in shown)
    assert re.search(r"step 20/20  .*tasks/s  0:\d\d in all", err)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", err)


def test_no_progress_is_silence(tmp_path, capfd):
    run(tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["num_steps", "validate_every", "log_every", "save_every"])
def test_options_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0; give 1 or more"):
        run(None, **{name: 0})


@pytest.mark.usefixtures("ill_typed")
def test_options_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="best_metric is 'f1' and validate gives"):
        run(None, best_metric=("f1", "max"))
    with pytest.raises(ValueError, match=r"best_metric is .*highest"):
        run(None, best_metric=("accuracy", "highest"))
    with pytest.raises(ValueError, match="resume is True without a run_dir"):
        run(None, resume=True)

    def vector(params, batch, key):
        return loss_fn(params, batch, key)[0], {"each": batch[1]}

    with pytest.raises(ValueError, match=r"metric 'each' has shape \(8,\); give scalars"):
        run(None, step_fn=train_step(gradients(vector), OPTIMIZER, sample))
