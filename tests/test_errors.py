"""Errors of one line."""

import errno
import os
import sys
from pathlib import Path

import pytest

from metagen_jax.errors import UserError, import_extra, writing


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("make", [lambda c: OSError(c, "x"), lambda c: ValueError(os.strerror(c))])
def test_a_full_disk_is_told_from_other_troubles(code, make):
    @writing(Path("here"))
    def write():
        try:
            raise make(code)
        except Exception as error:
            raise RuntimeError("the writer stopped") from error

    with pytest.raises(UserError, match=r"no space left on the disk to write here.*--resume"):
        write()


def test_other_troubles_are_cut_to_one_line():
    with pytest.raises(UserError) as raised, writing(Path("here")):
        raise ValueError("first\n  second " + "x" * 1000)
    assert str(raised.value).startswith("can't write here (first second xxx")
    assert len(str(raised.value)) < 200


def test_ctrl_c_is_not_a_trouble_of_the_disk():
    with pytest.raises(KeyboardInterrupt), writing(Path("here")):
        raise KeyboardInterrupt


def test_a_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(UserError, match=r"orbax.checkpoint .*'metagen-jax\[experiments\]'"):
        import_extra("orbax.checkpoint")
