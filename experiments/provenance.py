"""What stands behind a number: versions, device, commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

_NO_RESULTS = ":(exclude,top,glob)*/results/**"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "metagen_jax")


def provenance() -> dict[str, Any]:
    """The versions, the device and the commit behind a number."""
    versions = {package: _version(package) for package in _PACKAGES}
    commit = _git("rev-parse", "HEAD")
    return {
        "versions": {"python": platform.python_version(), **versions},
        "device": {
            "kind": jax.devices()[0].device_kind,
            "count": len(jax.devices()),
            "cores": num_cores(),
            "processor": _processor(),
        },
        "commit": commit or None,
        # What earlier programs of a series have written is no change of the code.
        "dirty": bool(_git("status", "--porcelain", ":/", _NO_RESULTS)) if commit else None,
    }


def num_cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str | None:
    """The model of the processor; None where the system doesn't say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else None


def _git(*arguments: str) -> str | None:
    """What git says about the folder of this file; None where there is no git or no repository."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
