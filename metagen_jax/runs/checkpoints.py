"""Checkpoints of a run: written whole or not at all, read back bit for bit.

    RUN_DIR/checkpoints/latest/STEP    a whole state and what the run remembers beside it
    RUN_DIR/checkpoints/best/STEP      parameters

Orbax writes each under another name and renames it when it is complete, so that a kill or a full
disk leaves those before it as they were. The two newest of each kind are kept: should the newest be
damaged, the run can go on from the one before.
"""

import contextlib
import logging
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.errors import TrainingError, import_extra, one_line, writing
from metagen_jax.types import Params

Tree = TypeVar("Tree")
State = TypeVar("State", bound="RunState")
Folder = str | os.PathLike[str]

LATEST = Path("checkpoints", "latest")
BEST = Path("checkpoints", "best")
"""Where a run keeps its checkpoints, from its run_dir."""

_NUM_KEPT = 2
_SECONDS_TO_SETTLE = 0.5
_UNFINISHED = ".orbax-checkpoint-tmp"


@runtime_checkable
class RunState(Protocol):
    """What a run needs of its state: `metagen_jax.training.TrainState` or the like, a pytree."""

    @property
    def step(self) -> jax.Array: ...
    @property
    def params(self) -> Params: ...


def load_params(run_dir: Folder, like: Params) -> Params:
    """The best parameters that a run of `metagen_jax.training.fit` has kept.

    Args:
      run_dir: of the run.
      like: a tree of the same structure, shapes, dtypes and placement, such as a fresh
        initialisation; its values don't matter.

    Raises:
      TrainingError: the run has kept none yet, they can't be read or are of another model.
    """
    folder = Path(run_dir) / BEST
    steps = saved_steps(folder)
    if not steps:
        raise TrainingError(
            f"{run_dir} holds no best checkpoint; give the run_dir of a run that has validated or "
            "finished"
        )
    return restore_checkpoint(folder / str(steps[-1]), like)[0]


def restore_run(run_dir: Path, state: State) -> tuple[State, Params | None, dict[str, Any]] | None:
    """The latest state of a run, its best parameters as NumPy arrays, and its record.

    Args:
      run_dir: of the run.
      state: as the run began, to say how arrays are placed.

    Returns:
      None if the run has no checkpoint. No parameters if the record has no `best_step`.

    Raises:
      TrainingError: a checkpoint can't be read or is of another model.
    """
    latest, best = run_dir / LATEST, run_dir / BEST
    restored, best_step = None, None
    if steps := saved_steps(latest):
        newest, record = restore_checkpoint(latest / str(steps[-1]), state)
        best_step, best_params = record["best_step"], None
        if best_step is not None:
            best_params = to_host(restore_checkpoint(best / str(best_step), state.params)[0])
        restored = newest, best_params, record
    # Parameters of a later step were kept by a process that was killed before it could say so.
    _remove(best, [step for step in saved_steps(best) if best_step is None or step > best_step])
    return restored


def save_run(
    run_dir: Path, step: int, state: Any, record: dict[str, Any], best_params: Params | None
) -> None:
    """Keeps a state, and its parameters too if they are the best so far.

    Args:
      run_dir: of the run.
      step: of the state.
      state: NumPy arrays, from `to_host`.
      record: JSON. If its `best_step` is `step`, then `best_params` are kept.
      best_params: NumPy arrays.

    Raises:
      UserError: the disk is full or can't be written.
    """
    if jax.process_index() != 0:
        return
    latest, best = run_dir / LATEST, run_dir / BEST
    # In this order no record names a best that isn't there.
    if record["best_step"] == step:
        save_checkpoint(best / str(step), best_params, record)
    save_checkpoint(latest / str(step), state, record)
    for folder in (latest, best):
        _remove(folder, saved_steps(folder)[:-_NUM_KEPT])


def saved_steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, in order."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def save_checkpoint(path: Path, tree: Any, record: dict[str, Any]) -> None:
    """Writes a tree of NumPy arrays and a record of JSON, complete when this returns."""
    ocp = import_extra("orbax.checkpoint")
    args = ocp.args.Composite(
        tree=ocp.args.StandardSave(_without_empty(tree)),
        record=ocp.args.JsonSave(
            {"record": record, "leaves": _describe(tree), "checksum": _checksum(tree)}
        ),
    )
    with writing(path), _orbax(ocp) as checkpointer:
        _remove_unfinished(path.parent)
        try:
            checkpointer.save(path.absolute(), args=args)
        except Exception:
            _remove_unfinished(path.parent)
            raise


