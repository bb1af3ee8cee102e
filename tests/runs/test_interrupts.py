"""Ctrl-C as a request."""

import os
import signal

import pytest

from metagen_jax.runs.interrupts import stop_requests


def test_the_first_ctrl_c_asks_and_the_second_insists(capfd):
    usual = signal.getsignal(signal.SIGINT)
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
