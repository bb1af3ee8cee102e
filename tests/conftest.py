"""Fixtures for all tests."""

import os
from pathlib import Path

import jax
import pytest

# Eight devices for the tests of parallel.py, before JAX counts them; programs that tests start as
# processes of their own still have one.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real TFDS data sets: $TFDS_DATA_DIR, or shared/data beside the repository."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TFDS_DATA_DIR", beside)).expanduser()
    if not (folder / "omniglot").is_dir():
        pytest.skip(f"no Omniglot in {folder}: set TFDS_DATA_DIR to a folder of TFDS data sets")
    return folder
