"""Runs that are stopped, killed, damaged or fail, and their resumption."""

import os
import random
import re
import shutil
import signal
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
from toy_run import (
    KEY,
    NUM_STEPS,
    OPTIMIZER,
    PARAMS,
    assert_same,
    calling,
    fail,
    fresh,
    lines,
    loss_fn,
    run,
    sample,
)

from metagen_jax.errors import TrainingError, TrainingInterrupted, UserError
from metagen_jax.gradients import gradients
from metagen_jax.runs.checkpoints import LATEST, load_params, saved_steps
from metagen_jax.training import init_state, train_step

pytest.importorskip("orbax.checkpoint")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has interrupted, and its folder."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    return run(run_dir), run_dir


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
import toy_run as t
from pathlib import Path
def slow(state, data):
    time.sleep(0.002)
    return t.STEP(state, data)
t.run(Path(sys.argv[1]), step_fn=slow, num_steps=250, resume=True, save_every=3)
"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    tests = Path(__file__).parents[1]
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
    assert saved_steps(killed / LATEST)[-1] < 250
    again = run(killed, num_steps=250, resume=True)
    result = run(whole, num_steps=250, save_every=1000)
    assert lines(killed) == lines(whole)
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


def test_a_run_that_failed_before_its_first_line_can_be_started_again(tmp_path):
    with pytest.raises(RuntimeError):
        run(tmp_path, step_fn=calling(1, fail))
    run(tmp_path)
