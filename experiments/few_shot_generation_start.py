"""What `experiments.few_shot_generation` begins with: fresh parameters, or those of a run."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments import program
from experiments.few_shot_generation_config import WITH_RULE, Config
from experiments.few_shot_generation_learners import Learner
from metagen_jax.data.episodes import ClassData
from metagen_jax.training import load_params
from metagen_jax.types import MetaParams, Params

# Images by which flows set their first scales.
NUM_INIT = 100
# Settings of which classes a run has learned from, and of how it saw them.
_OF_IMAGES = ("dataset", "split", "image_size", "resampling", "values")
_ADVICE = "give the run_dir of a run for --init-from"


class Averaged(NamedTuple):
    """Parameters that are trained, and the moving average that follows them."""

    current: Params
    average: Params


def check_start(config: Config) -> None:
    """Raises a UserError for a run of `--init-from` of another model, or of other images.

    Of another split it may have learned from classes that are to be unseen here.
    """
    folder = config.init_from
    if folder is None:
        return
    learned = program.read_settings(folder, advice=_ADVICE)
    program.require(
        *(
            (
                learned.get(name) == getattr(config, name),
                f"{folder} is of a run with {name} {learned.get(name)}, here it is "
                f"{getattr(config, name)}; {_ADVICE} that has this {name}",
            )
            for name in ("model", *_OF_IMAGES)
        ),
        (
            config.model == "gan" or learned.get("learner") not in WITH_RULE,
            f"{folder} is of a run by {learned.get('learner')}, whose parameters have those of its "
            f"rule beside them; {_ADVICE} by another learner, such as pretrained",
        ),
    )


def check_resumed(config: Config) -> None:
    """Raises a UserError if a run to be tested again was trained with other draws than now."""
    if not (config.resume and (config.run_dir / program.CONFIG).exists()):
        return
    advice = "give another --run-dir"
    before = program.read_settings(config.run_dir, advice=advice).get("replacement", "never")
    program.require(
        (
            (before == "always") == (config.replacement == "always"),
            f"run_dir {config.run_dir} holds a run trained with --replacement {before}, here it is "
            f"{config.replacement}; only never and test may change without training anew: {advice}",
        )
    )


def first_params(config: Config, learner: Learner, data: ClassData) -> Params:
    """Parameters before training: scaled by the first draws of some images, or of another run."""
    images = data.examples[:: max(1, len(data.examples) // NUM_INIT)][:NUM_INIT]
    init_key, _ = jax.random.split(jax.random.key(config.seed))
    paper = 127 if config.values == "bernoulli" else 0
    params = jax.jit(learner.init)(init_key, (images > paper).astype(np.int32))
    if config.init_from is None:
        return params
    if isinstance(params, MetaParams):  # The model's own; the rule begins as ever.
        return params._replace(init=params_of_run(config.init_from, params.init))
    return params_of_run(config.init_from, params)


def params_of_run(run_dir: Path, like: Params) -> Params:
    """The best parameters of another run, of the average if it has one; see `check_start`."""
    settings = program.read_settings(run_dir, advice=_ADVICE)
    if settings.get("average_decay"):
        return load_params(run_dir, Averaged(like, like)).average
    return load_params(run_dir, like)
