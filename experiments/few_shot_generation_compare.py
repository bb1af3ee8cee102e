"""Another run of `experiments.few_shot_generation`, to compare with on the same test episodes."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from experiments import program
from experiments.few_shot_generation_config import Config
from metagen_jax.errors import UserError, one_line, writing
from metagen_jax.evaluation.estimates import Estimate, estimate

FIGURES = "nll_by_shots.npz"
_EPISODES = "episodes"

# Settings on which the episodes of the test depend.
_OF_EPISODES = (
    "dataset",
    "split",
    "sets_of",
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
    try:
        with np.load(folder / FIGURES) as values:
            arrays = dict(values)
        there = json.loads(arrays.pop(_EPISODES).item())
        per_task = {int(num_shots): nll for num_shots, nll in arrays.items()}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"can't read {folder / FIGURES} ({one_line(error)}); {advice}") from None
    here = _episodes(config)
    if different := [name for name in here if here[name] != there.get(name)]:
        pairs = ", ".join(f"{name} {there.get(name)} for {here[name]}" for name in different)
        raise UserError(
            f"the run in {folder} was tested on other episodes than this one will be: {pairs}; give"
            " one of the same"
        )
    name = f"{before['model']} by {before['learner']}"
    if name == f"{config.model} by {config.learner}":
        name += f" ({folder.name})"
    return Other(name, {num_shots: estimate(nll) for num_shots, nll in per_task.items()})


def save_figures(config: Config, figures: Mapping[int, Estimate]) -> None:
    """Keeps the figures of each episode, and what these depend on: a run may be tested again."""
    per_task: dict[str, Any] = {str(num_shots): nll.per_task for num_shots, nll in figures.items()}
    file = config.run_dir / FIGURES
    with writing(file):
        np.savez(file, **{_EPISODES: json.dumps(_episodes(config))}, **per_task)


def _episodes(config: Config) -> dict[str, Any]:
    """What the test episodes of a run depend on; of the shots, the most."""
    settings = asdict(config)
    return {name: settings[name] for name in _OF_EPISODES} | {
        "most shots": max(config.shots),
        "replacement at test": config.replacement != "never",
    }
