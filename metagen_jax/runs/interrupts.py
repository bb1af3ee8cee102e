"""Ctrl-C and SIGTERM as requests to stop after the step at hand."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one acts as it always does.

    Only the main thread can listen. Of several processes none does: each would stop after another
    step, and the last wait for the others for ever.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield stop
        return
    usual = {number: signal.getsignal(number) or signal.SIG_DFL for number in _SIGNALS}

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def request(*_) -> None:
        stop.set()
        restore()
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    for number in _SIGNALS:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()
