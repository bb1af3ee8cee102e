"""Series of TFDS, and embedded waves: shapes, splits, what tells classes apart."""

import numpy as np
import pytest

from metagen_jax.data.series import WAVES, load_series, render_wave
from metagen_jax.errors import DataError


def test_waves_are_standardised_and_the_same_every_time():
    train, test = (load_series("waves", split) for split in ("train", "test"))
    assert train.series.shape == (60, 128, 1)
    assert test.series.shape == (240, 128, 1)
    assert train.class_names == WAVES
    np.testing.assert_array_equal(np.bincount(test.labels), 40)
    np.testing.assert_allclose(train.series.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(train.series.std(1), 1, atol=1e-6)
    np.testing.assert_array_equal(train.series[11], render_wave(1, 1))
    every = np.concatenate([train.series, test.series])
    assert len(np.unique(every, axis=0)) == 300


def test_neighbours_in_place_tell_little_of_the_shape_and_spectra_much():
    """Sizes of frequencies don't know the phase, series as they are know nothing else."""
    train, test = (load_series("waves", split) for split in ("train", "test"))

    def accuracy(features):
        known, asked = (features(part.series[..., 0]) for part in (train, test))
        distances = ((asked[:, None] - known) ** 2).sum(2)
        return (train.labels[distances.argmin(1)] == test.labels).mean()

    assert accuracy(lambda x: x) < 0.6
    values = lambda x: np.sort(x, axis=1)  # noqa: E731
    assert accuracy(values) > 0.7


def test_sets_of_tfds_have_their_official_sizes(data_dir):
    for name, split, shape, num_classes in (
        ("ucr_osu_leaf", "train", (200, 427, 1), 6),
        ("ucr_basic_motions", "test", (40, 100, 6), 4),
    ):
        loaded = load_series(name, split, data_dir=data_dir)
        assert loaded.series.shape == shape
        assert loaded.series.dtype == np.float32
        assert len(loaded.class_names) == num_classes
        assert set(loaded.labels) == set(range(num_classes))


def test_what_is_missing_is_said(data_dir):
    with pytest.raises(DataError, match="'waves' has no split 'all'; give one of train, test"):
        load_series("waves", "all")
    with pytest.raises(DataError, match="'ucr_osu_leaf' has no split 'val'"):
        load_series("ucr_osu_leaf", "val", data_dir=data_dir)
    with pytest.raises(DataError, match="'mnist' has the features image, label; load_series needs"):
        load_series("mnist", "train", data_dir=data_dir)
