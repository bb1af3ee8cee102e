"""Errors that a person can mend, each in one line: what was given, what is needed, what to do."""

import contextlib
import errno
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """An argument, a setting, a file or a machine that can't be used as it is.

    Whatever this project refuses, it refuses by this, so that a program can tell its user's
    mistakes, for which the message is enough, from its own, which need a traceback.
    """


class DataError(UserError):
    """Data that are not there, not of the kind needed, or asked for by an unknown name."""


class TrainingError(UserError):
    """A run that can't start, go on or be resumed."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM has stopped the run, after it saved a checkpoint."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns whatever fails while `path` is written into a `UserError`."""
    try:
        yield
    except Exception as error:
        if _is_disk_full(error):
            raise UserError(
                f"no space left on the disk to write {path}; what was saved before is whole: make "
                "room, then continue the run (--resume)"
            ) from error
        raise UserError(f"can't write {path} ({one_line(error)})") from error


def import_extra(name: str) -> ModuleType:
    """Imports what only the extra `experiments` brings."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed; pip install 'metagen-jax[experiments]'"
        ) from error


def one_line(error: Exception) -> str:
    """The beginning of an error's message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else f"{text[:120]}..."


def _is_disk_full(error: BaseException | None) -> bool:
    # TensorStore reports a full disk as a ValueError with the system's words in it.
    words = [os.strerror(code) for code in _DISK_FULL]
    while error is not None:
        if getattr(error, "errno", None) in _DISK_FULL or any(w in str(error) for w in words):
            return True
        error = error.__cause__ or error.__context__
    return False
