"""Decoded images on disk, in NumPy's format without pickle."""

import contextlib
import hashlib
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from metagen_jax.data.classes import LabelledImages
from metagen_jax.errors import DataError

Folder = str | os.PathLike[str]

CACHE_FORMAT = 1
"""Part of every file's name: raise it when the same request gives other pixels or labels."""


@contextlib.contextmanager
def missing_package_named(name: str) -> Iterator[None]:
    """Turns the import error of a package that decoding needs into a DataError that names it."""
    try:
        yield
    except ModuleNotFoundError as error:
        packages = {"PIL": "pillow", "tensorflow_datasets": "tensorflow-datasets"}
        module = str(error.name).partition(".")[0]
        package = packages.get(module, module)
        raise DataError(
            f"{name!r} can't be loaded without the package {package}; pip install {package}"
        ) from None


def digest(*parts: str | bytes) -> str:
    """A short name for all that decides what a cache file holds."""
    encoded = (part.encode() if isinstance(part, str) else part for part in parts)
    return hashlib.sha256(b"\0".join(encoded)).hexdigest()[:12]


def cache_folder(cache_dir: Folder | None) -> Path:
    """`cache_dir`, or $METAGEN_JAX_CACHE, or the user's usual folder for caches."""
    if folder := cache_dir or os.environ.get("METAGEN_JAX_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "metagen_jax"


def cached(file: Path, make: Callable[[], LabelledImages]) -> LabelledImages:
    """What `file` holds, or else what `make` gives, written to `file` all at once or not at all."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            names = tuple(arrays["class_names"].tolist())
            return LabelledImages(arrays["images"], arrays["labels"], names)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        warnings.warn(f"rebuilding the cache {file}, unreadable: {error}", stacklevel=4)
    data = make()
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            np.savez(stream, **data._asdict())
        os.replace(partial, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        warnings.warn(f"not cached, so to be decoded again next time: {error}", stacklevel=4)
    return data
