"""Settings of `experiments.representation`: fields, presets by method and data."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from experiments import program

MethodName = Literal[
    "simclr",
    "byol",
    "cpc",
    "context_prediction",
    "adjacent_patch",
    "inpainting",
    "mae",
    "colorization",
]

DatasetName = Literal["glyphs", "omniglot", "cifar10"]


@dataclass(frozen=True)
class Config:
    method: MethodName = "simclr"
    """How features are learned; it brings settings of its own, over which the flags win."""
    dataset: DatasetName = "glyphs"
    """"glyphs" is embedded; the others are sets of TFDS. Characters are judged by few shots of
    unseen ones, "cifar10" by a linear probe and nearest neighbours."""
    data_dir: Path | None = None
    """Folder of TFDS data sets; without it $TFDS_DATA_DIR, then TFDS's own default."""

    net: Literal["conv4", "resnet"] = "conv4"
    """Four max-pooled blocks, or three stages of residual blocks; "mae" has a transformer."""
    num_filters: int = 64
    """Channels of the first layer."""
    num_hidden: int = 128
    """Hidden units of the head."""
    num_projected: int = 64
    """Numbers that the loss compares."""
    temperature: float = 0.2
    """Of the cosines in a contrastive loss."""

    steps: int = 2000
    """Steps of training, of the supervised net too."""
    batch_size: int = 256
    """Images in a step."""
    rate: float = 2e-3
    """Learning rate of Adam, which decays to zero along a cosine."""

    num_test_tasks: int = 1000
    """Test episodes for each number of ways and shots."""
    num_queries: int = 5
    """Queries of each class in them."""
    num_images: int | None = None
    """Images of each part, the first ones in an order fixed once; without it all."""

    seed: int = 0
    """Fixes initialisation, batches and views; the test episodes are the same for every seed."""
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
        num_test_tasks=4,
        num_images=200,
    ),
    "omniglot": Config(dataset="omniglot", steps=6000, batch_size=512),
    "cifar10": Config(dataset="cifar10", net="resnet", num_filters=32, temperature=0.5, steps=2000),
}

# What a method is, whatever the data: nets that take patches of 8 pixels, or draw.
_BY_METHOD: dict[MethodName, dict[str, Any]] = {
    "cpc": {"net": "resnet", "num_filters": 32, "batch_size": 64},
    "context_prediction": {"net": "resnet", "num_filters": 32},
    "adjacent_patch": {"net": "resnet", "num_filters": 32},
    "inpainting": {"net": "resnet", "num_filters": 32, "batch_size": 64},
    "colorization": {"net": "resnet", "num_filters": 32, "batch_size": 64},
    "mae": {"num_filters": 128, "batch_size": 128},
}


def with_method(preset: Config, line: Config) -> Config:
    """The preset's settings with those that the method of the command line brings."""
    changes = dict(_BY_METHOD.get(line.method, {}))
    if preset == replace(PRESETS["smoke"], run_dir=preset.run_dir):
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
        (config.rate > 0, f"rate is {config.rate}; give more than 0"),
        (config.temperature > 0, f"temperature is {config.temperature}; give more than 0"),
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
            config.net == "resnet" or config.method in ("simclr", "byol", "mae"),
            f"{config.method} takes patches, or draws, and net is {config.net}; give --net resnet",
        ),
    )
