"""The numbers of a run on disk: JSON lines and TensorBoard events."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any, Literal

from metagen_jax.errors import import_extra, writing

METRICS = "metrics.jsonl"

# Flushing events waits for the disk, some 10 ms.
_FLUSH_SECONDS = 10.0


class RunLog:
    """`metrics.jsonl`, an object a line, and `events.out.tfevents.*`, which lag by some seconds.

    A line of training is `{"step": 40, "train_seconds": 12.1, "loss": ..., ...}`, one of validation
    has names such as `validation_loss`. A resumed run first drops the lines after its checkpoint
    and whatever a kill has cut; TensorBoard is told to do the same.
    """

    def __init__(self, run_dir: Path, *, start_step: int):
        # Not tensorboardX's usual writer: it pickles every event into the queue of a thread, and
        # waits for ever once that thread has met a full disk.
        writer = import_extra("tensorboardX.event_file_writer")
        self._protos = import_extra("tensorboardX.proto.event_pb2")
        self._scalar = import_extra("tensorboardX.summary").scalar
        self._path = run_dir / METRICS
        with writing(self._path):
            run_dir.mkdir(parents=True, exist_ok=True)
            self._lines = open(self._path, "ab")  # noqa: SIM115, closed in __exit__
            self._lines.truncate(_end_of_step(self._path, start_step))
            self._events = writer.EventsWriter(str(run_dir / "events"), f".{start_step}")
            session = self._protos.SessionLog(status=self._protos.SessionLog.START)
            self._add_event(start_step + 1, session_log=session)
            self._flush_events()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with writing(self._path):
            self._lines.close()
            self._events.close()

    def write(
        self,
        step: int,
        numbers: dict[str, float],
        *,
        train_seconds: float,
        kind: Literal["train", "validation"],
    ) -> None:
        """Adds a line, in which a number that isn't finite is null, and its events."""
        line: dict[str, Any] = {"step": step, "train_seconds": round(train_seconds, 3)}
        prefix = "" if kind == "train" else f"{kind}_"
        for name, value in numbers.items():
            line[prefix + name] = value if math.isfinite(value) else None
        with writing(self._path):
            self._lines.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            self._lines.flush()
            for name, value in numbers.items():
                self._add_event(step, summary=self._scalar(f"{kind}/{name}", value))
            if time.perf_counter() - self._last_flush > _FLUSH_SECONDS:
                self._flush_events()

    def sync(self) -> None:
        """Has everything on the disk, before a checkpoint that counts on it."""
        with writing(self._path):
            os.fsync(self._lines.fileno())
            self._flush_events()

    def _flush_events(self) -> None:
        self._events.flush()
        self._last_flush = time.perf_counter()

    def _add_event(self, step: int, **content: Any) -> None:
        event = self._protos.Event(wall_time=time.time(), step=step, **content)
        self._events.write_event(event)


def has_log(run_dir: Path) -> bool:
    """Whether a run in this folder has got so far as to write a line."""
    path = run_dir / METRICS
    return path.exists() and path.stat().st_size > 0


def read_metrics(run_dir: Path, **also: str) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`.

    Args:
      run_dir: folder of the run.
      also: a second name for a number, in the lines that have it; `loss="generator_loss"` gives
        what is called `generator_loss` the name `loss` as well.
    """
    lines = (run_dir / METRICS).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [x | {new: x[old] for new, old in also.items() if old in x} for x in records]


def _end_of_step(path: Path, step: int) -> int:
    """The number of bytes of the whole lines up to and including a step."""
    end = 0
    with open(path, "rb") as lines:
        for line in lines:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            end += len(line)
    return end
