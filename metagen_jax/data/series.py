"""Labelled series: sets of TFDS with a feature `series`, and embedded waves."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from metagen_jax.data.cache import Folder, missing_package_named
from metagen_jax.data.sources import prepared_folder
from metagen_jax.errors import DataError

WAVES = ("sine", "square", "saw", "pulses", "beats", "chirp")
WAVE_LENGTH = 128
_NUM_WAVES = {"train": 10, "test": 40}


class LabelledSeries(NamedTuple):
    """Series of one length and their classes: `class_names[labels[i]]` is that of `series[i]`."""

    series: Float32[np.ndarray, "n t c"]
    labels: Int32[np.ndarray, " n"]
    class_names: tuple[str, ...]


def load_series(name: str, split: str, *, data_dir: Folder | None = None) -> LabelledSeries:
    """The series of a split, in the order in which they are stored.

    Args:
      name: a TFDS set with the features `series`, all of one shape `(t, c)`, and `label`, such as
        "ucr_osu_leaf"; or "waves", the embedded set: see `render_wave`.
      split: of the set, such as "train" or "test"; of the waves one of these two.
      data_dir: folder of prepared TFDS sets, by default `$TFDS_DATA_DIR`, `~/tensorflow_datasets`.

    Raises:
      DataError: a set, feature, split or package is missing; the message says what to do.
    """
    if name == "waves":
        if split not in _NUM_WAVES:
            raise _unknown_split(name, split, list(_NUM_WAVES))
        count, first = _NUM_WAVES[split], 0 if split == "train" else _NUM_WAVES["train"]
        series = [render_wave(kind, first + i) for kind in range(len(WAVES)) for i in range(count)]
        labels = np.repeat(np.arange(len(WAVES), dtype=np.int32), count)
        return LabelledSeries(np.stack(series), labels, WAVES)
    with missing_package_named(name):
        return _load_tfds(name, split, data_dir)


def _load_tfds(name: str, split: str, data_dir: Folder | None) -> LabelledSeries:
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(prepared_folder(name, data_dir))
    features = builder.info.features
    shape = features["series"].shape if "series" in features else ()
    if len(shape) != 2 or None in shape or "label" not in features:
        raise DataError(
            f"{name!r} has the features {', '.join(sorted(features))}; load_series needs 'series' "
            "of one shape (t, c) and a class 'label': give a data set that has them"
        )
    if split not in builder.info.splits:
        raise _unknown_split(name, split, list(builder.info.splits))
    source = builder.as_data_source(split=split)
    examples = source.__getitems__(list(range(len(source))))
    return LabelledSeries(
        np.stack([example["series"] for example in examples]).astype(np.float32),
        np.array([example["label"] for example in examples], np.int32),
        tuple(features["label"].names),
    )


def _unknown_split(name: str, split: str, known: list[str]) -> DataError:
    return DataError(f"{name!r} has no split {split!r}; give one of {', '.join(known)}")


def render_wave(kind: int, number: int) -> Float32[np.ndarray, "128 1"]:
    """A wave of one of six shapes, from a place of its own in its period, under noise.

    Four to seven periods, phase, slant of the shape and noise are those of the number, the same
    every time; mean 0 and variance 1, as in the archive of UCR. What tells the shapes apart is
    nowhere at one time: series of one class lie as far from one another as from the others.
    """
    rng = np.random.default_rng([kind, number])
    time = np.arange(WAVE_LENGTH) / WAVE_LENGTH
    periods, phase = rng.uniform(4, 7), rng.uniform()
    part = (periods * time + phase) % 1
    wave = {
        "sine": lambda: np.sin(2 * np.pi * part),
        "square": lambda: np.sign(part - 0.5),
        "saw": lambda: part,
        "pulses": lambda: np.exp(-(((part - 0.5) / 0.08) ** 2)),
        "beats": lambda: np.sin(6 * np.pi * part) * np.sin(np.pi * part) ** 2,
        "chirp": lambda: np.sin(2 * np.pi * (periods * (0.4 + 0.6 * time) * time * 1.6 + phase)),
    }[WAVES[kind]]()
    wave = (wave - wave.mean()) / wave.std() + rng.normal(0, 0.3, WAVE_LENGTH)
    return ((wave - wave.mean()) / wave.std()).astype(np.float32)[:, None]