def restore_checkpoint(path: Path, like: Tree) -> tuple[Tree, dict[str, Any]]:
    """Reads a checkpoint, its arrays placed like those of `like`, and its record.

    Raises:
      TrainingError: it can't be read, or its arrays have other names, shapes or dtypes.
    """
    ocp = import_extra("orbax.checkpoint")
    with _reading(path), _orbax(ocp) as checkpointer:
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        about = checkpointer.restore(path.absolute(), args=args).record
        leaves, checksum, record = about["leaves"], about["checksum"], about["record"]
    shapes = jax.eval_shape(_key_data, like)
    if difference := _first_difference(leaves, _describe(shapes)):
        raise TrainingError(
            f"{path} is a checkpoint of another model: {difference}; give the settings that it was "
            "trained with, or another folder (--run-dir or --checkpoint)"
        )
    target = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    with _reading(path), _orbax(ocp) as checkpointer:
        args = ocp.args.Composite(tree=ocp.args.StandardRestore(_without_empty(target)))
        tree = checkpointer.restore(path.absolute(), args=args).tree
        tree = jax.tree.map(lambda empty, x: empty if x is None else x, target, tree)
        if _checksum(tree) != checksum:
            raise ValueError("its data have changed on the disk")
    return place_like(tree, like), record


def to_host(tree: Tree) -> Tree:
    """Copies of all arrays as NumPy's, which no later donation can touch; of keys, their data."""
    return jax.tree.map(np.array, jax.device_get(_key_data(tree)))


def place_like(tree: Tree, like: Tree) -> Tree:
    """The inverse of `to_host`: arrays and keys on the devices of those of `like`."""

    def place(x, y):
        # An array that was not bound to a device must not become so: a step over more devices
        # would refuse it.
        placed = jax.device_put(x, y.sharding) if y.committed else jnp.array(x)
        is_key = jnp.issubdtype(y.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(y)) if is_key else placed

    return jax.tree.map(place, tree, like)


@contextlib.contextmanager
def _orbax(ocp: ModuleType) -> Iterator[Any]:
    """Orbax for this process alone: every process has all of every array, none need wait."""
    process = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process_{process}",
    )
    handler = ocp.CompositeCheckpointHandler(
        tree=ocp.StandardCheckpointHandler(multiprocessing_options=options),
        record=ocp.JsonCheckpointHandler(multiprocessing_options=options),
        composite_options=ocp.CompositeOptions(multiprocessing_options=options),
    )
    with _quiet(), ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        yield checkpointer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log and no tracebacks of Orbax, whose errors are raised anyway."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda _: None
    try:
        yield
    except Exception:
        # After an error its other reads and writes still run, and each ends in a traceback.
        time.sleep(_SECONDS_TO_SETTLE)
        raise
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        before = [step for step in saved_steps(path.parent) if step < int(path.name)]
        raise TrainingError(
            f"can't read the checkpoint {path} ({one_line(error)}); "
            + (f"remove that folder to use step {before[-1]}" if before else "train anew")
        ) from error


def _remove(folder: Path, steps: list[int]) -> None:
    if jax.process_index() == 0:
        for step in steps:
            shutil.rmtree(folder / str(step))


def _remove_unfinished(folder: Path) -> None:
    """What a killed or failed save has left behind."""
    for path in folder.glob(f"*{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _key_data(tree: Tree) -> Tree:
    def data(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(data, tree)


def _without_empty(tree: Any) -> Any:
    """None in the place of arrays without elements, which Orbax can't store."""
    return jax.tree.map(lambda x: x if x.size else None, tree)


def _checksum(tree: Any) -> int:
    checksum = 0
    for x in jax.tree.leaves(tree):
        checksum = zlib.crc32(np.ascontiguousarray(x).view(np.uint8).data, checksum)
    return checksum


def _describe(tree: Any) -> dict[str, str]:
    """Path to dtype and shape of every leaf: `{"params/kernel": "float32[3, 4]"}`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _first_difference(stored: dict[str, str], here: dict[str, str]) -> str | None:
    for name in [*here, *(name for name in stored if name not in here)]:
        if stored.get(name) != here.get(name):
            return f"{name} is {stored.get(name, 'absent')} there, {here.get(name, 'absent')} here"
    return None
