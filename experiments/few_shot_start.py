"""What starts from features of `experiments.representation`, and which of its runs may serve."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import program
from experiments.few_shot_config import Config
from experiments.representation_config import TWO_VIEWS
from metagen_jax.training import load_params
from metagen_jax.types import Params

# Those whose parameters are the net's alone.
STARTED = ("maml", "fomaml", "anil", "boil", "imaml", "prototypical", "proto_maml")


def check_start(init_from: Path, config: Config) -> None:
    """Raises a UserError if a learner can't start from the net of a run."""
    check_learned(init_from, config, "--init-from")
    program.require(
        (
            config.strided,
            "strided is False and the net of init_from has strided convolutions; leave "
            "--no-strided out",
        ),
        (
            config.learner in STARTED,
            f"learner is {config.learner}; with init_from give one of {', '.join(STARTED)}",
        ),
    )


def check_learned(folder: Path, config: Config, flag: str) -> None:
    """Raises a UserError if a run's net is another, or has learned from test characters."""
    advice = f"give the --run-dir of a run of experiments.representation as {flag}"
    learned = program.read_settings(folder, advice=advice)
    needed = {"num_filters": config.num_filters, "norm": config.norm}
    check_net(folder, learned, needed, advice=advice)
    check_split(folder, learned, config.dataset, config.split, advice=advice)


def check_net(
    folder: Path, learned: Mapping[str, Any], needed: Mapping[str, Any], *, advice: str
) -> None:
    """Raises a UserError if a run has no four-block net, or one of other settings than needed."""
    program.require(
        *(
            (
                learned.get(name) == here,
                f"{folder} is of a run with {name} {learned.get(name)}, here it is {here}; "
                f"{advice} that has this {name}",
            )
            for name, here in needed.items()
        ),
        (
            learned.get("net") == "conv4" and learned.get("method") in TWO_VIEWS,
            f"{folder} is of a run with another net than four blocks; {advice} by one of "
            f"{', '.join(TWO_VIEWS)}, with --net conv4",
        ),
    )


def check_split(
    folder: Path, learned: Mapping[str, Any], dataset: str, split: str, *, advice: str
) -> None:
    """Raises a UserError if a run may have learned from characters that are to be unseen."""
    program.require(
        (
            learned.get("dataset") != "omniglot"
            or dataset != "omniglot"
            or learned.get("split") == split,
            f"{folder} has learned from the split {learned.get('split')}, here it is {split}, of "
            f"whose test characters some may be among those; {advice} on this split",
        )
    )


def start_from(init_from: Path, params: Params) -> Params:
    """Parameters whose net is that of a run of `experiments.representation`; a head stays new."""
    blocks = {name: leaves for name, leaves in params["params"].items() if name != "head"}
    learned = load_params(init_from / "net", {"params": blocks})
    return {"params": {**params["params"], **learned["params"]}}
