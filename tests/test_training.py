"""The compiled step and the loop around it."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagen_jax.errors import TrainingError, TrainingInterrupted, UserError
from metagen_jax.gradients import gradients
from metagen_jax.runs.checkpoints import BEST, LATEST, load_params, saved_steps
from metagen_jax.training import fit, init_state, train_step

pytest.importorskip("orbax.checkpoint")

KEY = jax.random.key(3)
DATA = (
    np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32),
    np.random.default_rng(1).normal(size=40).astype(np.float32),
)
PARAMS = {"weight": jnp.ones(3), "bias": jnp.zeros(())}
OPTIMIZER = optax.adam(0.05)
NUM_STEPS = 20


def loss_fn(params, batch, key):
    inputs, targets = batch
    noise = 0.1 * jax.random.normal(key, targets.shape)
    errors = inputs @ params["weight"] + params["bias"] + noise - targets
    return jnp.mean(errors**2), {"accuracy": jnp.mean(jnp.abs(errors) < 1)}


def sample(key, data):
    chosen = jax.random.randint(key, (8,), 0, len(data[0]))
    return jax.tree.map(lambda x: x[chosen], data)


STEP = train_step(gradients(loss_fn), OPTIMIZER, sample)


def fresh():
    return init_state(PARAMS, OPTIMIZER, KEY)


def validate(params):
    return {"accuracy": float(params["bias"]), "loss": float(loss_fn(params, DATA, KEY)[0])}


def run(run_dir, *, step_fn=STEP, num_steps=NUM_STEPS, **options):
    defaults = dict(validate=validate, validate_every=6, log_every=4, save_every=5, progress=False)
    state = options.pop("state", None) or fresh()
    options = defaults | options
    return fit(step_fn, state, DATA, num_steps=num_steps, run_dir=run_dir, **options)


def calling(when, what):
    """`STEP`, but before the step numbered `when` it calls `what`."""
    count = iter(range(1, 1000))

    def step(state, data):
        if next(count) == when:
            what()
        return STEP(state, data)

    return step


def fail():
    raise RuntimeError("the machine has gone")


def lines(run_dir, *, but=("train_seconds",)):
    text = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in but} for line in text]


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has interrupted, and its folder."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    return run(run_dir), run_dir


def test_a_step_is_the_update_of_a_plain_loop():
    state = init_state(PARAMS, optax.sgd(0.1), KEY)
    step = train_step(gradients(loss_fn), optax.sgd(0.1), sample)
    params = PARAMS
    for i in range(3):
        state, metrics = step(state, DATA)
        sample_key, grad_key = jax.random.split(jax.random.fold_in(KEY, i))
        batch = sample(sample_key, DATA)
        loss, grads = jax.value_and_grad(lambda p: loss_fn(p, batch, grad_key)[0])(params)  # noqa: B023
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
        np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-6)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), state.params, params)
    assert int(state.step) == 3


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


@pytest.mark.parametrize("stop", [2, 7, 13, 20])
def test_a_resumed_run_is_bit_for_bit_one_that_was_not_interrupted(whole, tmp_path, stop):
    with pytest.raises(RuntimeError, match="gone"):
        run(tmp_path, step_fn=calling(stop, fail))
    other = init_state(jax.tree.map(jnp.zeros_like, PARAMS), OPTIMIZER, jax.random.key(9))
    # Before the first checkpoint there is nothing to resume and the run begins with its own state.
    result = run(tmp_path, resume=True, state=other if stop > 5 else fresh())
    assert_same(result.state, whole[0].state)
    assert_same(result.best_params, whole[0].best_params)
    assert result[2:4] == whole[0][2:4]
    assert lines(tmp_path) == lines(whole[1])


def test_a_cut_line_and_later_lines_are_dropped_on_resumption(whole, tmp_path):
    with pytest.raises(RuntimeError):
        run(tmp_path, step_fn=calling(12, fail))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "loss": 1.0}\n{"step": 16, "lo')
    run(tmp_path, resume=True)
    assert lines(tmp_path) == lines(whole[1])


CHILD = """
import sys, time
sys.path[:0] = sys.argv[2:]
import test_training as t
def slow(state, data):
    time.sleep(0.002)
    return t.STEP(state, data)
