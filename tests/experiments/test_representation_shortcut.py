"""The shortcut of colour fringes: it is in the pictures, nets take it, and dropping closes it."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments import representation_shortcut as shortcut
from metagen_jax.errors import UserError


def test_two_channels_tell_the_row_and_one_tells_nothing():
    pictures = np.asarray(shortcut.fringed_pictures(jax.random.key(0), 500))
    red, green, blue = np.moveaxis(pictures, -1, 0)
    agreement = np.cos(np.pi * np.arange(32) / 32) / 2
    np.testing.assert_allclose((red * green).mean((0, 2)), agreement, atol=0.02)
    np.testing.assert_allclose((red * blue).mean((0, 1)), agreement, atol=0.02)
    for channel in (red, green, blue):
        np.testing.assert_allclose(channel.mean(0), 0, atol=5 * np.sqrt(0.5 / 500))
        neighbours = (channel[:, 1:] * channel[:, :-1]).mean((0, 2))
        np.testing.assert_allclose(neighbours, 0, atol=0.02)


@pytest.mark.slow
def test_a_net_takes_the_shortcut_unless_all_colours_are_dropped(tmp_path):
    config = replace(
        shortcut.PRESETS["default"], num_filters=8, steps=200, num_test_blocks=6, run_dir=tmp_path
    )
    rows = {row["probability"]: row for row in shortcut.main(config)["rows"]}
    chance = 5 * np.sqrt(1 / 8 * 7 / 8 / 3000)
    assert rows[0.0]["with_colours"] > 0.3
    assert rows[0.5]["with_colours"] > 0.2
    for row in rows.values():
        assert abs(row["dropped"] - 1 / 8) < chance


def test_settings_without_sense_are_refused():
    with pytest.raises(UserError, match="num_filters is 12; give a multiple of 8"):
        shortcut.main(replace(shortcut.PRESETS["smoke"], num_filters=12))
