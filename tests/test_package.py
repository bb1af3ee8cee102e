"""What importing the package costs, and what it must not contain."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [p for part in ("metagen_jax", "experiments") for p in (ROOT / part).rglob("*.py")]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_nothing_pickles():
    for path in SOURCES:
        assert not {"pickle", "cloudpickle", "dill", "joblib"} & set(imported(path)), path
        assert "allow_pickle=True" not in path.read_text(), path


def test_the_package_does_not_import_experiments_and_arrays_do_not_import_nets():
    for path in SOURCES:
        part = path.relative_to(ROOT).parts
        if part[0] == "metagen_jax":
            assert not any(name.startswith("experiments") for name in imported(path)), path
            if part[1] in ("meta", "types.py", "gradients.py", "supervised.py"):
                assert not any("metagen_jax.nets" in name for name in imported(path)), path


def test_files_stay_short():
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 400, path


def test_importing_brings_no_extra():
    code = (
        "import sys, metagen_jax; "
        "print(*[m for m in ('tensorflow_datasets', 'matplotlib', 'orbax', 'rich', 'tyro', "
        "'tensorboardX', 'tokenizers', 'safetensors') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0
    # flax.linen itself imports some of Orbax and rich.
    assert not {
        "tensorflow_datasets",
        "matplotlib",
        "tyro",
        "tensorboardX",
        "tokenizers",
        "safetensors",
    } & set(run.stdout.split())


@pytest.mark.slow
def test_importing_takes_under_one_and_a_half_times_its_dependencies():
    def seconds(code):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        return time.perf_counter() - start

    pairs = [
        (seconds("import metagen_jax"), seconds("import jax, flax.linen, optax")) for _ in range(4)
    ]
    ours, theirs = (min(times) for times in zip(*pairs, strict=True))
    assert ours < 1.5 * theirs
