"""The two colour benchmarks of few-shot learning: CIFAR-FS and miniImageNet.

Their class lists are frozen in `splits/cifar_fs` and `splits/mini_imagenet`, 64 classes to train,
16 to validate, 20 to test, with 600 pictures each.
"""

from pathlib import Path

import numpy as np

from metagen_jax.data.cache import (
    CACHE_FORMAT,
    Folder,
    cache_folder,
    cached,
    digest,
    missing_package_named,
)
from metagen_jax.data.classes import LabelledImages, frozen_classes, select_classes
from metagen_jax.data.sources import Progress, load_images
from metagen_jax.errors import DataError

_PICTURES = (".jpg", ".jpeg", ".png")


def load_cifar_fs(
    split: str,
    *,
    data_dir: Folder | None = None,
    cache_dir: Folder | None = None,
    progress: Progress | None = None,
) -> LabelledImages:
    """CIFAR-FS: all pictures, 32x32x3, of some of CIFAR-100's classes.

    Args:
      split: "train" (64 classes), "val" (16), "trainval" or "test" (20).
      data_dir: folder of prepared TFDS sets with `cifar100`; see `load_images`.
      cache_dir: as in `load_images`; the splits share one decoded array.
      progress: as in `load_images`.

    Raises:
      DataError: there is no such split, or `cifar100` can't be loaded.

    Bertinetto, Henriques, Torr, Vedaldi: Meta-learning with differentiable closed-form solvers,
    2019, appendix.
    """
    names = frozen_classes("cifar_fs", split)
    every = load_images(
        "cifar100", "train+test", data_dir=data_dir, cache_dir=cache_dir, progress=progress
    )
    return select_classes(every, names)


def load_mini_imagenet(
    split: str,
    *,
    folder: Folder,
    size: int = 84,
    cache_dir: Folder | None = None,
    progress: Progress | None = None,
) -> LabelledImages:
    """miniImageNet from a folder of pictures, which can't be given away and must be had already.

    One folder for each class, by its WordNet id, with its pictures in any size as `.jpg`, `.jpeg`
    or `.png`: `FOLDER/n01532829/anything.jpg`. Classes of other splits may be there or not; a
    folder with all of ImageNet would do, but the published set has 600 pictures of each class.

    Args:
      split: "train" (64 classes), "val" (16), "trainval" or "test" (20), named by WordNet ids.
      folder: where they are.
      size: side in pixels of the square to which pictures are stretched, by Pillow's Lanczos
        filter; published: 84.
      cache_dir: as in `load_images`.
      progress: as in `load_images`.

    Returns:
      Pictures `(n, size, size, 3)` class by class, in the order of their files' names.

    Raises:
      DataError: a folder, class or split is missing, or a picture can't be read.

    Ravi, Larochelle: Optimization as a Model for Few-Shot Learning, 2017, section 5.1.
    """
    names = frozen_classes("mini_imagenet", split)
    if size < 1:
        raise DataError(f"size is {size}; give the side in pixels, 1 or more")
    root = Path(folder).expanduser()
    files = _list_pictures(root, names)
    described = [f"{file.parent.name}/{file.name} {file.stat().st_size}" for file, _ in files]
    key = digest(split, *described)
    cache = cache_folder(cache_dir) / f"mini_imagenet-{split}-{size}-{key}-v{CACHE_FORMAT}.npz"

    def decode() -> LabelledImages:
        images = np.empty((len(files), size, size, 3), np.uint8)
        for index, (file, _) in enumerate(files):
            images[index] = _read_picture(file, size)
            if progress is not None:
                progress(index + 1, len(files))
        return LabelledImages(images, np.array([label for _, label in files], np.int32), names)

    with missing_package_named("miniImageNet"):
        return cached(cache, decode)


def _list_pictures(root: Path, names: tuple[str, ...]) -> list[tuple[Path, int]]:
    """The files of all classes, each with the number of its class."""
    if not root.is_dir():
        raise DataError(
            f"folder {root} does not exist; name the folder of miniImageNet, with a folder of "
            f"pictures for each class, such as {names[0]}"
        )
    files = [
        (file, label)
        for label, name in enumerate(names)
        for file in sorted((root / name).glob("*"))
        if file.suffix.lower() in _PICTURES
    ]
    there = {label for _, label in files}
    missing = [name for label, name in enumerate(names) if label not in there]
    if missing:
        listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise DataError(
            f"folder {root} has no pictures of {len(missing)} of {len(names)} classes: {listed}; "
            f"put those of each class, {', '.join(_PICTURES)}, in a folder of its name there"
        )
    return files


def _read_picture(file: Path, size: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(file) as picture:
            square = picture.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"can't read the picture {file} ({error}); replace or remove it") from None
    return np.asarray(square)
