"""Series: splits without anything in common, waves that are what they say, TFDS sets as stored."""

import numpy as np
import pytest

from metagen_jax.data.series import WAVES, load_series, render_wave
from metagen_jax.errors import DataError


def test_waves_are_standardised_and_each_is_its_own():
    train, test = load_series("waves", "train"), load_series("waves", "test")
    assert train.values.shape == (120, 128, 1)
    assert np.bincount(test.labels).tolist() == [50] * 6
    both = np.concatenate([train.values, test.values])
    np.testing.assert_allclose(both.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(both.std(1), 1, rtol=1e-5)
    assert len(np.unique(both[..., 0], axis=0)) == len(both)
    np.testing.assert_array_equal(test.values[1], render_wave(0, 21))


@pytest.mark.parametrize(("kind", "later"), [("rising pitch", 1), ("falling pitch", -1)])
def test_pitches_rise_and_fall(kind, later):
    """By how often smoothed waves cross zero in the first and in the last third."""
    differences = []
    for number in range(40):
        smooth = np.convolve(render_wave(WAVES.index(kind), number)[:, 0], np.ones(5) / 5, "valid")
        crossings = np.diff(np.sign(smooth)) != 0
        differences.append(crossings[-43:].sum() - crossings[:43].sum())
    assert later * np.mean(differences) > 1


def test_sets_of_tfds_are_as_stored(data_dir):
    leaves = load_series("ucr_osu_leaf", "train", data_dir=data_dir)
    assert leaves.values.shape == (200, 427, 1)
    assert len(leaves.label_names) == 6
    assert set(leaves.labels) == set(range(6))
    assert load_series("ucr_basic_motions", "test", data_dir=data_dir).values.shape == (40, 100, 6)
    with pytest.raises(DataError, match="'ucr_osu_leaf' has no split 'val'; give one of"):
        load_series("ucr_osu_leaf", "val", data_dir=data_dir)
    with pytest.raises(DataError, match="load_series needs series as well"):
        load_series("mnist", "train", data_dir=data_dir)


def test_says_what_is_needed(tmp_path):
    with pytest.raises(DataError, match="'waves' has no split 'val'; give one of train, test"):
        load_series("waves", "val")
    with pytest.raises(DataError, match="'ucr_osu_leaf' is not in data_dir"):
        load_series("ucr_osu_leaf", "train", data_dir=tmp_path)
