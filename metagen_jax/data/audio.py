"""Recordings of sound: mu-law codes, the spoken digits of TFDS, embedded tones, WAV files.

Recordings differ in length, so a set of them is one array of all samples, one recording after the
other, and where each begins.

ITU-T: Pulse code modulation (PCM) of voice frequencies, recommendation G.711, 1988. Van den Oord
et al.: WaveNet, 2016.
"""

import itertools
import math
import re
import wave
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int16, Real

from metagen_jax.data.cache import Folder, missing_package_named
from metagen_jax.data.sources import prepared_folder
from metagen_jax.errors import DataError, UserError, writing
from metagen_jax.types import AnyArray

Source = Literal["tones", "voices", "free_spoken_digit"]
Split = Literal["train", "validation", "test"]

RATE = 8000
"""Samples a second of all recordings here."""

# Of each class and speaker the authors of the spoken digits test on recordings 0 to 4.
_SPLITS: dict[Split, tuple[int, int]] = {
    "test": (0, 5),
    "validation": (5, 8),
    "train": (8, 1 << 30),
}
TONES_EACH = 16


class Recordings(NamedTuple):
    """Recordings of 8000 samples a second, in the order of their names.

    Attributes:
      samples: of all recordings, one after the other.
      starts: where each begins, and at the end how many samples there are.
      labels: of each recording, what is said.
      speakers: likewise, who says it.
      label_names, speaker_names: of the numbers.
    """

    samples: Int16[np.ndarray, " total"]
    starts: Int[np.ndarray, " n_plus_1"]
    labels: Int[np.ndarray, " n"]
    speakers: Int[np.ndarray, " n"]
    label_names: tuple[str, ...]
    speaker_names: tuple[str, ...]

    def of(self, index: int) -> Int16[np.ndarray, " t"]:
        """The samples of one recording."""
        return self.samples[self.starts[index] : self.starts[index + 1]]


def mu_law_encode(
    amplitudes: Float[AnyArray, "*shape"], *, num_levels: int = 256
) -> Int[Array, "*shape"]:
    """The code of an amplitude: levels that lie closer the nearer they are to silence.

    `f(x) = sign(x) ln(1 + mu |x|) / ln(1 + mu)`, mu = `num_levels - 1`, and the code is the whole
    number nearest to `mu (f(x) + 1) / 2`: G.711's law without its pieces of straight line, section
    2.2 of van den Oord et al. 2016.

    Args:
      amplitudes: from -1 to 1; those outside get the first or the last code.
      num_levels: how many codes; if even, silence is the upper one of the middle two.

    Returns:
      Codes 0..num_levels-1, int32.

    Raises:
      UserError: for fewer than two levels.
    """
    mu = _mu(num_levels)
    x = jnp.clip(jnp.asarray(amplitudes), -1, 1)
    companded = jnp.sign(x) * jnp.log1p(mu * jnp.abs(x)) / math.log1p(mu)
    return jnp.floor(mu * (companded + 1) / 2 + 0.5).astype(jnp.int32)


def mu_law_decode(
    codes: Real[AnyArray, "*shape"], *, num_levels: int = 256
) -> Float[Array, "*shape"]:
    """The amplitude in the middle of a code: `sign(y) ((1 + mu)^|y| - 1) / mu`, y = 2 v / mu - 1.

    Args:
      codes: 0..num_levels-1, or numbers between them: the amplitudes of code `v` reach from that
        of `v - 1/2` to that of `v + 1/2`.
      num_levels: how many codes there are.

    Raises:
      UserError: for fewer than two levels.
    """
    mu = _mu(num_levels)
    codes = jnp.asarray(codes)
    y = 2 * codes.astype(jnp.result_type(codes, float)) / mu - 1
    return jnp.sign(y) * jnp.expm1(jnp.abs(y) * math.log1p(mu)) / mu


def _mu(num_levels: int) -> int:
    if num_levels < 2:
        raise UserError(f"num_levels is {num_levels}; give 2 or more, 256 for 8 bits")
    return num_levels - 1


def load_recordings(name: Source, split: Split, *, data_dir: Folder | None = None) -> Recordings:
    """The recordings of a split.

    `"free_spoken_digit"`: digits spoken by six people, 50 recordings each. Numbers 0 to 4 of each
    digit and speaker are the authors' test split, 5 to 7 the validation here, the others train.

    `"tones"`: the embedded set, made on the spot, 16 recordings of each melody by each of three
    voices; see `render_tones`. Its splits are the same.

    `"voices"`: likewise by those three and nine more, whose pitches and colours lie among theirs
    and a little beyond; to learn from some voices and meet others.

    Args:
      name: of the set.
      split: "train", "validation" or "test".
      data_dir: folder of prepared TFDS sets, by default `$TFDS_DATA_DIR`, `~/tensorflow_datasets`.

    Raises:
      DataError: a set, feature, split or package is missing; the message says what to do.
    """
    if split not in _SPLITS:
        raise DataError(f"split is {split!r}; give one of {', '.join(_SPLITS)}")
    first, after = _SPLITS[split]
    if name in _VOICES:
        numbers = range(first, min(after, TONES_EACH))
        triples = itertools.product(range(len(_STEPS)), range(len(_VOICES[name])), numbers)
        return _joined([(*of, render_tones(*of)) for of in triples], _STEPS, _VOICES[name])
    with missing_package_named(name):
        return _load_tfds(name, data_dir, first, after)


