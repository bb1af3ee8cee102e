"""The experiment on films: errors by loops, a net that knows, a run that is whole."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import moving_digits
from experiments.moving_digits import PRESETS, Config, check, draw_films, measure, with_loss
from metagen_jax.errors import UserError

PICTURES = jnp.full((2, 3, 3, 1), 255, jnp.uint8)
SMALL = replace(PRESETS["smoke"], num_frames=7, num_seen=4, num_past=2)


@pytest.mark.slow
def test_errors_are_those_of_the_frames_that_follow():
    """A net that fades: half of the last frame; and one that copies."""
    films = draw_films(jax.random.key(0), PICTURES, config=SMALL, num_films=5)
    x = np.asarray(films)
    errors = measure(lambda p, frames: p * frames, 0.5, films, num_seen=4, num_past=2)
    square = lambda a, b: ((a - b) ** 2).mean((-1, -2, -3))  # noqa: E731
    np.testing.assert_allclose(
        errors.next_frame, square(x[:, 3:6] / 2, x[:, 4:]).mean(1), rtol=1e-5
    )
    np.testing.assert_allclose(errors.next_copied, square(x[:, 3:6], x[:, 4:]).mean(1), rtol=1e-5)
    fading = x[:, 3:4] * np.array([0.5, 0.25, 0.125])[:, None, None, None]
    np.testing.assert_allclose(errors.future, square(fading, x[:, 4:]), rtol=1e-5)
    np.testing.assert_allclose(errors.future_copied, square(x[:, 3:4], x[:, 4:]), rtol=1e-5)
    copied = measure(lambda p, frames: frames, (), films, num_seen=4, num_past=2)
    np.testing.assert_array_equal(copied.next_frame, errors.next_copied)
    np.testing.assert_array_equal(copied.future, errors.future_copied)


@pytest.mark.slow
def test_films_of_one_key_are_the_same_and_those_of_a_larger_draw_begin_with_them():
    key = jax.random.key(1)
    few, many = (draw_films(key, PICTURES, config=SMALL, num_films=n) for n in (2, 4))
    assert few.shape == (2, 7, 16, 16, 1)
    np.testing.assert_array_equal(few, many[:2])
    assert np.abs(np.diff(np.asarray(many), axis=0)).max((1, 2, 3, 4)).all()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["next_frame", "future"])
def test_a_run_gives_its_numbers_and_draws_its_pictures(tmp_path, loss):
    config = replace(PRESETS["smoke"], loss=loss, run_dir=tmp_path)
    numbers = moving_digits.main(config)
    errors = numbers["mean_squared_errors"]
    for name in ("next_frame", "future"):
        gain = errors[f"{name}_copied"] - errors[name]
        np.testing.assert_allclose(errors[f"{name}_gain"], gain, rtol=1e-3, atol=1e-7)
    assert json.dumps(numbers)
    for picture in ("learning_curve", "films", "errors"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 1000


def test_the_loss_is_in_the_name_of_the_folder():
    config = with_loss(Config(), Config(loss="future"))
    assert config.loss == "future"
    assert config.run_dir.name == "moving_digits-future"


def test_settings_without_sense_are_refused():
    for changes, message in (
        ({"size": 24}, "size is 24; give a multiple of 16"),
        ({"num_seen": 20}, "num_seen is 20 of 20 frames"),
        ({"num_test": 1}, "num_test is 1; give 2 or more"),
        ({"rate": 0.0}, "rate is 0.0"),
    ):
        with pytest.raises(UserError, match=message):
            check(replace(Config(), **changes))
