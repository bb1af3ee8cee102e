"""Settings of `experiments.few_shot_generation`, and which of them go together."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from experiments import program
from metagen_jax.data.resampling import Resampling
from metagen_jax.data.set_episodes import Drawn

LearnerName = Literal[
    "maml",
    "fomaml",
    "reptile",
    "meta_sgd",
    "learned_rates",
    "meta_curvature",
    "pretrained",
    "scratch",
    "amortised",
]

ModelName = Literal[
    "vae", "conv_vae", "pixelcnn", "flow", "flow_matching", "gan", "set_vae", "attention_pixelcnn"
]

AMORTISED = ("set_vae", "attention_pixelcnn")
"""Models that take the support set for a condition, and need no steps on it."""

LEARNED_RULES = ("meta_sgd", "learned_rates", "meta_curvature")
"""Learners of the steps themselves."""

WITH_RULE = ("reptile", *LEARNED_RULES)
"""Learners of parameters that are `MetaParams`: the model's, and what its steps begin with."""

USE_QUERIES = 10
"""Queries of each class of an episode of `use_tasks`."""


@dataclass(frozen=True)
class Config:
    learner: LearnerName = "maml"
    """How the model learns from a support set. "pretrained" is fine-tuning of a model of all
    training classes, "scratch" of none, for which settings of training have no meaning; "meta_sgd"
    learns a rate for each parameter, "learned_rates" one for each array of them and each step,
    "meta_curvature" matrices that multiply its gradient; "amortised" is that of the models that
    take the set in."""
    model: ModelName = "vae"
    """What is learned; it brings settings of its own, over which the flags win."""
    dataset: Literal["glyphs", "omniglot"] = "glyphs"
    """"glyphs" is embedded, "omniglot" is TFDS's."""
    split: Literal["lake", "random1000", "alphabets45"] = "lake"
    """Class lists of Omniglot."""
    sets_of: Literal["characters", "alphabets"] = "characters"
    """What the images of an episode are of: one character, or any characters of one alphabet of
    Omniglot. Whatever counts classes counts these."""
    data_dir: Path | None = None
    """Folder of TFDS data sets; without it $TFDS_DATA_DIR, then TFDS's own default."""
    image_size: int = 28
    """Height and width of the images, in pixels."""
    resampling: Resampling = "lanczos"
    """How Omniglot's pictures are made of that size; glyphs have one way."""
    values: Drawn = "stored"
    """Pixels are 0 and 1: more than half of the range, or drawn anew in each episode with the grey
    value for probability."""
    replacement: Literal["never", "test", "always"] = "never"
    """Whether an episode may hold a drawing twice, a query among the support images too: with 9 of
    them 37 % of all queries. "test": in the test and in what is chosen for it, as in the published
    figures of Generative Matching Networks; "always": in training as well, as in their program."""
    rotations: Literal[1, 4] = 1
    """4: in training a class may be turned by quarters; tests never are."""

    num_latents: int = 50
    """Latents of an image, for models that have some."""
    hidden_sizes: tuple[int, ...] = (200, 200)
    """Units of each hidden layer of "vae"; the set VAE has layers of as many as the first says."""
    num_filters: int = 16
    """Channels of convolutional models."""
    num_layers: int = 5
    """Layers of a PixelCNN, with or without attention."""
    attention_layers: tuple[int, ...] = (2, 4)
    """Those that look at the support set by attention, from 1."""
    attention_stride: int = 4
    """Side of the cells, in pixels, that they look at; 2 takes about twice the time of 4."""
    train_samples: int = 1
    """Importance samples of the bound that trains the set VAE; the other VAEs take 1."""

    train_shots: int = 5
    """Support examples in training."""
    vary_shots: bool = True
    """1 to `train_shots` different ones, in their places again and again. Not for amortised models,
    which learn from every number of shots anyway."""
    num_queries: int = 5
    """Query examples in training."""
    inner_optimizer: Literal["sgd", "adam"] = "sgd"
    """Of the steps of "maml" and "fomaml"; others have their own."""
    inner_rate: float = 2e-4
    """Learning rate of the inner loop, or where the learned ones start; not of "pretrained" and
    "scratch"."""
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
    warmup_steps: int = 0
    """Outer steps in which the rate rises from zero; then it falls, a half cosine."""
    average_decay: float = 0.0
    """Of a moving average of the parameters, which is validated and tested in their place; 0: of
    none."""
    init_from: Path | None = None
    """Folder of a run of the same model and images whose best parameters training begins with, such
    as of `--learner pretrained`. Its minutes count as well: presets then take half their steps."""
    chunk: int = 1
    """Tasks that a device works on at once; 1 is fastest on a CPU."""
    validate_every: int = 500
    """Outer steps between validations."""
    num_validation_tasks: int = 100
    """Episodes of a validation in training."""

    shots: tuple[int, ...] = (0, 1, 2, 3, 4, 9)
    """Support examples at test, each number for itself; these and `test_queries` together no more
    than the 20 of a class, but with replacement."""
    test_steps: int = 20
    """The most steps at test; how many are taken is chosen on validation classes for each number of
    shots."""
    rate_factors: tuple[float, ...] = (1.0, 0.3, 3.0)
    """Factors of the inner loop's rate, or of all learned ones, of which one is chosen likewise;
    the first is 1, the rate of training."""
    tuned_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Rates for "pretrained" and "scratch" in their place, each tried with Adam and with SGD."""
    num_choice_tasks: int = 200
    """Episodes of validation classes by which steps and rates are chosen."""
    choice_samples: int = 10
    """Importance samples of a bound by which they are chosen, or draws of a flow's noise."""
    num_test_tasks: int = 1000
    """Episodes of the test."""
    test_queries: int = 1
    """Queries of such an episode; intervals are over episodes."""
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

    against: Path | None = None
    """Folder of a finished run of the same test episodes; the difference is reported in pairs."""
    encoder_from: Path | None = None
    """Folder of a run of `experiments.representation --norm group`: "set_vae" sees that net's
    features, learned without labels, beside the pixels. They stay as they are."""

    seed: int = 0
    """Fixes initialisation, episodes and noise; test episodes are the same for every seed."""
    num_devices: int | None = None
    """Devices to use; without it all, and on a CPU one for each core."""
    run_dir: Path = Path("runs/few_shot_generation")
    """Where everything of the run is written."""
    resume: bool = False
    """Go on from the last checkpoint of the run's folder; what is trained is tested again."""

    MAY_CHANGE: ClassVar = (
        "replacement",
        "shots",
        "test_steps",
        "rate_factors",
        "tuned_rates",
        "num_choice_tasks",
        "choice_samples",
        "num_test_tasks",
        "test_queries",
        "num_test_classes",
        "test_samples",
        "use_tasks",
        "use_ways",
        "use_shots",
        "use_samples",
        "against",
    )
    """Settings of the test alone, with which a trained model may be tested again by `resume`; of
    `replacement` only "never" and "test" are."""


