"""Few-shot learning that starts from features of `experiments.representation`."""

from pathlib import Path

from experiments import program
from experiments.few_shot_config import Config
from metagen_jax.training import load_params
from metagen_jax.types import Params

# Those whose parameters are the net's alone.
STARTED = ("maml", "fomaml", "anil", "boil", "imaml", "prototypical", "proto_maml")


def check_start(init_from: Path, config: Config) -> None:
    """Raises a UserError if a run's net is another, or has learned from test characters."""
    advice = "give the --run-dir of a run of experiments.representation as --init-from"
    learned = program.read_settings(init_from, advice=advice)
    for name in ("num_filters", "norm"):
        there, here = learned.get(name), getattr(config, name)
        program.require(
            (
                there == here,
                f"init_from {init_from} is of a run with {name} {there}, here it is {here}; "
                f"{advice} that has this {name}",
            )
        )
    program.require(
        (
            learned.get("net") == "conv4" and learned.get("method") in ("simclr", "byol"),
            f"init_from {init_from} is of a run with another net than four blocks; {advice} by "
            "simclr or byol with --net conv4",
        ),
        (
            config.strided,
            "strided is False and the net of init_from has strided convolutions; leave "
            "--no-strided out",
        ),
        (
            config.learner in STARTED,
            f"learner is {config.learner}; with init_from give one of {', '.join(STARTED)}",
        ),
        (
            learned.get("dataset") != "omniglot"
            or config.dataset != "omniglot"
            or learned.get("split") == config.split,
            f"init_from {init_from} has learned from the split {learned.get('split')}, here it is "
            f"{config.split}, of whose test characters some may be among those; {advice} on this "
            "split",
        ),
    )


def start_from(init_from: Path, params: Params) -> Params:
    """Parameters whose net is that of a run of `experiments.representation`; a head stays new."""
    blocks = {name: leaves for name, leaves in params["params"].items() if name != "head"}
    learned = load_params(init_from / "net", {"params": blocks})
    return {"params": {**params["params"], **learned["params"]}}
