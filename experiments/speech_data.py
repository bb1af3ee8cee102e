"""The recordings of `experiments.speech`: codes, conditions, and excerpts of one length."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from experiments.speech_config import Config
from metagen_jax.data.audio import Recordings, load_recordings, mu_law_encode
from metagen_jax.types import AnyArray, PRNGKey


class Excerpt(NamedTuple):
    """A piece of a recording.

    Attributes:
      codes: of its samples, and anything after the recording's end.
      counted: of which samples the probability counts; the others are there to be seen.
    """

    codes: UInt8[AnyArray, "*n t"]
    counted: Bool[AnyArray, "*n t"]


class Sounds(NamedTuple):
    """Recordings as a model takes them.

    Attributes:
      codes: mu-law codes of all, one after the other.
      starts: where each begins, and at the end how many there are.
      conditions: what the model is told of each; of no entries if that is nothing.
    """

    codes: UInt8[AnyArray, " total"]
    starts: Int[AnyArray, " n_plus_1"]
    conditions: Float[AnyArray, "n d"]


class Cut(NamedTuple):
    """Recordings cut into excerpts, in which every sample counts once.

    Attributes:
      excerpts: of all recordings.
      conditions: of each excerpt.
      owners: the recording of each excerpt.
    """

    excerpts: Excerpt
    conditions: Float[np.ndarray, "m d"]
    owners: Int[np.ndarray, " m"]


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


def to_sounds(recordings: Recordings, *, conditional: bool) -> Sounds:
    """The codes, and as condition the one-hot label and speaker."""
    conditions = one_hot(recordings, recordings.labels, recordings.speakers)
    return Sounds(
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
    kept = [i * total // count for i in range(count)]
    sounds = [recordings.of(i) for i in kept]
    return recordings._replace(
        samples=np.concatenate(sounds),
        starts=np.cumsum([0, *map(len, sounds)]),
        labels=recordings.labels[kept],
        speakers=recordings.speakers[kept],
    )


def sequences(sounds: Sounds) -> list[np.ndarray]:
    """The codes of each recording."""
    return np.split(np.asarray(sounds.codes), np.asarray(sounds.starts)[1:-1])


def draw_excerpts(
    key: PRNGKey, sounds: Sounds, *, count: int, length: int, warm_up: int
) -> tuple[Excerpt, Float[Array, "count d"]]:
    """Excerpts from places that are drawn evenly from all samples of all recordings.

    From the place on `length` samples count, as far as the recording goes, and `warm_up` before it
    are seen; near the beginning of a recording the excerpt begins there, and all of it counts.
    """
    place = jax.random.randint(key, (count,), 0, len(sounds.codes))
    owner = jnp.searchsorted(sounds.starts, place, side="right") - 1
    begin = jnp.maximum(place - warm_up, sounds.starts[owner])
    first = jnp.where(begin == sounds.starts[owner], begin, place)
    index = begin[:, None] + jnp.arange(warm_up + length)
    counted = (index >= first[:, None]) & (index < sounds.starts[owner + 1][:, None])
    codes = sounds.codes[jnp.minimum(index, len(sounds.codes) - 1)]
    return Excerpt(codes, counted), sounds.conditions[owner]


def cut(sounds: Sounds, *, length: int, reach: int) -> Cut:
    """All recordings in pieces, each with as much before it as the net can see: exact."""
    codes, starts = np.asarray(sounds.codes), np.asarray(sounds.starts)
    pieces = [
        (owner, first)
        for owner, (start, end) in enumerate(itertools.pairwise(starts))
        for first in range(start, end, length)
    ]
    owners, first = np.array(pieces).T
    begin = np.maximum(first - reach, starts[owners])
    index = begin[:, None] + np.arange(reach + length)
    end = np.minimum(first + length, starts[owners + 1])
    counted = (index >= first[:, None]) & (index < end[:, None])
    excerpts = Excerpt(codes[np.minimum(index, len(codes) - 1)], counted)
    return Cut(excerpts, np.asarray(sounds.conditions)[owners], owners)
