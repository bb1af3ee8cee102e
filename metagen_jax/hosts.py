"""Runs of several processes: how they find one another, and how one notices that another has gone.

Each host runs the same program, from the same seeds, with the same `run_dir` on a disk that all of
them see:

    start_hosts()                      # before anything else of JAX
    grad_fn = data_parallel(...)       # over the devices of all hosts
    fit(..., run_dir=run_dir, resume=True, step_deadline=300)

All end in an error soon after one of them has died or hangs, so that whatever has started them can
start them again; each then resumes from the checkpoint that process 0 wrote last.

    one node with several GPUs   nothing to do: one process sees all of them
    a TPU pod slice              python train.py on every worker, `start_hosts()` as it stands
    SLURM                        srun python train.py with one task for each GPU, likewise; with
                                 --kill-on-bad-exit=1 a job ends as soon as one process does
    elsewhere                    start_hosts("host0:1234", num_processes, process_id)

What says how many there are, on TPUs, SLURM, Open MPI and Kubernetes, is read by
`jax.distributed.initialize`.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from metagen_jax.errors import UserError

EXIT_STATUS = 75
"""Of a process that ended because a step took too long: a failure that may pass (EX_TEMPFAIL)."""


def start_hosts(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    seconds_to_notice: int = 10,
) -> None:
    """Joins this process to the others of the run; to be called before anything else of JAX.

    Args:
      coordinator: `"host:port"` of process 0; None where the cluster tells.
      num_processes: of the run; None where the cluster tells.
      process_id: of this process, from 0; None where the cluster tells.
      seconds_to_notice: after so long without a sign of life a process counts as dead, and so long
        one that ends waits for the others. JAX alone would wait for minutes.

    Raises:
      UserError: for less than 1 second, or if the processes don't find one another.
    """
    if seconds_to_notice < 1:
        raise UserError(f"seconds_to_notice is {seconds_to_notice}; give 1 or more")
    # CPUs of several processes speak by gloo or not at all; no other device minds.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=seconds_to_notice,
            shutdown_timeout_seconds=seconds_to_notice,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of the run don't find one another ({error}); call start_hosts before "
            'anything else of JAX, on every host, with the same coordinator="host0:port" and '
            "num_processes where no TPU pod, SLURM or MPI tells them"
        ) from error


@contextmanager
def deadline(seconds: float | None, describe: Callable[[], str]) -> Iterator[None]:
    """Ends this process if the body takes longer: a collective can't be interrupted otherwise.

    Args:
      seconds: None waits for ever.
      describe: gives the line to leave on stderr, at once: it must wait for no disk or peer.
    """
    if seconds is None:
        yield
        return

    def end() -> None:
        try:
            os.write(2, f"\nerror: {describe()}\n".encode())
            sys.stderr.flush()
        finally:
            # No exit handlers: they would wait for the process that hangs.
            os._exit(EXIT_STATUS)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
