"""Recordings as codes with conditions, and which of them `experiments.speech` takes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from experiments.excerpts import Sequences
from experiments.speech_config import Config
from metagen_jax.data.audio import Recordings, load_recordings, mu_law_encode


class Splits(NamedTuple):
    """Recordings for training, validation and test."""

    train: Recordings
    val: Recordings
    test: Recordings


def load_splits(config: Config) -> Splits:
    """The recordings, of validation and test as many as the settings ask for."""
    train, val, test = (
        load_recordings(config.source, split, data_dir=config.data_dir)
        for split in ("train", "validation", "test")
    )
    return Splits(train, choose(val, config.num_validation), choose(test, config.num_test))


def to_sounds(recordings: Recordings, *, conditional: bool) -> Sequences:
    """The codes, and as condition the one-hot label and speaker."""
    conditions = one_hot(recordings, recordings.labels, recordings.speakers)
    return Sequences(
        np.asarray(mu_law_encode(recordings.samples / np.float32(2**15))).astype(np.uint8),
        recordings.starts,
        conditions if conditional else conditions[:, :0],
    )


def one_hot(
    recordings: Recordings, labels: np.ndarray, speakers: np.ndarray
) -> Float[np.ndarray, "n d"]:
    """Labels and speakers as numbers 0 and 1 side by side."""
    parts = (labels, recordings.label_names), (speakers, recordings.speaker_names)
    return np.concatenate([np.eye(len(names), dtype=np.float32)[i] for i, names in parts], axis=1)


def choose(recordings: Recordings, count: int | None) -> Recordings:
    """So many of the recordings, evenly spread over all."""
    total = len(recordings.labels)
    if count is None or count >= total:
        return recordings
    return select(recordings, np.arange(count) * total // count)


def select(recordings: Recordings, rows: Int[np.ndarray, " n"]) -> Recordings:
    """Some of the recordings, by number."""
    sounds = [recordings.of(int(i)) for i in rows]
    return recordings._replace(
        samples=np.concatenate(sounds),
        starts=np.cumsum([0, *map(len, sounds)]),
        labels=recordings.labels[rows],
        speakers=recordings.speakers[rows],
    )


def join(parts: Sequence[Recordings]) -> Recordings:
    """All recordings of several parts of one set."""
    return parts[0]._replace(
        samples=np.concatenate([part.samples for part in parts]),
        starts=np.cumsum([0, *np.concatenate([np.diff(part.starts) for part in parts])]),
        labels=np.concatenate([part.labels for part in parts]),
        speakers=np.concatenate([part.speakers for part in parts]),
    )