def _joined(rows: list[tuple[int, int, int, np.ndarray]], label_names, speaker_names) -> Recordings:
    labels, speakers, _, samples = zip(*sorted(rows, key=lambda row: row[:3]), strict=True)
    return Recordings(
        np.concatenate(samples),
        np.cumsum([0, *map(len, samples)]),
        np.array(labels, np.int32),
        np.array(speakers, np.int32),
        tuple(label_names),
        tuple(speaker_names),
    )


def _load_tfds(name: str, data_dir: Folder | None, first: int, after: int) -> Recordings:
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(prepared_folder(name, data_dir))
    features = builder.info.features
    needed = ("audio", "label", "speaker", "filename")
    if missing := [feature for feature in needed if feature not in features]:
        raise DataError(
            f"{name!r} has the features {', '.join(sorted(features))}, and load_recordings needs "
            f"{', '.join(missing)} as well; give free_spoken_digit"
        )
    source = builder.as_data_source(split="train")
    rows = []
    for example in source.__getitems__(list(range(len(source)))):
        number = re.search(rb"_(\d+)\.wav$", example["filename"])
        if number and first <= int(number[1]) < after:
            row = int(example["label"]), int(example["speaker"]), int(number[1])
            rows.append((*row, np.asarray(example["audio"], np.int16)))
    return _joined(rows, features["label"].names, features["speaker"].names)


# Two notes each, as semitones above the voice's own pitch.
_STEPS = {
    "level": (0, 0),
    "up a third": (0, 4),
    "up a fifth": (0, 7),
    "up an octave": (0, 12),
    "down a third": (4, 0),
    "down a fifth": (7, 0),
}
# A pitch in hertz, and how fast the overtones fade.
_TIMBRES = {
    "low": (110.0, 0.8),
    "middle": (165.0, 1.2),
    "high": (247.0, 1.8),
    "bass": (98.0, 1.5),
    "tenor": (147.0, 0.7),
    "alto": (185.0, 1.9),
    "mezzo": (220.0, 0.9),
    "soprano": (277.0, 1.3),
    "baritone": (123.0, 1.8),
    "treble": (262.0, 0.8),
    "cello": (131.0, 1.1),
    "viola": (208.0, 1.5),
}
_VOICES = {"tones": tuple(_TIMBRES)[:3], "voices": tuple(_TIMBRES)}


def render_tones(melody: int, voice: int, number: int) -> Int16[np.ndarray, " t"]:
    """Two notes with overtones, in the place of a word: the recording of that number.

    The melody says how the second note differs from the first, the voice has its pitch and colour.
    Length (a quarter to half a second), tuning, loudness, phases, a vibrato and a little noise are
    the recording's own, the same every time.
    """
    rng = np.random.default_rng([melody, voice, number])
    length = int(rng.integers(RATE // 4, RATE // 2))
    time = np.arange(length) / RATE
    pitch, fading = list(_TIMBRES.values())[voice]
    first, second = list(_STEPS.values())[melody]
    glide = 1 / (1 + np.exp(-(time / time[-1] - 0.5) * 40))
    semitones = first + (second - first) * glide + rng.normal(0, 0.3)
    semitones = semitones + 0.15 * np.sin(2 * np.pi * 6 * time + rng.uniform(0, 2 * np.pi))
    cycles = np.cumsum(pitch * 2 ** (semitones / 12)) / RATE
    tone = sum(np.sin(2 * np.pi * (k * cycles + rng.uniform())) * k**-fading for k in range(1, 9))
    swell = np.minimum(1, 12 * np.minimum(time, time[-1] - time) / time[-1])
    loud = rng.uniform(0.15, 0.4) * swell * tone / np.abs(tone).max()
    return np.round(32767 * (loud + rng.normal(0, 0.002, length))).astype(np.int16)


def write_wav(path: Folder, amplitudes: Float[AnyArray, " t"], *, rate: int = RATE) -> None:
    """Writes a mono WAV file of 16 bits a sample; amplitudes outside of -1 to 1 are cut.

    Raises:
      UserError: the file can't be written.
    """
    levels = np.round(32767 * np.clip(np.asarray(amplitudes, np.float64), -1, 1)).astype("<i2")
    with writing(Path(path)), Path(path).open("wb") as stream, wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(levels.tobytes())
