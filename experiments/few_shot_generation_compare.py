"""Another run of `experiments.few_shot_generation`, to compare with on the same test episodes."""

import zipfile
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from experiments import program
from experiments.few_shot_generation_config import Config
from metagen_jax.errors import UserError, one_line
from metagen_jax.evaluation.estimates import Estimate, estimate

FIGURES = "nll_by_shots.npz"

# Settings on which the episodes of the test depend.
_OF_EPISODES = (
    "dataset",
    "split",
    "image_size",
    "resampling",
    "values",
    "num_test_classes",
    "num_test_tasks",
    "test_queries",
)


class Other(NamedTuple):
    """Another run: what to call it, and by number of shots its figures, in nats."""

    name: str
    figures: dict[int, Estimate]


def load_other(config: Config) -> Other | None:
    """The run of `--against`, if any.

    Raises:
      UserError: it is no finished run, or one of other test episodes.
    """
    folder = config.against
    if folder is None:
        return None
    advice = "give the run_dir of a finished run for --against"
    before = program.read_settings(folder, advice=advice)
    here, there = _episodes(asdict(config)), _episodes(before)
    if different := [name for name in here if here[name] != there[name]]:
        pairs = ", ".join(f"{name} {there[name]} for {here[name]}" for name in different)
        raise UserError(
            f"the run in {folder} was tested on other episodes than this one will be: {pairs}; give"
            " one of the same"
        )
    try:
        with np.load(folder / FIGURES) as values:
            per_task = {int(num_shots): values[num_shots] for num_shots in values.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"can't read {folder / FIGURES} ({one_line(error)}); {advice}") from None
    name = f"{before['model']} by {before['learner']}"
    if name == f"{config.model} by {config.learner}":
        name += f" ({folder.name})"
    return Other(name, {num_shots: estimate(nll) for num_shots, nll in per_task.items()})


def _episodes(settings: dict[str, Any]) -> dict[str, Any]:
    """What the test episodes of a run depend on; of the shots, the most."""
    episodes = {name: settings.get(name) for name in _OF_EPISODES}
    shots = settings.get("shots") or [None]
    replaced = settings.get("replacement", "never") != "never"
    return episodes | {"most shots": shots[-1], "replacement at test": replaced}
