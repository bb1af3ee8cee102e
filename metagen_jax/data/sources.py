"""Image sets as one array: Omniglot, the embedded glyphs, any TFDS set of pictures.

`load_images` decodes a set once into one `uint8` array and caches that on disk, so that a second
run has it in a fraction of a second, without TFDS. Nothing here needs TensorFlow.
"""

import importlib.metadata
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from metagen_jax.data.cache import (
    CACHE_FORMAT,
    Folder,
    cache_folder,
    cached,
    digest,
    missing_package_named,
)
from metagen_jax.data.classes import (
    FROZEN_SPLITS,
    LabelledImages,
    frozen_classes,
    select_classes,
)
from metagen_jax.data.glyphs import render_glyphs
from metagen_jax.data.resampling import Resampling, resize
from metagen_jax.errors import DataError

# TFDS's own splits of Omniglot are Lake's: they share the cached array with the others.
_OMNIGLOT_SYNONYMS = {"train": "lake/trainval", "test": "lake/test"}

_DECODE_CHUNK = 512
_CHANNEL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_INK_0_PAPER_255 = [0] + 255 * [255]

Progress = Callable[[int, int], None]


def load_images(
    name: str,
    split: str,
    *,
    data_dir: Folder | None = None,
    size: int | None = None,
    resampling: Resampling = "lanczos",
    cache_dir: Folder | None = None,
    progress: Progress | None = None,
) -> LabelledImages:
    """Loads an image set with labels as one array.

    `"omniglot"`: 20 drawings of each of 1623 characters, one channel, ink 0 and paper 255 (most
    papers turn that round: ink 1, paper 0). Its splits by character are `vinyals/`, `lake/`,
    `random1200/`, `random1000/` and `alphabets45/`, each with `train`, `val`, `trainval` (both) and
    `test`; TFDS's own `train` and `test` are `lake/trainval` and `lake/test`.

    `"glyphs"`: 20 pictures of each of 1338 printed letters, coloured alike, drawn on the spot
    (`metagen_jax.data.glyphs`). Its splits by letter are `train`, `val`, `trainval`, `test`.

    Any other name is a TFDS set with the features `image` (8 bits a channel, kept as they are) and
    `label`, with `/config` and `:version` if need be; its splits are TFDS's, such as `"train"`,
    `"train+test"`, `"train[:10%]"`. Without `label`, as `"binarized_mnist"` is, all pictures are of
    one class, named after the set.

    Args:
      name: of the data set.
      split: of the data set.
      data_dir: folder of prepared TFDS sets, by default `$TFDS_DATA_DIR`, `~/tensorflow_datasets`.
      size: side in pixels of the square to which pictures are resized, by Pillow's Lanczos filter
        (glyphs are drawn at that size, by default 28). The programs of MAML's and Prototypical
        Networks' authors resize Omniglot by Pillow as well, but at 1 bit a pixel, where it takes
        the nearest pixel whatever filter is named: their pictures are black and white, these have
        grey edges.
      resampling: how TFDS's pictures are made of that size; see `metagen_jax.data.resampling`.
      cache_dir: where decoded arrays are kept, by default `$METAGEN_JAX_CACHE` or `metagen_jax` in
        the user's cache folder. A cache that can't be read or written costs a warning.
      progress: called with (done, total) while pictures are decoded; never if they are cached.

    Returns:
      The pictures in the order in which they are stored. `class_names` are all classes of the set,
      or those of the split where it is one by class.

    Raises:
      DataError: a set, feature, split or package is missing; the message says what to do.
    """
    if size is not None and size < 1:
        raise DataError(f"size is {size}; give the side in pixels, 1 or more")
    base = name.partition(":")[0]
    by_class = _OMNIGLOT_SYNONYMS.get(split, split) if base == "omniglot" else split
    is_by_class = by_class in FROZEN_SPLITS.get(base, ())
    cache = cache_folder(cache_dir)
    with missing_package_named(name):
        if base == "glyphs":
            if not is_by_class:
                raise _unknown_split(name, split, [])
            if data_dir is not None and not Path(data_dir).expanduser().exists():
                raise DataError(
                    f"data_dir {data_dir} does not exist; glyphs need none: leave it out"
                )
            data = _load_glyphs(size or 28, cache, progress)
        else:
            stored = "train+test" if is_by_class else split
            data = _load_tfds(name, stored, data_dir, size, resampling, cache, progress)
    return select_classes(data, frozen_classes(base, by_class)) if is_by_class else data


def _load_glyphs(size: int, cache: Path, progress: Progress | None) -> LabelledImages:
    names = frozen_classes("glyphs", "trainval") + frozen_classes("glyphs", "test")
    versions = [importlib.metadata.version(package) for package in ("matplotlib", "pillow")]
    key = digest(*versions, *names)

    def render() -> LabelledImages:
        images = render_glyphs(names, size=size, progress=progress)
        labels = np.repeat(np.arange(len(names), dtype=np.int32), images.shape[1])
        return LabelledImages(images.reshape(-1, *images.shape[2:]), labels, names)

    return cached(cache / f"glyphs-{size}-{key}-v{CACHE_FORMAT}.npz", render)


