"""Two processes with a device each, as two hosts have, take the steps that one process takes."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from metagen_jax import hosts
from metagen_jax.errors import UserError
from metagen_jax.hosts import EXIT_STATUS, deadline, start_hosts
from metagen_jax.runs.checkpoints import LATEST, saved_steps

SECONDS_TO_NOTICE = 10
# Of a process that is left behind: it may notice late, and then waits for the others at its end.
SECONDS_TO_END = 3 * SECONDS_TO_NOTICE
NUM_STEPS = 10

needs_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="makes two CPU devices of one machine"
)


def start(num_processes, run_dir, *, failing=None, **settings):
    """Starts the processes of a run; the one numbered `failing` alone gets `fails_at`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = dict(
        num_processes=num_processes,
        port=port,
        run_dir=str(run_dir),
        num_steps=NUM_STEPS,
        seconds_to_notice=SECONDS_TO_NOTICE,
        **settings,
    )
    program = Path(__file__).with_name("host_run.py")
    processes = []
    for index in range(num_processes):
        own = {**common, "index": index}
        # Its own deadline would end the one that hangs as well.
        own.pop("step_deadline" if index == failing else "fails_at", None)
        processes.append(
            subprocess.Popen(
                [sys.executable, str(program), json.dumps(own)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def finish(processes):
    """What each process prints at its end."""
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    errors = "\n".join(error for _, error in outputs)
    assert [process.returncode for process in processes] == [0] * len(processes), errors
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def last_loss(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["step"] == NUM_STEPS][-1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Parameters and last loss of one process with two devices."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    (result,) = finish(start(1, run_dir))
    return {**result, "loss": last_loss(run_dir)}


def assert_as_alone(results, run_dir, alone):
    first, second = results
    assert first == second
    np.testing.assert_allclose(first["params"], alone["params"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(last_loss(run_dir), alone["loss"], rtol=1e-6)


@pytest.mark.slow
@needs_cpu
def test_two_processes_take_the_steps_of_one(alone, tmp_path):
    assert_as_alone(finish(start(2, tmp_path / "run")), tmp_path / "run", alone)


@pytest.mark.slow
@needs_cpu
@pytest.mark.parametrize("failing", [0, 1])
def test_a_killed_process_ends_the_other_and_both_resume(alone, tmp_path, failing):
    run_dir = tmp_path / "run"
    processes = start(2, run_dir, failing=failing, fails_at=8, fails_by="dying")
    survivor = processes[1 - failing]
    try:
        assert processes[failing].wait(timeout=300) == -9
        died = time.monotonic()
        _, error = survivor.communicate(timeout=300)
        seconds = time.monotonic() - died
    finally:
        survivor.kill()
    assert seconds < SECONDS_TO_END
    assert survivor.returncode != 0
    # Without its coordinator JAX ends a process by itself, if it notices before the step does.
    assert "another of the 2 processes has gone" in error or failing == 0, error
    assert saved_steps(run_dir / LATEST)[-1] == 6
    assert_as_alone(finish(start(2, run_dir, resume=True)), run_dir, alone)


@pytest.mark.slow
@needs_cpu
def test_a_process_that_hangs_ends_the_other_at_its_deadline_and_both_resume(alone, tmp_path):
    run_dir = tmp_path / "run"
    processes = start(
        2, run_dir, failing=1, fails_at=8, fails_by="hanging", step_deadline=SECONDS_TO_NOTICE
    )
    waiting, hanging = processes
    try:
        _, error = waiting.communicate(timeout=300)
    finally:
        hanging.kill()
        waiting.kill()
    assert waiting.returncode == EXIT_STATUS, error
    assert "takes more than 10 s; the checkpoint of step 6 is kept; start all" in error
    assert_as_alone(finish(start(2, run_dir, resume=True)), run_dir, alone)


@pytest.fixture
def ended(monkeypatch):
    """The status with which this process would have ended."""
    statuses = []
    monkeypatch.setattr(hosts.os, "_exit", statuses.append)
    return statuses


def test_a_deadline_ends_the_process_with_a_line_that_says_why(ended, capfd):
    with deadline(0.05, lambda: "step 3 takes more than 0.05 s"):
        time.sleep(0.5)
    assert ended == [EXIT_STATUS]
    assert "error: step 3 takes more than 0.05 s\n" in capfd.readouterr().err


@pytest.mark.parametrize("seconds", [None, 0.2])
def test_a_deadline_that_is_kept_does_nothing(ended, seconds):
    with deadline(seconds, lambda: "late"):
        pass
    with pytest.raises(ZeroDivisionError), deadline(seconds, lambda: "late"):
        raise ZeroDivisionError
    time.sleep(0.4)
    assert ended == []


def test_hosts_that_are_not_told_of_one_another_are_refused():
    with pytest.raises(UserError, match="seconds_to_notice is 0; give 1 or more"):
        start_hosts("localhost:1", 1, 0, seconds_to_notice=0)
    # JAX has started long ago.
    with pytest.raises(UserError, match="call start_hosts before anything else of JAX"):
        start_hosts("localhost:1", 1, 0)