t.run(t.Path(sys.argv[1]), step_fn=slow, num_steps=150, resume=True, save_every=3)
"""


def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    tests = Path(__file__).parent
    command = [sys.executable, "-c", CHILD, str(killed), str(tests), str(tests.parent)]
    log, moments = killed / "metrics.jsonl", random.Random()
    for reached in (20, 80):
        with subprocess.Popen(command, stderr=subprocess.PIPE) as child:
            while child.poll() is None and not (
                log.exists() and any(f'"step": {reached},' in x for x in open(log))  # noqa: SIM115
            ):
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.3))
            assert child.poll() is None, child.stderr.read().decode()
            os.kill(child.pid, signal.SIGKILL)
    assert saved_steps(killed / LATEST)[-1] < 150
    assert subprocess.run(command).returncode == 0
    result = run(whole, num_steps=150, save_every=1000)
    assert lines(killed) == lines(whole)
    again = run(killed, num_steps=150, resume=True)
    assert_same(again.state, result.state)
    assert_same(again.best_params, result.best_params)
    assert (again.best_step, again.best_validation) == (result.best_step, result.best_validation)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(whole, tmp_path, number, capfd):
    usual = signal.getsignal(number)
    step_fn = calling(9, lambda: os.kill(os.getpid(), number))
    with pytest.raises(TrainingInterrupted, match=r"stopped at step 9 of 20.*--resume"):
        run(tmp_path, step_fn=step_fn)
    assert "stopping after this step" in capfd.readouterr().err
    assert signal.getsignal(number) is usual
    assert saved_steps(tmp_path / LATEST)[-1] == 9
    assert_same(run(tmp_path, resume=True).state, whole[0].state)
    assert lines(tmp_path) == lines(whole[1])


def test_fit_works_outside_the_main_thread(whole):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(None)))
    thread.start()
    thread.join()
    assert_same(results[0].state, whole[0].state)


def _poisoned(where):
    """A step that goes wrong at step 13: in its loss, its gradient or its parameters alone."""

    def grad_fn(params, batch, key):
        direction, metrics = gradients(loss_fn)(params, batch[:2], key)
        bad = jnp.where(batch[2] == 12, jnp.nan, 0.0)
        if where == "loss":
            metrics["loss"] += bad
        elif where == "gradient_norm":
            direction["bias"] += bad
        return direction, metrics

    def update(updates, state, params=None):
        bad = jnp.where(state == 12, jnp.inf, 0.0)
        if where == "parameters":
            updates = jax.tree.map(lambda x: x + bad, updates)
        return jax.tree.map(lambda x: -0.05 * x, updates), state + 1

    optimizer = optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update)
    inner = train_step(grad_fn, optimizer, lambda key, data: (*sample(key, data[:2]), data[2]))

    def step(state, data):
        return inner(state, (*data, jnp.copy(state.step)))

    return step, init_state(PARAMS, optimizer, KEY)


@pytest.mark.parametrize("where", ["loss", "gradient_norm", "parameters"])
@pytest.mark.parametrize("save_every", [5, 13])
def test_what_is_not_finite_stops_the_run_and_is_never_saved(tmp_path, where, save_every):
    step_fn, state = _poisoned(where)
    with pytest.raises(TrainingError) as raised:
        run(tmp_path, step_fn=step_fn, state=state, save_every=save_every)
    message = str(raised.value)
    assert "\n" not in message
    if where == "parameters" and save_every == 5:
        # Nothing shows before the next step's loss.
        assert re.match("loss is (nan|inf) at step 14;", message)
    else:
        assert re.match(rf"(the )?{where} (is nan|are not finite) at step 13;", message)
    steps = saved_steps(tmp_path / LATEST)
    assert f"the checkpoint of step {steps[-1]} is kept" in message
    assert max(steps) < 13
    result = run(tmp_path, state=_poisoned("nowhere")[1], num_steps=1, resume=True)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.state.params))


def test_a_metric_that_is_not_finite_does_not_stop_a_run(tmp_path):
    def with_metric(params, batch, key):
        loss, metrics = loss_fn(params, batch, key)
        return loss, {**metrics, "perplexity": jnp.inf * loss}

    run(tmp_path, step_fn=train_step(gradients(with_metric), OPTIMIZER, sample))
    assert lines(tmp_path)[0]["perplexity"] is None


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(whole, tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    save = ocp.Checkpointer.save

    def fails_late(self, path, *args, **kwargs):
        if path.name == "15":
            unfinished = path.with_name(f"{path.name}.orbax-checkpoint-tmp")
            unfinished.mkdir()
            (unfinished / "half").write_text("...")
            raise ValueError(f"RESOURCE_EXHAUSTED: writing: {os.strerror(28)} [os_error_code='28']")
        return save(self, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "save", fails_late)
        with pytest.raises(UserError, match="no space left on the disk") as raised:
            run(tmp_path)
    assert "\n" not in str(raised.value)
    assert [path.name for path in (tmp_path / LATEST).iterdir() if path.name not in "6 10 12"] == []
    assert_same(run(tmp_path, resume=True).state, whole[0].state)
    assert lines(tmp_path) == lines(whole[1])


def test_a_full_disk_is_one_line_for_the_log_too(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("metagen_jax.runs.log.os.fsync", full)
    with pytest.raises(UserError, match=r"no space left on the disk to write .*metrics.jsonl"):
        run(tmp_path)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(TrainingError, match=r"already holds a run.*--resume.*--run-dir"):
        run(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_checkpoint_of_another_model_names_the_first_difference(tmp_path):
    run(tmp_path)
    wider = init_state({**PARAMS, "weight": jnp.ones(4)}, OPTIMIZER, KEY)
    with pytest.raises(TrainingError, match=r"params/weight is float32\[3\] there, float32\[4\]"):
        run(tmp_path, state=wider, num_steps=30, resume=True)
    more = init_state({**PARAMS, "scale": jnp.ones(4)}, OPTIMIZER, KEY)
    with pytest.raises(TrainingError, match=r"params/scale is absent there, float32\[4\] here"):
        run(tmp_path, state=more, num_steps=30, resume=True)
    with pytest.raises(TrainingError, match=r"opt_state/0/count is int32\[\] there, absent here"):
        run(tmp_path, state=init_state(PARAMS, optax.sgd(0.1), KEY), num_steps=30, resume=True)
    with pytest.raises(TrainingError, match="another model"):
        load_params(tmp_path, {"weight": jnp.ones(3)})


def test_resuming_nothing_starts_from_the_beginning_and_says_so(whole, tmp_path, capsys):
    result = run(tmp_path / "new", resume=True, progress=True)
    assert "holds no checkpoint: starting from the beginning" in capsys.readouterr().err
    assert_same(result.state, whole[0].state)


def test_a_finished_run_is_not_run_again(tmp_path, capsys):
    first = run(tmp_path)
    for num_steps in (NUM_STEPS, 3):
        again = run(tmp_path, num_steps=num_steps, resume=True, step_fn=fail, progress=True)
        assert_same(again.state, first.state)
        assert_same(again.best_params, first.best_params)
        assert again.train_seconds <= first.train_seconds
        assert "nothing is left to do" in capsys.readouterr().err


def test_a_finished_run_can_be_extended(whole, tmp_path):
    run(tmp_path, num_steps=12)
    result = run(tmp_path, resume=True)
    assert_same(result.state, whole[0].state)
    assert lines(tmp_path) == lines(whole[1])


def test_a_damaged_latest_checkpoint_says_so_and_the_one_before_can_be_used(whole, tmp_path):
    with pytest.raises(RuntimeError):
        run(tmp_path, step_fn=calling(19, fail))
    before, newest = saved_steps(tmp_path / LATEST)
    (tmp_path / LATEST / str(newest) / "tree" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(TrainingError, match=f"can't read .*{newest}.*use step {before}") as raised:
        run(tmp_path, resume=True)
    assert "\n" not in str(raised.value)
    assert saved_steps(tmp_path / LATEST) == [before, newest]
    shutil.rmtree(tmp_path / LATEST / str(newest))
    assert_same(run(tmp_path, resume=True).state, whole[0].state)
    assert lines(tmp_path) == lines(whole[1])


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


def test_a_run_that_failed_before_its_first_line_can_be_started_again(tmp_path):
    with pytest.raises(RuntimeError):
        run(tmp_path, step_fn=calling(1, fail))
    run(tmp_path)
