"""Settings of `experiments.few_shot_generation`: fields, presets, what learner and model bring."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from experiments import program
from metagen_jax.data.resampling import Resampling
from metagen_jax.data.set_episodes import Drawn

LearnerName = Literal["maml", "fomaml", "reptile", "meta_sgd", "pretrained", "scratch", "amortised"]

ModelName = Literal[
    "vae", "conv_vae", "pixelcnn", "flow", "flow_matching", "gan", "set_vae", "attention_pixelcnn"
]

AMORTISED = ("set_vae", "attention_pixelcnn")
"""Models that take the support set for a condition, and need no steps on it."""


@dataclass(frozen=True)
class Config:
    learner: LearnerName = "maml"
    """How the model learns from a support set. "pretrained" is fine-tuning of a model of all
    training classes, "scratch" of none; "amortised" is that of the models that take the set in."""
    model: ModelName = "vae"
    """What is learned; it brings settings of its own, over which the flags win."""
    dataset: Literal["glyphs", "omniglot"] = "glyphs"
    """"glyphs" is embedded, "omniglot" is TFDS's."""
    split: Literal["lake", "random1000", "alphabets45"] = "lake"
    """Class lists of Omniglot."""
    data_dir: Path | None = None
    """Folder of TFDS data sets; without it $TFDS_DATA_DIR, then TFDS's own default."""
    image_size: int = 28
    """Height and width of the images, in pixels."""
    resampling: Resampling = "lanczos"
    """How Omniglot's pictures are made of that size."""
    values: Drawn = "stored"
    """Pixels are 0 and 1: more than half of the range, or drawn anew in each episode with the grey
    value for probability."""
    rotations: Literal[1, 4] = 1
    """4: in training a class may be turned by quarters; tests never are."""

    num_latents: int = 50
    """Latents of an image."""
    hidden_sizes: tuple[int, ...] = (200, 200)
    """Units of each hidden layer."""
    num_filters: int = 16
    """Channels of convolutional models."""
    num_layers: int = 5
    """Layers of a PixelCNN."""

    train_shots: int = 5
    """Support examples in training."""
    vary_shots: bool = True
    """1 to `train_shots` different ones, in their places again and again."""
    num_queries: int = 5
    """Query examples in training."""
    inner_optimizer: Literal["sgd", "adam"] = "sgd"
    """Of the steps on a support set; Reptile has its own."""
    inner_rate: float = 2e-4
    """Learning rate of the inner loop, or where the learned ones start."""
    inner_steps: int = 3
    """Inner steps in training."""

    steps: int = 2000
    """Outer steps."""
    num_tasks: int = 8
    """Tasks in an outer step."""
    outer_rate: float = 1e-3
    """Learning rate of the outer optimiser."""
    outer_optimizer: Literal["adam", "sgd"] = "adam"
    """The outer optimiser; SGD for Reptile."""
    chunk: int = 1
    """Tasks that a device works on at once; 1 is fastest on a CPU."""
    validate_every: int = 500
    """Outer steps between validations."""
    num_validation_tasks: int = 100
    """Episodes of a validation."""

    shots: tuple[int, ...] = (0, 1, 2, 3, 4, 9)
    """Support examples at test, each number for itself."""
    test_steps: int = 10
    """The most steps at test; how many are taken is chosen on validation classes for each number of
    shots."""
    tuned_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Rates for "pretrained" and "scratch", of which one is chosen likewise."""
    num_choice_tasks: int = 200
    """Episodes of validation classes by which steps and rates are chosen."""
    num_test_tasks: int = 1000
    """Episodes of the test, of one query each."""
    num_test_classes: int | None = None
    """Classes of the test, the first ones in an order that is always the same; without it all."""
    test_samples: int = 1000
    """Importance samples of the test, or draws of a flow's noise; exact models take none."""

    use_tasks: int = 0
    """Episodes in which a classifier learns from few images, with and without samples; 0: none."""
    use_ways: int = 5
    """Classes of such an episode."""
    use_shots: int = 1
    """Images of each class in it; one of `shots`."""
    use_samples: int = 10
    """Samples of each class that are added."""

    seed: int = 0
    """Fixes initialisation, episodes and noise; test episodes are the same for every seed."""
    num_devices: int | None = None
    """Devices to use; without it all, and on a CPU one for each core."""
    run_dir: Path = Path("runs/few_shot_generation")
    """Where everything of the run is written."""
    resume: bool = False
    """Go on from the last checkpoint of the run's folder."""


_OMNIGLOT = Config(dataset="omniglot", resampling="corner", steps=2000)

PRESETS = {
    "glyphs": Config(),
    "smoke": Config(
        steps=4,
        num_tasks=2,
        validate_every=2,
        num_validation_tasks=4,
        shots=(0, 1),
        test_steps=2,
        tuned_rates=(1e-3, 1e-2),
        num_choice_tasks=4,
        num_test_tasks=6,
        test_samples=5,
    ),
    "omniglot-lake": _OMNIGLOT,
    "omniglot-characters": replace(
        _OMNIGLOT, split="random1000", resampling="lanczos", values="bernoulli"
    ),
    "omniglot-alphabets": replace(
        _OMNIGLOT, split="alphabets45", image_size=26, resampling="darkest"
    ),
}

