"""Fixtures for all tests."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

# Most of a test's time is compilation, and half of that optimises what then runs for milliseconds.
# Read when JAX is imported, by programs that tests start as well; 0 tests what users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0" and version("jaxlib").startswith("0.10."):
    # Half of the rest sets up a compiler for each fusion and shares small programs out among
    # threads. XLA ends the process at a flag that it does not know, as newer ones do at the first.
    faster = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{faster} {os.environ.get('XLA_FLAGS', '')}"

import jax
import pytest
from jaxtyping import config, install_import_hook

# The collector would go through all that JAX keeps, thousands of times.
gc.set_threshold(100_000, 20, 50)

# The types and shapes in signatures are checked wherever a test calls, here and nowhere else.
install_import_hook("metagen_jax", "type_checker.check_types")

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


@pytest.fixture
def ill_typed():
    """Lets a test call with what the signatures forbid, as a user may."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
