"""Settings of `experiments.few_shot_speech`: fields, presets by recordings."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from experiments import program


@dataclass(frozen=True)
class Config:
    source: Literal["voices", "free_spoken_digit"] = "voices"
    """Recordings: "voices" are embedded; "free_spoken_digit" is a set of TFDS."""
    num_speakers: tuple[int, int, int] = (8, 2, 2)
    """The first so many of them are trained on, the next validate, those after them test."""
    data_dir: Path | None = None
    """Folder of TFDS data sets; without it $TFDS_DATA_DIR, then TFDS's own default."""
    excerpt: int = 1024
    """Samples of an excerpt that count, at most."""
    warm_up: int = 512
    """Samples before them that the net sees in training, where the recording has them; in
    validation and test it sees as many as it can."""

    num_filters: int = 32
    """Channels that the net's layers hand on."""
    num_skip: int = 64
    """Channels of its head."""
    num_layers: int = 9
    """Layers of a stack; the dilations double from 1."""
    num_stacks: int = 2
    """Stacks of layers, one upon the other."""

    steps: int = 400
    """Steps of training before the ways part."""
    batch_size: int = 4
    """Recordings in one of these steps."""
    rate: float = 4e-3
    """Learning rate of Adam there, which decays to zero along a cosine."""
    meta_steps: int = 30
    """Outer steps of MAML. The conventional net takes as many as have as many gradients."""
    meta_rate: float = 1e-3
    """Learning rate of Adam from where the ways part, which moves likewise."""
    num_tasks: int = 2
    """Speakers in an outer step, with recordings of their own each."""
    num_shots: int = 5
    """Support recordings of a task, in training."""
    num_queries: int = 5
    """Query recordings, in training and test."""
    inner_steps: int = 3
    """Inner steps, in training."""
    inner_rate: float = 0.1
    """Learning rate of the inner SGD, in training."""
    gradient: Literal["first_order", "remat"] = "first_order"
    """Of MAML: "first_order", or "remat" with the second derivatives."""

    shots: tuple[int, ...] = (0, 1, 5)
    """Recordings of the speaker, at test."""
    sgd_rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    """Learning rates of SGD on these, of which and of Adam's the validation speakers choose one."""
    adam_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    """Learning rates of Adam on these."""
    test_steps: int = 10
    """Steps on them at most, of which they choose as well."""
    num_choice_tasks: int = 6
    """Episodes by which that is chosen."""
    num_test_tasks: int = 30
    """Episodes of each test speaker."""

    num_samples: int = 2
    """Sounds that are made for each test speaker, before and after hearing some."""
    seconds: float = 0.5
    """How long each is."""

    seed: int = 0
    """Fixes initialisation and training."""
    num_devices: int | None = None
    """Devices to use; without it all, and on a CPU one for each core."""
    run_dir: Path = Path("runs/few_shot_speech")
    """Where everything of the run is written."""
    resume: bool = False
    """Go on from the last checkpoint of the run's folder."""

    MAY_CHANGE: ClassVar = ("num_samples", "seconds")

    @property
    def rates(self) -> dict[str, tuple[float, ...]]:
        """Those to choose from, by optimiser."""
        return {"adam": self.adam_rates, "sgd": self.sgd_rates}

    @property
    def dilations(self) -> tuple[int, ...]:
        """Of the net's layers."""
        return tuple(2**i for i in range(self.num_layers)) * self.num_stacks


PRESETS = {
    "voices": Config(),
    "smoke": Config(
        excerpt=64,
        warm_up=16,
        num_filters=8,
        num_skip=16,
        num_layers=4,
        num_stacks=1,
        steps=2,
        meta_steps=2,
        num_shots=2,
        num_queries=2,
        inner_steps=1,
        shots=(0, 2),
        sgd_rates=(0.1,),
        adam_rates=(1e-3,),
        test_steps=2,
        num_choice_tasks=2,
        num_test_tasks=2,
        num_samples=1,
        seconds=0.05,
    ),
    "digits": Config(
        source="free_spoken_digit", num_speakers=(3, 1, 2), steps=5000, meta_steps=150
    ),
}


def with_gradient(preset: Config, line: Config) -> Config:
    """The preset's settings in a folder that tells which kind of gradient MAML takes."""
    return replace(
        preset, run_dir=preset.run_dir.with_name(f"{preset.run_dir.name}-{line.gradient}")
    )


def check(config: Config) -> None:
    """Raises a UserError for settings that would fail only after training, or without sense."""
    counts = ("excerpt", "num_filters", "num_skip", "num_layers", "num_stacks", "steps")
    counts += ("batch_size", "meta_steps", "num_tasks", "num_shots", "num_queries", "inner_steps")
    least = {**dict.fromkeys((*counts, "test_steps", "num_samples"), 1), "warm_up": 0}
    # An interval needs two.
    least |= {"num_choice_tasks": 2, "num_test_tasks": 2}
    learned, *others = config.num_speakers
    rates = (*config.sgd_rates, *config.adam_rates)
    program.require(
        *(
            (getattr(config, name) >= low, f"{name} is {getattr(config, name)}; give {low} or more")
            for name, low in least.items()
        ),
        *(
            (getattr(config, name) > 0, f"{name} is {getattr(config, name)}; give more than 0")
            for name in ("rate", "meta_rate", "inner_rate", "seconds")
        ),
        (
            learned >= 2 and min(others) >= 1,
            f"num_speakers is {config.num_speakers}; give two or more to learn from, one or more "
            "to validate and one or more to test",
        ),
        (
            min(rates, default=0) > 0,
            f"sgd_rates is {config.sgd_rates} and adam_rates {config.adam_rates}; give one rate or "
            "more, each more than 0",
        ),
        (
            min(config.shots, default=-1) >= 0 and len(set(config.shots)) == len(config.shots),
            f"shots is {config.shots}; give one or more numbers, none negative, each once",
        ),
        (
            config.num_samples <= config.num_queries,
            f"num_samples is {config.num_samples}; give at most num_queries, {config.num_queries}: "
            "they say what the queries say",
        ),
    )
