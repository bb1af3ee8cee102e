"""The speakers of `experiments.few_shot_speech`: to learn from, to choose by, to test on."""

from typing import NamedTuple

import jax
import numpy as np

from experiments import program
from experiments.excerpts import Excerpt, Sequences, cut, draw_excerpt_of_each
from experiments.few_shot_speech_config import Config
from experiments.speech_data import join, select, to_sounds
from metagen_jax.data.audio import Recordings, load_recordings
from metagen_jax.data.episodes import ClassData, check_episodes, group_by_class, sample_episode
from metagen_jax.types import Episode, PRNGKey

# Of the pieces of validation and test, the same for every --seed.
PIECE_SEED = 1_000_000_001


class Speech(NamedTuple):
    """Whole recordings of several speakers, told what is said in them, and their numbers."""

    sounds: Sequences
    speakers: ClassData


class Speaker(NamedTuple):
    """Whom to test on: a piece of each recording with what is said in it, and the recordings."""

    pieces: ClassData
    recordings: Recordings


class Splits(NamedTuple):
    """Speakers for training, validation and test, those of the test by name."""

    train: Speech
    val: ClassData
    test: dict[str, Speaker]


def load_splits(config: Config, *, reach: int) -> Splits:
    """All recordings of each speaker; no speaker is in two parts.

    Args:
      config: settings.
      reach: how many samples before one the net sees, so that pieces are as likely as they are
        where they were cut out.

    Raises:
      UserError: there are not as many speakers, or one has too few recordings for an episode.
    """
    splits = ("train", "validation", "test")
    everyone = join([load_recordings(config.source, x, data_dir=config.data_dir) for x in splits])
    names = everyone.speaker_names
    first, second, total = np.cumsum(config.num_speakers)
    program.require(
        (
            total <= len(names),
            f"num_speakers is {config.num_speakers} and {config.source} has {len(names)} in all; "
            "give no more",
        )
    )
    rng = np.random.default_rng(PIECE_SEED)

    def of(start: int, end: int) -> Recordings:
        return select(
            everyone, np.flatnonzero((everyone.speakers >= start) & (everyone.speakers < end))
        )

    learned = of(0, first)
    numbers = np.arange(len(learned.speakers), dtype=np.int32)
    train = Speech(told_words(learned), group_by_class(numbers, learned.speakers))
    val = one_piece_each(config, of(first, second), reach, rng)
    people = {names[i]: of(i, i + 1) for i in range(second, total)}
    test = {
        name: Speaker(one_piece_each(config, recordings, reach, rng), recordings)
        for name, recordings in people.items()
    }
    _check_sizes(config, train.speakers, config.num_shots)
    for data in (val, *(speaker.pieces for speaker in test.values())):
        _check_sizes(config, data, max(config.shots))
    return Splits(train, val, test)


def _check_sizes(config: Config, data: ClassData, num_shots: int) -> None:
    check_episodes(data, num_ways=1, num_shots=num_shots, num_queries=config.num_queries)


def told_words(recordings: Recordings) -> Sequences:
    """The codes, and as condition what is said, not by whom."""
    sounds = to_sounds(recordings, conditional=True)
    return sounds._replace(conditions=sounds.conditions[:, : len(recordings.label_names)])


def one_piece_each(
    config: Config, recordings: Recordings, reach: int, rng: np.random.Generator
) -> ClassData:
    """One of the pieces of each recording, exact, and what is said in it."""
    sounds = told_words(recordings)
    pieces = cut(sounds, length=config.excerpt, reach=reach)
    _, first, counts = np.unique(pieces.owners, return_index=True, return_counts=True)
    chosen = first + rng.integers(0, counts)
    excerpts = Excerpt(*(np.asarray(x)[chosen] for x in pieces.excerpts))
    return group_by_class((excerpts, sounds.conditions), recordings.speakers)


def draw_episode(key: PRNGKey, data: ClassData, *, num_shots: int, num_queries: int) -> Episode:
    """Examples of one speaker to learn from, and others of the same."""
    drawn = sample_episode(key, data, num_ways=1, num_shots=num_shots, num_queries=num_queries)
    return Episode(drawn.support[0], drawn.query[0])


def draw_task(config: Config, key: PRNGKey, data: Speech) -> Episode:
    """An episode of training: recordings of one speaker, an excerpt from anywhere in each."""
    key, *place_keys = jax.random.split(key, 3)
    numbers = draw_episode(
        key, data.speakers, num_shots=config.num_shots, num_queries=config.num_queries
    )
    return Episode(
        *(
            draw_excerpt_of_each(
                place_key, data.sounds, of, length=config.excerpt, warm_up=config.warm_up
            )
            for place_key, of in zip(place_keys, numbers, strict=True)
        )
    )
