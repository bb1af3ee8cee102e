"""Settings of `experiments.time_series`: fields, presets by data."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from experiments import program

DatasetName = Literal[
    "waves",
    "tones",
    "ucr_gun_point",
    "ucr_italy_power_demand",
    "ucr_arrow_head",
    "ucr_osu_leaf",
    "ucr_basic_motions",
    "ucr_japanese_vowels",
    "free_spoken_digit",
]
MethodName = Literal["cpc", "order_verification", "arrow_of_time"]

UCR: tuple[DatasetName, ...] = (
    "ucr_gun_point",
    "ucr_italy_power_demand",
    "ucr_arrow_head",
    "ucr_osu_leaf",
    "ucr_basic_motions",
    "ucr_japanese_vowels",
)
SOUNDS: tuple[DatasetName, ...] = ("tones", "free_spoken_digit")


@dataclass(frozen=True)
class Config:
    method: MethodName = "cpc"
    """How features are learned without labels."""
    datasets: tuple[DatasetName, ...] = ("waves",)
    """Sets, one after the other, each with a net of its own: "waves" and "tones" are embedded, the
    others are sets of TFDS. Sounds are judged by digit (of tones: melody) and speaker."""
    data_dir: Path | None = None
    """Folder of TFDS data sets; without it $TFDS_DATA_DIR, then TFDS's own default."""

    num_features: int = 64
    """Of a frame."""
    num_context: int = 64
    """Of the state of the GRU."""
    num_steps: int = 6
    """Frames ahead that CPC predicts."""
    negatives: Literal["batch", "sequence"] = "batch"
    """What CPC tells a frame from: those of all sequences, or of its own."""
    crop: float = 0.8
    """Entries of an excerpt: of a series its share, of sounds seconds."""

    steps: int = 1000
    """Steps of training, of the supervised net too."""
    batch_size: int = 16
    """Excerpts in a step."""
    rate: float = 1e-3
    """Learning rate of Adam, which decays to zero along a cosine."""

    held_out: tuple[str, ...] = ()
    """Speakers whose recordings no net learns from, two or more; few shots are then of theirs."""
    num_test_tasks: int = 1000
    """Test episodes for each number of shots."""
    num_queries: int = 5
    """Queries of each class in them."""

    seed: int = 0
    """Fixes initialisation and excerpts; the test episodes are the same for every seed."""
    num_devices: int | None = None
    """Devices to use; without it all, and on a CPU one for each core."""
    run_dir: Path = Path("runs/time_series")
    """Where everything of the run is written, a folder for each set."""
    resume: bool = False
    """Go on from the last checkpoint of the run's folder."""


PRESETS = {
    "waves": Config(),
    "smoke": Config(
        num_features=8, num_context=8, num_steps=2, steps=2, batch_size=4, num_test_tasks=4
    ),
    "ucr": Config(datasets=UCR),
    "tones": Config(datasets=("tones",), num_steps=8, crop=0.25, steps=500),
    "digits": Config(datasets=("free_spoken_digit",), num_steps=8, crop=0.4, steps=2000, rate=2e-3),
}
PRESETS["new-speakers"] = replace(PRESETS["digits"], held_out=("nicolas", "theo", "yweweler"))


def with_method(preset: Config, line: Config) -> Config:
    """The preset's settings in a folder that is called after the method, too."""
    run_dir = preset.run_dir.with_name(f"{preset.run_dir.name}-{line.method}")
    return replace(preset, method=line.method, run_dir=run_dir)


def check(config: Config) -> None:
    """Raises a UserError for settings that would fail only after training, or without sense."""
    least = {
        "num_features": 1,
        "num_context": 1,
        "num_steps": 1,
        "steps": 1,
        "batch_size": 2,
        "num_test_tasks": 2,
        "num_queries": 1,
    }
    sounds = [name for name in config.datasets if name in SOUNDS]
    series = [name for name in config.datasets if name not in SOUNDS]
    program.require(
        *(
            (getattr(config, name) >= low, f"{name} is {getattr(config, name)}; give {low} or more")
            for name, low in least.items()
        ),
        (
            0 < len(config.datasets) == len(set(config.datasets)),
            f"datasets are {', '.join(config.datasets) or 'none'}; give one or more, each once",
        ),
        (config.rate > 0, f"rate is {config.rate}; give more than 0"),
        (config.crop > 0, f"crop is {config.crop}; give more than 0"),
        (
            not series or config.crop <= 1,
            f"crop is {config.crop}, a share of each series; give 1 or less",
        ),
        (
            not sounds or config.method == "cpc",
            f"{config.method} asks for sequences of one length, and {', '.join(sounds)} has sounds "
            "of many; give --method cpc",
        ),
        (
            not config.held_out or not series,
            f"held_out names speakers, and {', '.join(series)} has none; leave it out",
        ),
        (
            len(set(config.held_out)) == len(config.held_out) != 1,
            f"held_out is {' '.join(config.held_out)}; give two or more speakers, each once, "
            "between whom few shots can tell",
        ),
    )
