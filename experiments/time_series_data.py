"""The sequences of `experiments.time_series`: series and sounds in one form, excerpts of them."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.time_series_config import SOUNDS, Config, DatasetName
from metagen_jax.data.audio import RATE, Recordings, load_recordings
from metagen_jax.data.series import LabelledSeries, load_series
from metagen_jax.errors import DataError
from metagen_jax.evaluation.spectrograms import log_mel
from metagen_jax.types import AnyArray, PRNGKey

# Seconds of a sound that features are taken of; few recordings are longer.
LONGEST = 1.0

Excerpts = tuple[Float[AnyArray, "n t c"], Int[AnyArray, " n"]]
"""Sequences filled up with zeros to one length, and how long each is."""


class Sequences(NamedTuple):
    """Sequences of any length, one after the other, and where each begins."""

    values: Float[AnyArray, "total c"]
    starts: Int[AnyArray, " n_plus_1"]


class Part(NamedTuple):
    """Sequences, their labels by what is asked, and what there is without any net."""

    sequences: Sequences
    labels: dict[str, Int[np.ndarray, " n"]]
    raw: Float[np.ndarray, "n features"]


class Dataset(NamedTuple):
    """Sequences to learn from, and what features are judged by.

    Attributes:
      learned: without labels, or with.
      train: to fit probes to; that of `learned`, and speakers who are held out.
      val: to choose them by; None where there is none to spare.
      test: to report.
      few: of which episodes are drawn.
      raw_name: what `raw` is.
      class_names: of the labels, by what is asked.
    """

    learned: Part
    train: Part
    val: Part | None
    test: Part
    few: Part
    raw_name: str
    class_names: dict[str, tuple[str, ...]]


def load(config: Config, name: DatasetName) -> Dataset:
    """One of the sets.

    Raises:
      DataError: it is missing, or has no such speakers.
    """
    if name in SOUNDS:
        return _load_sounds(config, name)
    train, test = (
        load_series(name, split, data_dir=config.data_dir) for split in ("train", "test")
    )
    mean, deviation = train.series.mean((0, 1)), train.series.std((0, 1))

    def part(of: LabelledSeries) -> Part:
        standard = (of.series - mean) / np.where(deviation > 0, deviation, 1)
        count, length, channels = standard.shape
        sequences = Sequences(
            standard.reshape(-1, channels), length * np.arange(count + 1, dtype=np.int32)
        )
        return Part(sequences, {"class": of.labels}, of.series.reshape(count, -1))

    known, asked = part(train), part(test)
    names = {"class": train.class_names}
    return Dataset(known, known, None, asked, asked, "the series as they are", names)


def _load_sounds(config: Config, name) -> Dataset:
    parts = [
        load_recordings(name, split, data_dir=config.data_dir)
        for split in ("train", "validation", "test")
    ]
    speakers = parts[0].speaker_names
    names = {"digit": parts[0].label_names, "speaker": speakers}
    if unknown := set(config.held_out) - set(speakers):
        raise DataError(
            f"{name} has no speaker {', '.join(sorted(unknown))}; give some of "
            f"{', '.join(speakers)}"
        )
    if set(speakers) == set(config.held_out):
        raise DataError(f"held_out names all speakers of {name}; leave one or more to learn from")
    scale = parts[0].samples.astype(np.float32).std()
    train, val, test = (_part_of_sounds(part, scale) for part in parts)
    if not config.held_out:
        return Dataset(train, train, val, test, test, "log-mel statistics", names)
    unseen = [speakers.index(speaker) for speaker in config.held_out]
    new = [np.isin(part.labels["speaker"], unseen) for part in (train, val, test)]
    few = [choose(part, rows) for part, rows in zip((train, val, test), new, strict=True)]
    seen, few = choose(train, ~new[0]), functools.reduce(_join, few)
    return Dataset(seen, train, val, test, few, "log-mel statistics", names)


def _part_of_sounds(recordings: Recordings, scale: float) -> Part:
    sounds = [recordings.of(i) for i in range(len(recordings.labels))]
    raw = []
    for sound in sounds:
        bands = log_mel(sound / np.float32(2**15), rate=RATE)
        raw.append(np.concatenate([bands.mean(0), bands.std(0), bands.max(0)]))
    return Part(
        Sequences(
            recordings.samples.astype(np.float32)[:, None] / scale,
            recordings.starts.astype(np.int32),
        ),
        {"digit": recordings.labels, "speaker": recordings.speakers},
        np.stack(raw).astype(np.float32),
    )


def split(sequences: Sequences) -> list[np.ndarray]:
    """Each sequence by itself."""
    values, starts = (np.asarray(x) for x in sequences)
    return np.split(values, starts[1:-1])


def choose(part: Part, rows: np.ndarray) -> Part:
    """The sequences where `rows` is true."""
    kept = list(itertools.compress(split(part.sequences), rows))
    starts = np.cumsum([0, *map(len, kept)]).astype(np.int32)
    labels = {what: of[rows] for what, of in part.labels.items()}
    return Part(Sequences(np.concatenate(kept), starts), labels, part.raw[rows])


def _join(a: Part, b: Part) -> Part:
    starts = np.concatenate([a.sequences.starts, a.sequences.starts[-1] + b.sequences.starts[1:]])
    return Part(
        Sequences(np.concatenate([a.sequences.values, b.sequences.values]), starts),
        {what: np.concatenate([of, b.labels[what]]) for what, of in a.labels.items()},
        np.concatenate([a.raw, b.raw]),
    )


def padded(sequences: Sequences, length: int) -> Excerpts:
    """The first entries of every sequence, with zeros where there are fewer."""
    each = split(sequences)
    values = np.zeros((len(each), length, sequences.values.shape[1]), np.float32)
    for row, sequence in zip(values, each, strict=True):
        row[: len(sequence)] = sequence[:length]
    return values, np.minimum([len(sequence) for sequence in each], length).astype(np.int32)


def longest(config: Config, name: DatasetName, sequences: Sequences) -> tuple[int, int]:
    """Entries that features are taken of, and entries of an excerpt."""
    if name in SOUNDS:
        return round(LONGEST * RATE), round(config.crop * RATE)
    length = int(np.diff(sequences.starts).max())
    return length, max(round(config.crop * length), 1)


def draw_excerpts(
    key: PRNGKey, data: tuple[Sequences, Array], *, count: int, length: int
) -> tuple[tuple[Float[Array, "b t c"], Int[Array, " b"]], Int[Array, " b"]]:
    """Excerpts of sequences, all equally likely, and their labels.

    Each from a place that is drawn evenly from those where it is whole; a sequence that is shorter
    is whole, with zeros behind.
    """
    (values, starts), labels = jax.tree.map(jnp.asarray, data)
    row_key, place_key = jax.random.split(key)
    rows = jax.random.randint(row_key, (count,), 0, len(starts) - 1)
    size = starts[rows + 1] - starts[rows]
    begin = starts[rows] + jax.random.randint(
        place_key, (count,), 0, jnp.maximum(size - length, 0) + 1
    )
    there = jnp.arange(length) < size[:, None]
    index = jnp.minimum(begin[:, None] + jnp.arange(length), len(values) - 1)
    excerpts = jnp.where(there[..., None], values[index], 0)
    return (excerpts, jnp.minimum(size, length)), labels[rows]
