"""Mu-law against NumPy and by hand; recordings are those of their names; files can be read back."""

import wave

import jax
import numpy as np
import pytest

from metagen_jax.data.audio import (
    load_recordings,
    mu_law_decode,
    mu_law_encode,
    render_tones,
    write_wav,
)
from metagen_jax.errors import DataError, UserError


def test_codes_by_hand():
    """Silence and both ends; `f(1/255) = ln 2 / ln 256 = 1/8`, so the code of 143.4375."""
    codes = mu_law_encode(np.array([-1.0, -1 / 255, 0.0, 1 / 255, 1.0, -7.0, 7.0]))
    np.testing.assert_array_equal(codes, [0, 112, 128, 143, 255, 0, 255])


@pytest.mark.parametrize("num_levels", [2, 16, 256])
def test_codes_and_their_middles_are_inverses(num_levels):
    codes = np.arange(num_levels)
    with jax.enable_x64(True):
        middles = np.asarray(mu_law_decode(codes, num_levels=num_levels))
        np.testing.assert_array_equal(mu_law_encode(middles, num_levels=num_levels), codes)
    mu = num_levels - 1
    y = 2 * codes / mu - 1
    np.testing.assert_allclose(middles, np.sign(y) * ((1 + mu) ** np.abs(y) - 1) / mu, rtol=1e-12)
    np.testing.assert_allclose(middles, -middles[::-1], rtol=1e-12)


def test_codes_change_where_their_amplitudes_end():
    with jax.enable_x64(True):
        edges = np.asarray(mu_law_decode(np.arange(255) + 0.5))
        np.testing.assert_array_equal(mu_law_encode(edges + 1e-9), np.arange(1, 256))
        np.testing.assert_array_equal(mu_law_encode(edges - 1e-9), np.arange(255))


def test_half_precision_and_bytes_come_out_as_floats():
    codes = np.array([0, 128, 255], np.uint8)
    np.testing.assert_allclose(mu_law_decode(codes), [-1, 8.6e-5, 1], atol=1e-6)


def test_splits_of_tones_have_every_melody_and_voice_and_nothing_in_common():
    splits = {name: load_recordings("tones", name) for name in ("train", "validation", "test")}
    counts = {name: len(split.labels) for name, split in splits.items()}
    assert counts == {"train": 144, "validation": 54, "test": 90}
    seen = {
        name: {split.of(i).tobytes() for i in range(len(split.labels))}
        for name, split in splits.items()
    }
    assert len(set.union(*seen.values())) == sum(counts.values())
    test = splits["test"]
    assert len(set(zip(test.labels.tolist(), test.speakers.tolist(), strict=True))) == 18
    # In the order of label, speaker, number.
    melody, voice = int(test.labels[23]), int(test.speakers[23])
    np.testing.assert_array_equal(test.of(23), render_tones(melody, voice, 23 % 5))
    assert test.starts[-1] == len(test.samples)


def test_voices_are_those_of_the_tones_and_more():
    voices, tones = load_recordings("voices", "validation"), load_recordings("tones", "validation")
    assert len(set(voices.speaker_names)) == 12
    assert voices.speaker_names[:3] == tones.speaker_names
    assert voices.label_names == tones.label_names
    assert len(voices.labels) == 6 * 12 * 3
    rows = np.flatnonzero(voices.speakers < 3)
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(voices.of(int(row)), tones.of(i))


@pytest.mark.parametrize("melody", [0, 3])
def test_the_second_note_is_as_much_higher_as_the_melody_says(melody):
    """By where the spectrum of each third has its peak, below the second overtone."""
    ratios = []
    for number in range(6):
        sound = render_tones(melody, 1, number).astype(float)
        third = len(sound) // 3
        peaks = []
        for part in (sound[:third], sound[-third:]):
            spectrum = np.abs(np.fft.rfft(part * np.hanning(third), 65536))
            peaks.append(np.argmax(spectrum))
        ratios.append(np.log2(peaks[1] / peaks[0]))
    assert np.median(ratios) == pytest.approx({0: 0, 3: 1}[melody], abs=0.1)


def test_spoken_digits_are_split_by_their_authors_numbers(data_dir):
    test, train, validation = (
        load_recordings("free_spoken_digit", split, data_dir=data_dir)
        for split in ("test", "train", "validation")
    )
    assert [len(x.labels) for x in (train, validation, test)] == [2520, 180, 300]
    assert sum(len(x.samples) for x in (train, validation, test)) == 10_498_424
    assert test.label_names == tuple("0123456789")
    assert test.speaker_names[1] == "jackson"
    assert np.bincount(test.labels * 6 + test.speakers).tolist() == [5] * 60


def test_wav_files_can_be_read_back(tmp_path):
    write_wav(tmp_path / "a.wav", np.array([0.0, 0.5, -1.0, 3.0]))
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 8000)
        samples = np.frombuffer(file.readframes(9), "<i2")
    np.testing.assert_array_equal(samples, [0, 16384, -32767, 32767])
    with pytest.raises(UserError, match="can't write"):
        write_wav(tmp_path / "none" / "a.wav", np.zeros(3))


@pytest.mark.usefixtures("ill_typed")
def test_says_what_is_needed(tmp_path):
    with pytest.raises(UserError, match="num_levels is 1; give 2 or more"):
        mu_law_encode(np.zeros(2), num_levels=1)
    with pytest.raises(DataError, match="split is 'all'; give one of test, validation, train"):
        load_recordings("tones", "all")
    with pytest.raises(DataError, match="'free_spoken_digit' is not in data_dir"):
        load_recordings("free_spoken_digit", "test", data_dir=tmp_path)
