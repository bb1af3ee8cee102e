"""Spectrograms by hand and against a sum; pictures of them."""

import numpy as np
import pytest

from metagen_jax.errors import UserError
from metagen_jax.evaluation.spectrograms import plot_spectrograms, spectrogram


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
