"""Settings of `experiments.representation`: fields, presets by method and data."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from experiments import program

MethodName = Literal[
    "simclr",
    "byol",
    "barlow_twins",
    "vicreg",
    "cpc",
    "context_prediction",
    "adjacent_patch",
    "adjacent_pixels",
    "inpainting",
    "mae",
    "colorization",
]

TWO_VIEWS: tuple[MethodName, ...] = ("simclr", "byol", "barlow_twins", "vicreg")
"""Those that compare two views of an image, whose net may be that of `experiments.few_shot`."""

DatasetName = Literal["glyphs", "omniglot", "cifar10"]


@dataclass(frozen=True)
class Config:
    method: MethodName = "simclr"
    """How features are learned; it brings settings of its own, over which the flags win."""
    dataset: DatasetName = "glyphs"
    """"glyphs" is embedded; the others are sets of TFDS. Characters are judged by few shots of
    unseen ones, "cifar10" by a linear probe and nearest neighbours."""
    split: Literal["vinyals", "lake", "random1000", "random1200", "alphabets45"] = "vinyals"
    """Class lists of Omniglot; take those of the program that is to use the features."""
    data_dir: Path | None = None
    """Folder of TFDS data sets; without it $TFDS_DATA_DIR, then TFDS's own default."""

    net: Literal["conv4", "resnet"] = "conv4"
    """The four strided blocks of `experiments.few_shot`, which can start from them, or stages of
    residual blocks, four for two views and three otherwise; "mae" has a transformer."""
    norm: Literal["batch", "group"] = "batch"
    """Of the four blocks: by the current batch of all devices, and frozen features by images of
    training that are always the same; or in groups, as the residual blocks have it."""
    num_filters: int = 64
    """Channels of the first layer."""
    num_hidden: int = 128
    """Hidden units of the head."""
    num_projected: int = 64
    """Numbers that the loss compares."""
    view_size: int | None = None
    """Height and width of a view, in pixels; without it those of the images."""
    temperature: float = 0.2
    """Of the cosines in a contrastive loss."""

    steps: int = 2000
    """Steps of training."""
    supervised_factor: float = 2.0
    """Steps of the supervised net for each of these; as one of two views costs half as much, this
    gives it the same budget."""
    batch_size: int = 256
    """Images in a step."""
    rate: float = 2e-3
    """Learning rate of Adam, which warms up in a twentieth of the steps and decays to zero along a
    cosine."""
    weight_decay: float = 0.0
    """Of all parameters, times the rate; more than 0 makes AdamW of Adam."""
    fine_tuning: bool = False
    """Also train the whole net on 1, 10 and 100 % of the labels of "cifar10", and likewise the net
    as it is initialised. SimCLR's preset of "cifar10" does."""
    tuning_steps: int = 300
    """Steps of 128 images of fine-tuning, for each share of the labels and each rate tried."""

    num_test_tasks: int = 1000
    """Test episodes for each number of ways and shots."""
    num_queries: int = 5
    """Queries of each class in them; with 5 shots at most 15 of Omniglot's 20 images."""
    num_images: int | None = None
    """Images of each part, the first ones in an order fixed once; without it all."""

    seed: int = 0
    """Fixes initialisation, batches and views; the test episodes are the same for every seed."""
    seeds: int = 1
    """Runs with so many seeds, this and those after it, each in a folder of its own; then the
    numbers are means over them, with 95 % intervals by Student's t."""
    num_devices: int | None = None
    """Devices to use; without it all, and on a CPU one for each core."""
    run_dir: Path = Path("runs/representation")
    """Where everything of the run is written."""
    resume: bool = False
    """Go on from the last checkpoint of the run's folder."""


PRESETS = {
    "glyphs": Config(),
    "smoke": Config(
        num_filters=8,
        num_hidden=16,
        num_projected=8,
        steps=2,
        batch_size=8,
        tuning_steps=2,
        num_test_tasks=4,
        num_images=200,
    ),
    "omniglot": Config(dataset="omniglot", steps=6800, batch_size=512),
    "cifar10": Config(dataset="cifar10", net="resnet", num_filters=16, temperature=0.5),
}