def _load_tfds(
    name: str,
    split: str,
    data_dir: Folder | None,
    size: int | None,
    resampling: Resampling,
    cache: Path,
    progress: Progress | None,
) -> LabelledImages:
    folder = prepared_folder(name, data_dir)
    # The files' names, sizes and descriptions tell two preparations of one version apart.
    files = sorted(file for file in folder.iterdir() if file.is_file())
    described = [file.read_bytes() for file in files if file.suffix in (".json", ".txt")]
    key = digest(split, *(f"{file.name} {file.stat().st_size}" for file in files), *described)
    readable = re.sub(r"[^\w.+-]+", "_", f"{name.partition(':')[0]}-{folder.name}-{split}")
    resized = "full" if size is None else f"{size}-{resampling}".removesuffix("-lanczos")
    file = cache / f"{readable}-{resized}-{key}-v{CACHE_FORMAT}.npz"
    return cached(file, lambda: _decode(folder, name, split, size, resampling, progress))


def prepared_folder(name: str, data_dir: Folder | None) -> Path:
    """The folder of a set's newest version, or of the version in its name, as TFDS lays it out."""
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    base, _, version = name.partition(":")
    choose = "give a folder of prepared TFDS sets as data_dir (--data-dir) or TFDS_DATA_DIR"
    prepare = (
        f"prepare {base} once where there is internet: pip install tensorflow-cpu && python -c "
        f"\"import tensorflow_datasets as tfds; tfds.data_source('{base}', data_dir='{root}')\""
    )
    if not root.exists():
        raise DataError(f"data_dir {root} does not exist; {choose}, or {prepare}")
    if not root.is_dir():
        raise DataError(f"data_dir {root} is not a folder; {choose}")
    prepared = [info.parent for info in (root / base).glob("*/dataset_info.json")]
    versions = {
        tuple(map(int, folder.name.split("."))): folder
        for folder in prepared
        if re.fullmatch(r"\d+\.\d+\.\d+", folder.name) and version in ("", folder.name)
    }
    if not versions:
        infos = [*root.glob("*/*/dataset_info.json"), *root.glob("*/*/*/dataset_info.json")]
        found = sorted({info.parent.parent.relative_to(root).as_posix() for info in infos})
        listed = ", ".join(found[:12]) + (", ..." if len(found) > 12 else "")
        raise DataError(
            f"{name!r} is not in data_dir {root}, which holds {listed or 'no data set'}; "
            f"{choose}, or {prepare}"
        )
    return versions[max(versions)]


def _decode(
    folder: Path,
    name: str,
    split: str,
    size: int | None,
    resampling: Resampling,
    progress: Progress | None,
) -> LabelledImages:
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(folder)
    features: dict[str, Any] = dict(builder.info.features.items())
    image, label = features.get("image"), features.get("label")
    if (
        not isinstance(image, tfds.features.Image)
        or image.np_dtype != np.uint8
        or not isinstance(label, tfds.features.ClassLabel | None)
    ):
        raise DataError(
            f"{name!r} has the features {', '.join(sorted(features))}; load_images needs an 8-bit "
            "picture 'image' and, if there is a 'label', a class: give a data set that has them"
        )
    shape: Any = image.shape
    height, width = shape[:2] if size is None else (size, size)
    if height is None or width is None:
        raise DataError(f"the pictures of {name!r} differ in size; give size, in pixels a side")
    is_omniglot = name.partition(":")[0] == "omniglot"
    channels = 1 if is_omniglot else shape[2]
    if channels not in _CHANNEL_MODES:
        raise DataError(
            f"the pictures of {name!r} have {channels or 'any number of'} channels; load_images "
            "needs 1, 3 or 4: give a data set that has them"
        )

    source = _encoded_pictures(builder, name, split)
    images = np.empty((len(source), height, width, channels), np.uint8)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), _DECODE_CHUNK):
        stop = min(start + _DECODE_CHUNK, len(source))
        for index, example in enumerate(source.__getitems__(list(range(start, stop))), start):
            picture = _picture(example["image"], channels, binarize=is_omniglot)
            pixels = np.asarray(picture) if size is None else resize(picture, size, resampling)
            images[index] = pixels.reshape(height, width, channels)
            labels[index] = 0 if label is None else example["label"]
        if progress is not None:
            progress(stop, len(source))
    if labels.min() < 0:
        raise DataError(f"split {split!r} of {name!r} has pictures without label; give another")
    class_names = (name.partition(":")[0],) if label is None else tuple(label.names)
    return LabelledImages(images, labels, class_names)


def _encoded_pictures(builder: Any, name: str, split: str) -> Any:
    """The examples of a split, their pictures still in the format of the file."""
    import tensorflow_datasets as tfds

    try:
        num_examples = builder.info.splits[split].num_examples
    except (KeyError, ValueError):
        raise _unknown_split(name, split, list(builder.info.splits)) from None
    if not num_examples:
        raise DataError(f"split {split!r} of {name!r} has no pictures; give a larger one")
    try:
        decoders = {"image": tfds.decode.SkipDecoding()}
        return builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError:
        raise DataError(
            f"{name!r} is prepared as {builder.info.file_format.value} in {builder.data_dir}, "
            "which only TensorFlow reads; prepare it in another data_dir by tfds.data_source"
        ) from None


def _picture(encoded: bytes, channels: int, *, binarize: bool) -> Any:
    """One picture, decoded by Pillow: TFDS's two decoders disagree on the values of 1-bit ones."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as file:
        picture = file.convert(_CHANNEL_MODES[channels])
    if binarize:
        picture = picture.point(_INK_0_PAPER_255)
    return picture


def _unknown_split(name: str, split: str, tfds_splits: list[str]) -> DataError:
    known = ", ".join([*tfds_splits, *FROZEN_SPLITS.get(name.partition(":")[0], ())])
    return DataError(f"{name!r} has no split {split!r}; give one of {known}")
