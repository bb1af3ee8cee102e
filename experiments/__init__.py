"""Experiments: each file is one program, `python -m experiments.NAME --preset PRESET`."""

import importlib.util
import sys

for _package in ("matplotlib", "rich", "tensorboardX", "tyro"):
    if importlib.util.find_spec(_package) is None:
        print(
            f"error: {_package} is not installed; experiments need the extra of that name: "
            "pip install --editable '.[experiments]'",
            file=sys.stderr,
        )
        raise SystemExit(2)