# What a method is, whatever the data: nets that take patches, or draw; and how many steps of the
# supervised net take as many multiplications as one of the method's.
_BY_METHOD: dict[MethodName, dict[str, Any]] = {
    "byol": {"supervised_factor": 2.5},
    "barlow_twins": {"num_hidden": 256, "num_projected": 256},
    "vicreg": {"num_hidden": 256, "num_projected": 256},
    "cpc": {"net": "resnet", "num_filters": 16, "batch_size": 64, "supervised_factor": 1.0},
    "context_prediction": {"net": "resnet", "num_filters": 32, "supervised_factor": 0.125},
    "adjacent_patch": {"net": "resnet", "num_filters": 32, "supervised_factor": 0.125},
    "adjacent_pixels": {"net": "resnet", "num_filters": 32, "supervised_factor": 0.0625},
    "inpainting": {
        "net": "resnet",
        "num_filters": 16,
        "batch_size": 64,
        "supervised_factor": 2.4,
    },
    "colorization": {
        "net": "resnet",
        "num_filters": 16,
        "batch_size": 128,
        "supervised_factor": 1.0,
    },
    "mae": {
        "num_filters": 128,
        "batch_size": 128,
        "rate": 1e-3,
        "weight_decay": 0.05,
        "supervised_factor": 0.33,
    },
}

# As many steps as one core takes in about 30 minutes, alone on the machine.
_ON_CIFAR: dict[MethodName, dict[str, Any]] = {
    "simclr": {"steps": 1700, "view_size": 24, "fine_tuning": True},
    "byol": {"steps": 1400, "view_size": 24},
    "barlow_twins": {"steps": 1700, "view_size": 24},
    "vicreg": {"steps": 1700, "view_size": 24},
    "cpc": {"steps": 1700},
    "context_prediction": {"steps": 4700},
    "adjacent_patch": {"steps": 4700},
    "adjacent_pixels": {"steps": 11000},
    "inpainting": {"steps": 2700},
    "colorization": {"steps": 3200},
    "mae": {"steps": 5000},
}


def with_method(preset: Config, line: Config) -> Config:
    """The preset's settings with those that the method of the command line brings."""
    changes = dict(_BY_METHOD.get(line.method, {}))
    if preset.dataset == "cifar10":
        changes |= _ON_CIFAR[line.method]
    if preset.steps < 10:  # Small ones stay so.
        changes = {name: value for name, value in changes.items() if name == "net"}
    run_dir = preset.run_dir.with_name(f"{preset.run_dir.name}-{line.method}")
    return replace(preset, **changes, method=line.method, run_dir=run_dir)


def check(config: Config) -> None:
    """Raises a UserError for settings that would fail only after training, or without sense."""
    least = {
        "num_filters": 1,
        "num_hidden": 1,
        "num_projected": 1,
        "steps": 1,
        "batch_size": 2,
        "tuning_steps": 1,
        "seeds": 1,
        "num_test_tasks": 2,
        "num_queries": 1,
    }
    if config.num_images is not None:
        least["num_images"] = 200  # Of fewer no 20 neighbours, and no 20-way episodes, are left.
    program.require(
        *(
            (getattr(config, name) >= low, f"{name} is {getattr(config, name)}; give {low} or more")
            for name, low in least.items()
        ),
        *(
            (getattr(config, name) > 0, f"{name} is {getattr(config, name)}; give more than 0")
            for name in ("rate", "temperature", "supervised_factor")
        ),
        (
            config.split == "vinyals" or config.dataset == "omniglot",
            f"split is {config.split} and dataset {config.dataset}; only omniglot has several "
            "class lists: leave --split out",
        ),
        (
            not config.fine_tuning or config.dataset == "cifar10",
            f"fine_tuning asks for classes with many labels, and of {config.dataset} those of the "
            "test are unseen; leave --fine-tuning out",
        ),
        (config.weight_decay >= 0, f"weight_decay is {config.weight_decay}; give 0 or more"),
        (
            config.view_size is None or (config.view_size >= 8 and config.method != "mae"),
            f"view_size is {config.view_size}; give 8 or more, and none to mae, whose patches have "
            "fixed places",
        ),
        (
            config.net == "resnet"
            or config.norm == "group"
            or config.dataset != "cifar10"
            or config.method == "mae",
            "norm is batch, by which fine-tuned answers of cifar10 would depend on one another; "
            "give --net resnet or --norm group",
        ),
        (
            config.num_filters % 8 == 0,
            f"num_filters is {config.num_filters}; give a multiple of 8, which the groups of the "
            "normalisation divide",
        ),
        (
            config.method != "colorization" or config.dataset == "cifar10",
            f"colorization asks for colours, and {config.dataset} has none; give --dataset cifar10",
        ),
        (
            config.net == "resnet" or config.method in (*TWO_VIEWS, "mae"),
            f"{config.method} takes patches, or draws, and net is {config.net}; give --net resnet",
        ),
    )