_COUNTS = (
    "image_size",
    "num_latents",
    "num_filters",
    "num_layers",
    "attention_stride",
    "train_shots",
    "num_queries",
    "inner_steps",
    "steps",
    "num_tasks",
    "chunk",
    "validate_every",
    "test_steps",
    "choice_samples",
    "test_samples",
    "test_queries",
    "train_samples",
    "use_shots",
    "use_samples",
)


def check(config: Config) -> None:
    """Raises a UserError for settings that would fail only after training, or without sense."""
    least: dict[str, int] = dict.fromkeys(_COUNTS, 1)
    least |= {"use_tasks": 2 if config.use_tasks else 0, "use_ways": 2, "warmup_steps": 0}
    least |= dict.fromkeys(("num_validation_tasks", "num_choice_tasks", "num_test_tasks"), 2)
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
            config.rate_factors[:1] == (1.0,) and min(config.rate_factors) > 0,
            f"rate_factors is {config.rate_factors}; give 1 first, and any others above 0",
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
            config.learner != "amortised" or not config.vary_shots,
            "vary_shots is True and learner amortised, whose sets would hold images twice; give "
            "--no-vary-shots",
        ),
        (
            config.inner_optimizer == "sgd" or config.learner in ("maml", "fomaml"),
            f"inner_optimizer is {config.inner_optimizer} and learner {config.learner}; only maml "
            "and fomaml have a choice: leave --inner-optimizer out",
        ),
        (
            config.model != "attention_pixelcnn"
            or all(1 <= layer < config.num_layers for layer in config.attention_layers),
            f"attention_layers is {config.attention_layers} and num_layers {config.num_layers}; "
            f"give numbers from 1 to {config.num_layers - 1}",
        ),
        (
            config.train_samples == 1 or config.model == "set_vae",
            f"train_samples is {config.train_samples} and model {config.model}; only set_vae takes "
            "more than 1",
        ),
        (
            config.model not in ("set_vae", "vae") or min(config.hidden_sizes, default=0) > 0,
            f"hidden_sizes is {config.hidden_sizes}; give one or more numbers above 0",
        ),
        (
            config.warmup_steps < config.steps,
            f"warmup_steps is {config.warmup_steps} and steps {config.steps}; give fewer",
        ),
        (
            0 <= config.average_decay < 1,
            f"average_decay is {config.average_decay}; give 0, or a number below 1 such as 0.999",
        ),
        (
            config.init_from is None or config.learner != "scratch",
            "init_from is given and learner scratch, which begins with nothing; give --learner "
            "pretrained, or leave --init-from out",
        ),
        (
            config.against is None or config.model != "gan",
            "against is given and model gan, which has no likelihoods; leave --against out",
        ),
        (
            config.encoder_from is None or config.model == "set_vae",
            f"model is {config.model}; only set_vae takes features by --encoder-from",
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
            config.sets_of == "characters"
            or (config.dataset == "omniglot" and config.split != "random1000"),
            f"sets_of is {config.sets_of}, dataset {config.dataset} and split {config.split}; only "
            "the splits lake and alphabets45 of omniglot have alphabets that are whole",
        ),
        (
            config.model != "flow" or config.image_size % 4 == 0,
            f"image_size is {config.image_size}; a flow halves it twice: give a multiple of 4",
        ),
    )