# Every training image of an episode, support or query, is one of its predictions.
_SETS: dict[str, Any] = {"train_shots": 9, "num_queries": 1, "vary_shots": False}

_BY_MODEL: dict[ModelName, dict[str, Any]] = {
    "conv_vae": {"num_filters": 16},
    "pixelcnn": {"inner_rate": 1e-4, "num_tasks": 4},
    "flow": {"num_filters": 16, "num_tasks": 4, "test_samples": 10},
    "flow_matching": {"num_tasks": 4, "num_test_tasks": 200, "num_choice_tasks": 50},
    "gan": {"learner": "reptile", "num_filters": 32},
    "set_vae": {"learner": "amortised", **_SETS, "hidden_sizes": (256,), "num_latents": 32},
    "attention_pixelcnn": {"learner": "amortised", **_SETS, "num_filters": 24, "num_layers": 6},
}

# Steps of the Omniglot presets that 2 cores take in 40 minutes, by MAML where a learner is needed;
# those of the attention PixelCNN in 85.
_STEPS: dict[ModelName, int] = {
    "vae": 80_000,
    "pixelcnn": 3500,
    "set_vae": 120_000,
    "attention_pixelcnn": 4500,
}

_BY_LEARNER: dict[LearnerName, dict[str, Any]] = {
    "reptile": {
        "inner_rate": 1e-3,
        "inner_steps": 5,
        "train_shots": 10,
        "num_queries": 1,
        "outer_optimizer": "sgd",
        "outer_rate": 1.0,
        "num_tasks": 4,
    },
    "pretrained": {"test_steps": 20},
    "scratch": {"test_steps": 50, "inner_optimizer": "adam"},
}


def with_model(preset: Config, line: Config) -> Config:
    """The preset's settings with those that the model and the learner of the command line bring."""
    settings = {**_BY_MODEL.get(line.model, {}), "model": line.model}
    if line.model not in AMORTISED:
        learner = settings.get("learner", line.learner)
        settings |= {**_BY_LEARNER.get(learner, {}), "learner": learner}
    if preset.dataset == "omniglot" and line.model in _STEPS:
        settings["steps"] = _STEPS[line.model]
        settings["validate_every"] = _STEPS[line.model] // 10
    chosen = replace(preset, **settings)
    if preset.steps < 10:  # Small ones stay so.
        names = ("num_tasks", "test_steps", "num_test_tasks", "num_choice_tasks", "test_samples")
        chosen = replace(chosen, **{name: getattr(preset, name) for name in names})
    run_dir = preset.run_dir
    kind = chosen.model if chosen.model in AMORTISED else f"{chosen.learner}-{chosen.model}"
    return replace(chosen, run_dir=run_dir.with_name(f"{run_dir.name}-{kind}"))


_COUNTS = (
    "image_size",
    "num_latents",
    "num_filters",
    "num_layers",
    "train_shots",
    "num_queries",
    "inner_steps",
    "steps",
    "num_tasks",
    "chunk",
    "validate_every",
    "test_steps",
    "test_samples",
    "use_shots",
    "use_samples",
)


def check(config: Config) -> None:
    """Raises a UserError for settings that would fail only after training, or without sense."""
    least: dict[str, int] = dict.fromkeys(_COUNTS, 1)
    least |= {"use_tasks": 2 if config.use_tasks else 0, "use_ways": 2}
    least |= dict.fromkeys(("num_validation_tasks", "num_choice_tasks", "num_test_tasks"), 2)
    if config.model == "attention_pixelcnn":
        least["num_layers"] = 5
    if config.num_test_classes is not None:
        least["num_test_classes"] = 1
    program.require(
        *(
            (getattr(config, name) >= low, f"{name} is {getattr(config, name)}; give {low} or more")
            for name, low in least.items()
        ),
        *(
            (getattr(config, name) > 0, f"{name} is {getattr(config, name)}; give more than 0")
            for name in ("inner_rate", "outer_rate")
        ),
        (
            min(config.tuned_rates, default=0) > 0,
            f"tuned_rates is {config.tuned_rates}; give one or more rates above 0",
        ),
        (
            min(config.shots, default=-1) == 0 and sorted(set(config.shots)) == [*config.shots],
            f"shots is {config.shots}; give different numbers in order, the first of them 0",
        ),
        (
            (config.learner == "amortised") == (config.model in AMORTISED),
            f"learner is {config.learner} and model {config.model}; {' and '.join(AMORTISED)} are "
            "amortised, and no others",
        ),
        (
            config.model != "gan" or config.learner == "reptile",
            f"learner is {config.learner} and model gan; give --learner reptile",
        ),
        (
            not config.use_tasks or config.use_shots in config.shots,
            f"use_shots is {config.use_shots} and shots {config.shots}; give one of these",
        ),
        (
            config.learner != "reptile" or config.outer_optimizer == "sgd",
            f"outer_optimizer is {config.outer_optimizer}; reptile needs sgd, as other optimisers "
            "could turn the second moments that it carries negative",
        ),
        (
            config.dataset == "omniglot" or config.split == "lake",
            f"split is {config.split} and dataset {config.dataset}; only omniglot has several "
            "class lists: leave --split out",
        ),
        (
            config.model != "flow" or config.image_size % 4 == 0,
            f"image_size is {config.image_size}; a flow halves it twice: give a multiple of 4",
        ),
    )
