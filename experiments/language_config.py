"""Settings of `experiments.language`: fields, presets by task and data."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from experiments import program

TaskName = Literal["masked", "order", "classification"]

DatasetName = Literal["topics", "wikitext2_articles", "sgd_dialogues"]


@dataclass(frozen=True)
class Config:
    task: TaskName = "masked"
    """What is learned: hidden tokens; then, from the net that has learned these, the order of two
    segments, or the class of a text from few labels."""
    dataset: DatasetName = "topics"
    """"topics" is embedded, the reference of Python; the others are sets of TFDS. Classes are
    topics, or the services of a dialogue."""
    data_dir: Path | None = None
    """Folder of TFDS data sets; without it $TFDS_DATA_DIR, then TFDS's own default."""
    encoder: Path | None = None
    """Folder of a finished run of the task "masked", whose net and tokens the other tasks begin
    with; without it they first make one."""

    vocab_size: int = 2000
    """Tokens at most, of byte-pair encoding."""
    row_length: int = 128
    """Tokens of a row."""
    segment_length: int = 40
    """Tokens that a segment has at least, in whole sentences or turns, where their order is
    asked."""
    pair_length: int = 128
    """Tokens of a pair of segments, special ones included; at most `row_length`."""
    width: int = 128
    """Features of a token."""
    depth: int = 4
    """Blocks of the transformer."""
    num_heads: int = 8
    """Heads of an attention, an even number: half of them look back and half ahead, each 16 times
    as far as the one before."""

    mask_share: float = 0.15
    """Of the tokens, how many are hidden."""
    whole_words: bool = False
    """Hide all tokens of a word or none."""
    steps: int = 3000
    """Steps of masked language modelling."""
    batch_size: int = 32
    """Rows in one of these steps."""
    rate: float = 2e-3
    """Learning rate of Adam there; it rises over a twentieth of the steps, then decays to zero."""
    tune_steps: int = 1000
    """Steps of the other tasks."""
    tune_batch_size: int = 32
    """Texts, or pairs of segments, in one of these steps."""
    tune_rate: float = 3e-4
    """Learning rate there, which moves likewise."""
    num_draws: int = 2
    """Choices of the texts whose labels are given, where these are a part."""
    num_test: int | None = None
    """Texts of each part, the first ones; without it all."""

    seed: int = 0
    """Fixes initialisation, batches and masks; those of validation and test are the same for every
    seed."""
    num_devices: int | None = None
    """Devices to use; without it all, and on a CPU one for each core."""
    run_dir: Path = Path("runs/language")
    """Where everything of the run is written."""
    resume: bool = False
    """Go on from the last checkpoint of the run's folder."""


PRESETS = {
    # Little text has few long tokens often enough.
    "topics": Config(vocab_size=500, segment_length=30, steps=2000),
    "smoke": Config(
        vocab_size=300,
        row_length=32,
        segment_length=4,
        pair_length=32,
        width=8,
        depth=1,
        num_heads=2,
        steps=2,
        batch_size=8,
        tune_steps=2,
        tune_batch_size=8,
        num_draws=1,
        num_test=100,
    ),
    "wikitext2": Config(dataset="wikitext2_articles", vocab_size=500, segment_length=1),
    "dialogues": Config(dataset="sgd_dialogues", segment_length=1, pair_length=64),
}

# Of many trainings each is short.
_BY_TASK: dict[TaskName, dict[str, Any]] = {
    "classification": {"tune_steps": 300, "tune_rate": 1e-3},
}


def with_task(preset: Config, line: Config) -> Config:
    """The preset's settings with those that the task of the command line brings."""
    is_smoke = preset == replace(PRESETS["smoke"], run_dir=preset.run_dir)
    changes = {} if is_smoke else _BY_TASK.get(line.task, {})
    run_dir = preset.run_dir.with_name(f"{preset.run_dir.name}-{line.task}")
    return replace(preset, **changes, task=line.task, run_dir=run_dir)


def check(config: Config) -> None:
    """Raises a UserError for settings that would fail only after training, or without sense."""
    least = {
        "vocab_size": 262,
        "row_length": 8,
        "segment_length": 1,
        "pair_length": 8,
        "width": 1,
        "depth": 1,
        "num_heads": 2,
        "steps": 1,
        "batch_size": 1,
        "tune_steps": 1,
        "tune_batch_size": 2,
        "num_draws": 1,
    }
    if config.num_test is not None:
        least["num_test"] = 20
    program.require(
        *(
            (getattr(config, name) >= low, f"{name} is {getattr(config, name)}; give {low} or more")
            for name, low in least.items()
        ),
        *(
            (getattr(config, name) > 0, f"{name} is {getattr(config, name)}; give more than 0")
            for name in ("rate", "tune_rate")
        ),
        *(
            (
                getattr(config, name) % max(config.num_devices or 1, 1) == 0,
                f"{name} is {getattr(config, name)} for {config.num_devices} devices; give a "
                "multiple",
            )
            for name in ("batch_size", "tune_batch_size")
        ),
        (
            0 < config.mask_share < 1,
            f"mask_share is {config.mask_share}; give more than 0 and less than 1",
        ),
        (
            config.pair_length <= config.row_length,
            f"pair_length is {config.pair_length} and row_length {config.row_length}; give at most "
            "that",
        ),
        (
            config.num_heads % 2 == 0,
            f"num_heads is {config.num_heads}; half of them look back and half ahead, give an even "
            "number",
        ),
        (
            config.width % max(config.num_heads, 1) == 0,
            f"width is {config.width} for {config.num_heads} heads; give a multiple of num_heads",
        ),
        (
            config.encoder is None or config.task != "masked",
            "encoder is the folder of a run of the task masked, which this one is itself; leave it "
            "out, or give --task order or classification",
        ),
        (
            config.task != "classification" or config.dataset != "wikitext2_articles",
            "wikitext2_articles has no classes; give --dataset topics or sgd_dialogues",
        ),
    )
