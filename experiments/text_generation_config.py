"""Settings of `experiments.text_generation`: fields, presets by texts."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from experiments import program

DatasetName = Literal["topics", "sgd_dialogues", "tiny_shakespeare", "wikitext2_articles"]


@dataclass(frozen=True)
class Config:
    dataset: DatasetName = "topics"
    """Texts: "topics" is embedded, the reference of Python; the others are sets of TFDS."""
    data_dir: Path | None = None
    """Folder of TFDS data sets; without it $TFDS_DATA_DIR, then TFDS's own default."""

    level: Literal["bytes", "characters"] = "bytes"
    """Tokens: byte-pair encoding, or characters."""
    vocab_size: int = 1000
    """Tokens at most."""
    width: int = 128
    """Features of a token."""
    depth: int = 4
    """Blocks of the transformer."""
    num_heads: int = 4
    """Heads of an attention."""
    warm_up: int = 64
    """Tokens of a text that are seen before those that count, at least, where it has them."""
    length: int = 192
    """Tokens that count, of an excerpt; with those before they are the most that the net sees."""

    steps: int = 1000
    """Steps of training."""
    batch_size: int = 8
    """Excerpts of texts in a step."""
    rate: float = 2e-3
    """Learning rate of Adam; it rises over a twentieth of the steps, then decays to zero."""
    weight_decay: float = 0.1
    """Decoupled, as AdamW has it: what a step takes of each parameter, as a share of the rate."""
    validate_every: int = 100
    """Steps between validations; the parameters that validate best are the result."""
    num_validation: int | None = 60
    """Texts of a validation, the first ones; without it all."""
    num_test: int | None = None
    """Texts of the test, the first ones; without it all."""
    ngram: int = 4
    """Tokens of the longest n-grams that it is compared with."""
    chunk: int = 8
    """Excerpts that a device evaluates at once."""

    prompt: str | None = None
    """What the texts that are made begin with; without it the first lines of test texts."""
    num_samples: int = 4
    """Texts that are made."""
    temperature: float = 1.0
    """1 draws tokens as the model says, less what it deems likelier, 0 its first choice."""
    top_p: float = 0.95
    """Draw among the likeliest tokens that together have this probability."""

    seed: int = 0
    """Fixes initialisation, excerpts and the texts that are made."""
    num_devices: int | None = None
    """Devices to use; without it all, and on a CPU one for each core."""
    run_dir: Path = Path("runs/text_generation")
    """Where everything of the run is written."""
    resume: bool = False
    """Go on from the last checkpoint of the run's folder."""

    MAY_CHANGE: ClassVar = ("prompt", "num_samples", "temperature", "top_p")

    @property
    def max_length(self) -> int:
        """Tokens that the net sees, and of a text that is made."""
        return self.warm_up + self.length


_OF_TFDS = Config(vocab_size=2000, steps=2500, validate_every=250)
PRESETS = {
    "topics": Config(),
    "smoke": Config(
        vocab_size=300,
        width=8,
        depth=1,
        num_heads=2,
        warm_up=4,
        length=12,
        steps=4,
        validate_every=2,
        num_validation=3,
        num_test=5,
        num_samples=2,
    ),
    "dialogues": replace(_OF_TFDS, dataset="sgd_dialogues"),
    "shakespeare": replace(_OF_TFDS, dataset="tiny_shakespeare"),
}


def check(config: Config) -> None:
    """Raises a UserError for settings that would fail only after training, or without sense."""
    least = dict.fromkeys(
        (
            "width",
            "depth",
            "num_heads",
            "length",
            "steps",
            "batch_size",
            "validate_every",
            "ngram",
            "chunk",
            "num_samples",
        ),
        1,
    )
    least |= {"warm_up": 0, "vocab_size": 262 if config.level == "bytes" else 6}
    # An interval needs two.
    least |= {
        name: 2 for name in ("num_validation", "num_test") if getattr(config, name) is not None
    }
    program.require(
        *(
            (getattr(config, name) >= low, f"{name} is {getattr(config, name)}; give {low} or more")
            for name, low in least.items()
        ),
        (
            config.width % max(config.num_heads, 1) == 0,
            f"width is {config.width} for {config.num_heads} heads; give a multiple of num_heads",
        ),
        (config.rate > 0, f"rate is {config.rate}; give more than 0"),
        (config.weight_decay >= 0, f"weight_decay is {config.weight_decay}; give 0 or more"),
        (
            (config.vocab_size + 1) ** config.ngram < 2**63,
            f"ngram is {config.ngram} and vocab_size {config.vocab_size}; give fewer, that there "
            "are less than 2^63 n-grams to count",
        ),
        (config.temperature >= 0, f"temperature is {config.temperature}; give 0 or more"),
        (0 < config.top_p <= 1, f"top_p is {config.top_p}; give a probability over 0"),
    )
