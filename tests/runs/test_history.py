"""What a run remembers."""

import dataclasses
import json
import math

import pytest

from metagen_jax.runs.history import History


def test_an_interval_gives_means_and_starts_anew():
    history = History()
    for loss in (1.0, 2.0, 6.0):
        history.add_step({"loss": loss}, 0.5, compiled=False)
    assert history.end_interval() == {"loss": 3.0}
    history.add_step({"loss": 5.0}, 0.5, compiled=False)
    assert history.end_interval() == {"loss": 5.0}


def test_speed_leaves_steps_that_compiled_out():
    history = History()
    assert math.isnan(history.steps_per_second)
    history.add_step({}, 10.0, compiled=True)
    for _ in range(4):
        history.add_step({}, 0.5, compiled=False)
    assert history.train_seconds == 12.0
    assert history.compile_seconds == 10.0
    assert history.steps_per_second == 2.0


@pytest.mark.parametrize(("direction", "best"), [("max", 3), ("min", 4)])
def test_the_best_validation_is_strictly_better_and_finite(direction, best):
    history = History()
    values = [float("nan"), 5.0, 5.0, 7.0, 2.0, float("inf"), float("-inf")]
    for step, value in enumerate(values):
        history.add_validation(step, {"score": value}, ("score", direction))
    assert history.best_step == best
    assert history.best_validation == {"score": values[best]}


def test_it_survives_json():
    history = History()
    history.add_step({"loss": 1 / 3, "accuracy": 0.1}, 0.7, compiled=True)
    history.add_validation(1, {"score": 1 / 7}, ("score", "max"))
    text = json.dumps(dataclasses.asdict(history))
    assert History(**json.loads(text)) == history
