"""Labelled images, and splits of them by class, as few-shot learning needs.

The class lists of Omniglot, the glyphs, CIFAR-FS and miniImageNet are frozen in `splits/`, whose
README names their sources; `split_classes` splits any other set.
"""

from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from metagen_jax.errors import DataError

_PARTS = ("train", "val", "trainval", "test")
_OMNIGLOT_SCHEMES = ("vinyals", "lake", "random1200", "random1000", "alphabets45")
FROZEN_SPLITS = {
    "cifar_fs": _PARTS,
    "glyphs": _PARTS,
    "mini_imagenet": _PARTS,
    "omniglot": tuple(f"{s}/{p}" for s in _OMNIGLOT_SCHEMES for p in _PARTS),
}
"""The splits by class that are kept in files, for each data set."""


class LabelledImages(NamedTuple):
    """Pictures and their classes: `class_names[labels[i]]` is the class of `images[i]`."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int32[np.ndarray, " n"]
    class_names: tuple[str, ...]


class ClassSplit(NamedTuple):
    """Three parts of one data set that have no class in common."""

    train: LabelledImages
    val: LabelledImages
    test: LabelledImages


def frozen_classes(name: str, split: str) -> tuple[str, ...]:
    """The class names of one of `FROZEN_SPLITS[name]`, such as `"vinyals/test"` of `"omniglot"`.

    Raises:
      DataError: no such split is kept.
    """
    known = FROZEN_SPLITS.get(name, ())
    if split not in known:
        raise DataError(
            f"{name!r} has no frozen split {split!r}; "
            f"give one of {', '.join(known) if known else f'those of {list(FROZEN_SPLITS)}'}"
        )
    scheme, _, part = split.rpartition("/")
    folder = resources.files("metagen_jax.data") / "splits" / name / scheme
    lists = ("train", "val") if part == "trainval" else (part,)
    texts = [(folder / f"{part}.txt").read_text(encoding="utf-8") for part in lists]
    return tuple("".join(texts).splitlines())


def select_classes(data: LabelledImages, class_names: Sequence[str]) -> LabelledImages:
    """The pictures of some classes, in the same order, with labels that index `class_names`.

    Raises:
      DataError: a name is not in the data, or is given twice.
    """
    old_labels = {name: label for label, name in enumerate(data.class_names)}
    unknown = [name for name in class_names if name not in old_labels]
    if unknown or len(set(class_names)) < len(class_names):
        what = f"{unknown[0]!r} is not among the classes" if unknown else "a class is given twice"
        raise DataError(f"{what}; give different names out of the {len(old_labels)} in the data")
    new_labels = np.full(len(old_labels), -1, np.int32)
    new_labels[[old_labels[name] for name in class_names]] = np.arange(len(class_names))
    labels = new_labels[data.labels]
    chosen = labels >= 0
    return LabelledImages(data.images[chosen], labels[chosen], tuple(class_names))


def split_classes(
    data: LabelledImages,
    *,
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
    counts: tuple[int, int, int] | None = None,
    seed: int = 0,
) -> ClassSplit:
    """Splits the classes at random, so that any labelled set can serve few-shot learning.

    The split depends on the class names, the sizes and the seed alone, on every platform.

    Args:
      data: what to split.
      fractions: of the classes, for train, val and test; the rest is left out. A part whose
        fraction is 0 is empty.
      counts: of classes, in place of fractions.
      seed: of the permutation of the sorted class names.

    Raises:
      DataError: more classes are asked for than there are, or fewer than none; or there are so few
        that a part with a fraction would have none.
    """
    names = sorted(data.class_names)
    total, sizes = (1, fractions) if counts is None else (len(names), counts)
    if min(sizes) < 0 or sum(sizes) > total + 1e-9:
        kind = "fractions" if counts is None else "counts"
        raise DataError(f"{kind} are {sizes}; give three, none negative, of sum {total} at most")
    edges = [round(edge * len(names) / total) for edge in np.cumsum(sizes)]
    asked_for = zip(ClassSplit._fields, sizes, np.diff([0, *edges]), strict=True)
    if empty := [part for part, size, count in asked_for if size and not count]:
        raise DataError(
            f"the data have {len(names)} classes, of which fractions {sizes} leave none for "
            f"{' and '.join(empty)}; give data of more classes, other fractions, or counts"
        )
    # RandomState, as its numbers are frozen; those of NumPy's newer generators may change.
    order = np.random.RandomState(seed).permutation(len(names))
    parts = np.split(order, edges)[:3]
    return ClassSplit(*(select_classes(data, [names[i] for i in sorted(part)]) for part in parts))
