"""Labelled time series of one length: TFDS sets, and waves that need no download.

Dau et al.: The UCR Time Series Archive, 2019. Bagnall et al.: The UEA Multivariate Time Series
Classification Archive, 2018.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from metagen_jax.data.cache import Folder, missing_package_named
from metagen_jax.data.sources import prepared_folder
from metagen_jax.errors import DataError

WAVES = ("sine", "square", "saw", "triangle", "rising pitch", "falling pitch")
"""The classes of the embedded set."""

_WAVES_EACH = {"train": 20, "test": 50}
_LENGTH = 128


class Series(NamedTuple):
    """Series and what they are.

    Attributes:
      values: `(n, t, channels)`, as stored.
      labels: `(n,)`, classes 0, 1, ...
      label_names: of the classes.
    """

    values: Float[np.ndarray, "n t c"]
    labels: Int[np.ndarray, " n"]
    label_names: tuple[str, ...]


def load_series(name: str, split: str, *, data_dir: Folder | None = None) -> Series:
    """The series of a split.

    `"waves"` is embedded: see `render_wave`; 20 of each of the `WAVES` in "train" and 50 in "test".
    Any other name is a TFDS set with the features `series`, of one shape, and `label`.

    Args:
      name: of the set.
      split: "train" or "test", or another of TFDS's.
      data_dir: folder of prepared TFDS sets, by default `$TFDS_DATA_DIR`, `~/tensorflow_datasets`.

    Raises:
      DataError: a set, feature, split or package is missing; the message says what to do.
    """
    if name != "waves":
        with missing_package_named(name):
            return _load_tfds(name, split, data_dir)
    if split not in _WAVES_EACH:
        raise DataError(f"'waves' has no split {split!r}; give one of {', '.join(_WAVES_EACH)}")
    first = 0 if split == "train" else _WAVES_EACH["train"]
    numbers = range(first, first + _WAVES_EACH[split])
    values = [render_wave(kind, number) for kind in range(len(WAVES)) for number in numbers]
    return Series(np.stack(values), np.repeat(np.arange(len(WAVES)), len(numbers)), WAVES)


def _load_tfds(name: str, split: str, data_dir: Folder | None) -> Series:
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(prepared_folder(name, data_dir))
    features = builder.info.features
    if missing := [feature for feature in ("series", "label") if feature not in features]:
        raise DataError(
            f"{name!r} has the features {', '.join(sorted(features))}, and load_series needs "
            f"{', '.join(missing)} as well; give a set of time series"
        )
    if split not in builder.info.splits:
        raise DataError(
            f"{name!r} has no split {split!r}; give one of {', '.join(builder.info.splits)}"
        )
    source = builder.as_data_source(split=split)
    examples = source.__getitems__(list(range(len(source))))
    values = np.stack([np.asarray(example["series"], np.float32) for example in examples])
    labels = np.array([example["label"] for example in examples], np.int32)
    return Series(values, labels, tuple(features["label"].names))


def render_wave(kind: int, number: int) -> Float[np.ndarray, "128 1"]:
    """The recording of that number of one of the `WAVES`, 128 values of mean 0 and deviation 1.

    Three to eight periods; the phase, which wave begins, how loud it is and a noise of up to half
    of it are the recording's own, the same every time. No single place tells what it is.
    """
    rng = np.random.default_rng([kind, number])
    time = np.linspace(0, 1, _LENGTH)
    periods, start = rng.uniform(3, 8), rng.uniform()
    if kind >= 4:
        # From half to one and a half of the pitch, or the reverse.
        time = time if kind == 4 else 1 - time
        phase = periods * (time / 2 + time**2 / 2) + start
    else:
        phase = periods * time + start
    turn = phase % 1
    shapes = {
        1: np.where(turn < 0.5, 1.0, -1.0),
        2: 2 * turn - 1,
        3: 4 * np.abs(turn - 0.5) - 1,
    }
    wave = shapes.get(kind, np.sin(2 * np.pi * phase))
    wave = wave + rng.uniform(0.1, 0.5) * rng.normal(size=_LENGTH)
    return ((wave - wave.mean()) / wave.std()).astype(np.float32)[:, None]
