"""The progress bar of a data set that is being decoded."""

import contextlib
import sys
from collections.abc import Iterator

import rich.progress

from metagen_jax.data.sources import Progress


@contextlib.contextmanager
def decoding(dataset: str) -> Iterator[Progress]:
    """Shows a bar from the first call of what it gives, which takes (done, total), to the end."""
    # Off a terminal it would print an empty line.
    with rich.progress.Progress(transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task(f"decoding {dataset}", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield progress
