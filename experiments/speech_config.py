"""Settings of `experiments.speech`: fields, presets by recordings."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from experiments import program

SourceName = Literal["tones", "free_spoken_digit"]


@dataclass(frozen=True)
class Config:
    source: SourceName = "tones"
    """Recordings: "tones" are embedded; "free_spoken_digit" is a set of TFDS."""
    data_dir: Path | None = None
    """Folder of TFDS data sets; without it $TFDS_DATA_DIR, then TFDS's own default."""
    conditional: bool = True
    """Whether the model is told who speaks and what is said."""

    num_filters: int = 32
    """Channels that the net's layers hand on."""
    num_skip: int = 64
    """Channels of its head."""
    num_layers: int = 9
    """Layers of a stack; the dilations double from 1."""
    num_stacks: int = 2
    """Stacks of layers, one upon the other."""

    steps: int = 1000
    """Steps of training."""
    batch_size: int = 4
    """Excerpts of recordings in a step."""
    excerpt: int = 1536
    """Samples of an excerpt that count, at most."""
    warm_up: int = 512
    """Samples before them that the net sees, where the recording has them."""
    rate: float = 4e-3
    """Learning rate of Adam, which decays to zero along a cosine."""
    validate_every: int = 200
    """Steps between validations; the parameters that validate best are the result."""
    num_validation: int | None = 18
    """Recordings of a validation, spread over all; without it all."""
    num_test: int | None = None
    """Recordings of the test, spread over all; without it all."""
    ngram: int = 3
    """Codes of the longest n-grams that it is compared with."""
    chunk: int = 8
    """Excerpts that a device evaluates at once."""

    digit: str | None = None
    """What samples say, such as 7, or the name of a melody; without it all in turn."""
    speaker: str | None = None
    """Who says it, such as jackson, or the name of a voice; without it all in turn."""
    num_samples: int = 8
    """Recordings that are made."""
    seconds: float = 0.5
    """How long each is."""
    temperature: float = 1.0
    """1 draws samples as the model says, less what it deems likelier."""
    top_p: float = 1.0
    """Draw among the likeliest codes that together have this probability."""

    seed: int = 0
    """Fixes initialisation, excerpts and samples."""
    num_devices: int | None = None
    """Devices to use; without it all, and on a CPU one for each core."""
    run_dir: Path = Path("runs/speech")
    """Where everything of the run is written."""
    resume: bool = False
    """Go on from the last checkpoint of the run's folder."""

    MAY_CHANGE: ClassVar = (
        "digit",
        "speaker",
        "num_samples",
        "seconds",
        "temperature",
        "top_p",
    )

    @property
    def dilations(self) -> tuple[int, ...]:
        """Of the net's layers."""
        return tuple(2**i for i in range(self.num_layers)) * self.num_stacks


PRESETS = {
    "tones": Config(),
    "smoke": Config(
        num_filters=8,
        num_skip=16,
        num_layers=4,
        num_stacks=1,
        steps=4,
        excerpt=256,
        warm_up=64,
        validate_every=2,
        num_validation=3,
        num_test=9,
        num_samples=3,
        seconds=0.05,
    ),
    "digits": Config(
        source="free_spoken_digit",
        steps=7000,
        batch_size=4,
        validate_every=1000,
        num_validation=60,
        num_samples=10,
    ),
}


def with_conditional(preset: Config, line: Config) -> Config:
    """The preset's settings in a folder that tells whether the model is conditional."""
    kind = "" if line.conditional else "-unconditional"
    return replace(preset, run_dir=preset.run_dir.with_name(f"{preset.run_dir.name}{kind}"))


def check(config: Config) -> None:
    """Raises a UserError for settings that would fail only after training, or without sense."""
    least = dict.fromkeys(
        (
            "num_filters",
            "num_skip",
            "num_layers",
            "num_stacks",
            "steps",
            "batch_size",
            "excerpt",
            "validate_every",
            "ngram",
            "chunk",
            "num_samples",
        ),
        1,
    )
    least |= {"warm_up": 0}
    # An interval needs two.
    least |= {
        name: 2 for name in ("num_validation", "num_test") if getattr(config, name) is not None
    }
    program.require(
        *(
            (getattr(config, name) >= low, f"{name} is {getattr(config, name)}; give {low} or more")
            for name, low in least.items()
        ),
        (config.rate > 0, f"rate is {config.rate}; give more than 0"),
        (
            config.ngram <= 7,
            f"ngram is {config.ngram}; give 7 or less, that n-grams of 256 codes can be counted",
        ),
        (config.seconds > 0, f"seconds is {config.seconds}; give more than 0"),
        (config.temperature >= 0, f"temperature is {config.temperature}; give 0 or more"),
        (0 < config.top_p <= 1, f"top_p is {config.top_p}; give a probability over 0"),
        (
            config.conditional or (config.digit is None and config.speaker is None),
            "digit and speaker ask for a model that is told them; give --conditional, or neither",
        ),
    )
