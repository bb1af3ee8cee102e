"""What a run shows."""

import re
import sys

import pytest

from metagen_jax.runs import progress
from metagen_jax.runs.progress import ProgressBar, describe_metrics

pytest.importorskip("rich")


def show(bar, *, num_steps, seconds_per_step=0.5):
    with bar:
        bar.wait(0, "compiling the first step ...")
        for step in range(1, num_steps + 1):
            metrics = {"accuracy": 0.5, "loss": float(step), "gradient_norm": 1.0}
            bar.update(step, metrics, 100 + seconds_per_step * step, pause_seconds=0.0)
            if step == 5:
                bar.wait(step, "validating ...")
                bar.say("[1/2] said [bold]plainly[/bold]")


def test_plain_lines_give_means_speed_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_LINE_SECONDS", -1.0)
    show(ProgressBar(200, tasks_per_step=10, enabled=True), num_steps=200)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "compiling the first step ...",
        "step 1/200  loss 1  accuracy 50.0 %",
        "step 2/200  loss 2  accuracy 50.0 %  20 tasks/s  1:39 left",
    ]
    assert "[1/2] said [bold]plainly[/bold]" in lines
    assert lines[-1] == "step 200/200  loss 200  accuracy 50.0 %  20 tasks/s  3:20 in all"


def test_a_plain_line_is_the_mean_since_the_one_before(capsys):
    show(ProgressBar(9, tasks_per_step=None, enabled=True), num_steps=9)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "step 9/9  loss 5.5  accuracy 50.0 %  2 steps/s  1:44 in all"
    assert len(lines) == 4


def test_a_terminal_gets_a_bar_that_says_the_same(capsys, monkeypatch):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "90"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(progress, "_BAR_SECONDS", -1.0)
    show(ProgressBar(9, tasks_per_step=32, enabled=True), num_steps=9)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    rows = [row.rstrip() for row in re.split(r"[\r\n]+", text)]
    assert any(re.fullmatch(r"step 0/9 ━+ compiling the first step ...", row) for row in rows)
    assert any(
        re.search(r"step 5/9 [━╸╺]+ loss .* accuracy 50.0 %  validating", row) for row in rows
    )
    assert "[1/2] said [bold]plainly[/bold]" in rows
    assert re.fullmatch(
        r"step 9/9 ━+ loss 5.5  accuracy 50.0 %  64 tasks/s  1:44 in all",
        [r for r in rows if r][-1],
    )


def test_no_progress_is_silence_and_needs_no_rich(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    show(ProgressBar(9, tasks_per_step=None, enabled=False), num_steps=9)
    assert capsys.readouterr() == ("", "")


def test_metrics_are_put_for_a_reader():
    metrics = {"b": 1234567.0, "accuracy": 0.98765, "gradient_norm": 3.0, "loss": 0.123456, "a": 1}
    assert describe_metrics(metrics) == "loss 0.1235  a 1  accuracy 98.8 %  b 1.235e+06"
    assert describe_metrics({}) == ""
