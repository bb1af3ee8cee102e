"""Spectrograms by hand and against a sum; pictures of them."""

import numpy as np
import pytest

from metagen_jax.errors import UserError
from metagen_jax.evaluation.spectrograms import log_mel, plot_spectrograms, spectrogram


def test_a_sine_has_half_its_amplitude_in_its_bin_while_it_sounds():
    time = np.arange(4000) / 8000
    sizes = spectrogram(0.6 * np.sin(2 * np.pi * 1000 * time) * (time < 0.25), window=256, hop=64)
    assert sizes.shape == (63, 129)
    # 1000 Hz are 32 of 256 bins of 8000 Hz.
    np.testing.assert_allclose(sizes[4:28, 32], 0.3, rtol=1e-9)
    np.testing.assert_allclose(sizes[36:], 0, atol=1e-12)
    assert (sizes[4:28].argmax(1) == 32).all()


def test_windows_are_centred_on_their_samples():
    sound = np.random.default_rng(0).normal(size=23)
    sizes = spectrogram(sound, window=8, hop=5)
    assert sizes.shape == (5, 5)
    weights = np.sin(np.pi * np.arange(8) / 8) ** 2 / 4
    padded = np.pad(sound, 10)
    for frame, middle in enumerate(range(0, 24, 5)):
        seen = padded[10 + middle - 4 : 10 + middle + 4] * weights
        for k in range(5):
            expected = abs(sum(seen[n] * np.exp(-2j * np.pi * k * n / 8) for n in range(8)))
            assert sizes[frame, k] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("rows", [[3], [1], [2, 3], [1, 1]])
def test_pictures_of_any_number_of_sounds(tmp_path, rows):
    rng = np.random.default_rng(0)
    sounds = [
        [(f"{i} {j}", rng.normal(size=500 + 90 * j)) for j in range(n)] for i, n in enumerate(rows)
    ]
    sounds[0][0] = ("silence", np.zeros(400))
    plot_spectrograms(sounds, tmp_path / "a.png", title="noise", rate=8000)
    assert (tmp_path / "a.png").stat().st_size > 3000


@pytest.mark.usefixtures("ill_typed")
def test_says_what_is_needed(tmp_path):
    for sounds in ([], [[]], [[("a", np.zeros(0))]]):
        with pytest.raises(UserError, match="there are no sounds, or some without samples"):
            plot_spectrograms(sounds, tmp_path / "a.png", title="", rate=8000)
    with pytest.raises(UserError, match="window is 1 and hop 3; give at least 2 and 1"):
        spectrogram(np.zeros(9), window=1, hop=3)


def test_the_power_of_a_sine_is_in_the_band_of_its_pitch_and_silence_has_none():
    mel = lambda f: 2595 * np.log10(1 + f / 700)  # noqa: E731
    for frequency in (500, 1500, 3000):
        sine = 0.5 * np.sin(2 * np.pi * frequency * np.arange(4000) / 8000)
        bands = log_mel(sine, rate=8000, num_bands=20)
        assert bands.shape == (63, 20)
        expected = mel(frequency) / mel(4000) * 21 - 1
        assert abs(bands[20].argmax() - expected) < 1
    np.testing.assert_allclose(log_mel(np.zeros(500), rate=8000), np.log(1e-10))


def test_bands_are_triangles_of_the_power():
    """One band by a loop over bins."""
    sound = np.random.default_rng(0).normal(size=300)
    actual = log_mel(sound, rate=8000, num_bands=6, window=64, hop=32)
    edges = 700 * (10 ** (np.linspace(0, np.log10(1 + 4000 / 700), 8)) - 1)
    for band in range(6):
        low, middle, high = edges[band : band + 3]
        total = 0.0
        for k in range(33):
            f = k * 8000 / 64
            weight = min((f - low) / (middle - low), (high - f) / (high - middle))
            total += max(weight, 0) * spectrogram(sound, window=64, hop=32)[4, k] ** 2
        np.testing.assert_allclose(actual[4, band], np.log(total + 1e-10), rtol=1e-9)
