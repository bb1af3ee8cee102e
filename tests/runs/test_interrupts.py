"""Ctrl-C as a request."""

import os
import signal

import pytest

from metagen_jax.runs.interrupts import stop_requests


@pytest.fixture
def usual():
    """Python's own handler of Ctrl-C; a shell's background jobs start with none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_the_first_ctrl_c_asks_and_the_second_insists(usual, capfd):
    with stop_requests() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is usual
    assert "stopping after this step" in capfd.readouterr().err


def test_handlers_come_back_after_an_error():
    usual = signal.getsignal(signal.SIGTERM)

    @stop_requests()
    def fail():
        assert signal.getsignal(signal.SIGTERM) is not usual
        raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert signal.getsignal(signal.SIGTERM) is usual
