"""The numbers on disk."""

import json

import pytest

from metagen_jax.errors import UserError
from metagen_jax.runs.log import RunLog, has_log

pytest.importorskip("tensorboardX")


def write(run_dir, steps, *, start_step=0):
    with RunLog(run_dir, start_step=start_step) as log:
        for step in steps:
            log.write(step, {"loss": step / 3}, train_seconds=0.12345, kind="train")


def read(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_whole_at_once_and_name_what_they_are(tmp_path):
    with RunLog(tmp_path, start_step=0) as log:
        log.write(2, {"loss": 0.1, "odd": float("inf")}, train_seconds=1.23456, kind="train")
        log.write(2, {"loss": 0.2}, train_seconds=1.3, kind="validation")
        assert read(tmp_path) == [
            {"step": 2, "train_seconds": 1.235, "loss": 0.1, "odd": None},
            {"step": 2, "train_seconds": 1.3, "validation_loss": 0.2},
        ]


@pytest.mark.parametrize(
    "tail", ["", '{"step": 5, "lo', '{"step": 4, "loss": 1}', "\0\0\0\n", "[1]\n", '"step"\n']
)
def test_a_resumed_log_goes_on_after_its_step(tmp_path, tail):
    write(tmp_path, [1, 2, 3])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail)
    write(tmp_path, [3, 4], start_step=2)
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4]
    assert [line["loss"] for line in read(tmp_path)] == [1 / 3, 2 / 3, 3 / 3, 4 / 3]


def test_a_log_counts_from_its_first_line(tmp_path):
    assert not has_log(tmp_path)
    write(tmp_path, [])
    assert not has_log(tmp_path)
    write(tmp_path, [1])
    assert has_log(tmp_path)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't write .*metrics.jsonl"):
        RunLog(tmp_path / "file" / "run", start_step=0)
