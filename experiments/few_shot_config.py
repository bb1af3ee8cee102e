"""Settings of `experiments.few_shot`: fields, presets, and what each learner changes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from experiments import program
from metagen_jax.chunks import Chunk, check_chunk
from metagen_jax.meta.metric import Distance
from metagen_jax.nets.conv4 import Norm

MatmulDtype = Literal["float32", "bfloat16", "float16"]
LearnerName = Literal[
    "maml",
    "fomaml",
    "anil",
    "boil",
    "reptile",
    "imaml",
    "meta_sgd",
    "maml_plus_plus",
    "meta_curvature",
    "cavia",
    "prototypical",
    "matching",
    "matching_fce",
    "proto_maml",
]


METRIC_LEARNERS = ("prototypical", "matching", "matching_fce", "proto_maml")
"""Those whose nets have no head, so that episodes may have other ways in training than at test."""


@dataclass(frozen=True)
class Config:
    dataset: str = "glyphs"
    """"glyphs" (embedded), "omniglot", "cifar_fs" (TFDS's cifar100), "mini_imagenet" (a folder of
    pictures), or any TFDS image set with labels."""
    split: str = "vinyals"
    """Class lists of Omniglot: "vinyals", "lake" or "random1200"."""
    data_dir: Path | None = None
    """Folder of TFDS data sets; without it $TFDS_DATA_DIR, then TFDS's own default. For
    mini_imagenet the folder with a folder of pictures for each class."""
    image_size: int = 28
    """Height and width of the images, in pixels."""
    rotations: Literal[1, 4] = 4
    """4: characters turned by 90, 180 and 270 degrees are classes of their own; 1: as they are."""

    labels: Literal["true", "umtra", "cactus"] = "true"
    """Of training: those of the data, or none; then "umtra" takes each picture for a class, and
    "cactus" clusters of features by SimCLR. Validation and test always have labels."""
    learner: LearnerName = "maml"
    """What meta-trains; it brings settings of its own, over which the flags win."""
    num_ways: int = 5
    """Classes in an episode."""
    train_ways: int | None = None
    """Classes in an episode of training; without it those of the test. For metric learners."""
    num_shots: int = 1
    """Support examples of each class."""
    train_shots: int | None = None
    """Support examples of each class in training; without it those of the test."""
    num_queries: int = 5
    """Query examples of each class in training."""
    inner_rate: float = 0.4
    """Learning rate of the inner loop, or where the learned ones start."""
    inner_steps: int = 1
    """Inner steps in training."""
    inner_batch: int | None = None
    """Examples in a mini-batch of an inner step, for Reptile; without it all of the support set."""
    strength: float = 2.0
    """Of iMAML's proximal term, lambda."""
    cg_steps: int = 5
    """Steps of iMAML's conjugate gradients."""
    cg_damping: float = 0.0
    """Added to iMAML's strength in the equation for its gradient, which so becomes first-order."""
    num_context: int = 64
    """Context parameters of CAVIA."""
    distance: Distance = "squared_euclidean"
    """Of a query from prototypes or examples, for metric learners."""
    num_filters: int = 64
    """Channels of each block of the net."""
    strided: bool = True
    """Strided convolutions, as in MAML's Omniglot net; otherwise max-pooling."""
    norm: Norm = "batch"
    """Normalisation: by the current batch, in groups, by layer, or none."""
    matmul_dtype: MatmulDtype = "float32"
    """What operands of the convolutions' products are rounded to; sums are float32."""

    steps: int = 400
    """Outer steps."""
    num_tasks: int = 32
    """Tasks in an outer step."""
    outer_rate: float = 3e-3
    """Learning rate of the outer optimiser."""
    outer_optimizer: Literal["adam", "sgd"] = "adam"
    """The outer optimiser; SGD for Reptile."""
    cosine: bool = True
    """Warm the outer rate up and let it decay along a cosine; otherwise keep it."""
    chunk: Chunk = "auto"
    """Tasks that a device works on at once, or "auto". Of maml_plus_plus' three kinds of gradient a
    chunk of more than 1 computes all at each step."""
    validate_every: int = 200
    """Outer steps between validations."""
    num_validation_tasks: int = 300
    """Episodes of a validation."""
    pretraining_steps: int = 1600
    """Steps of 128 images, of the pretrained baseline and of the features behind "cactus"."""
    baselines: bool = True
    """Pretrain and fine-tune too; that is the same for every learner."""

    test_steps: int = 3
    """Inner steps at validation and test; the figure is after the number that validates best."""
    test_queries: tuple[int, ...] = (15,)
    """Query examples of each class at test; validation takes the first number."""
    num_test_tasks: int = 1000
    """Episodes of the test."""

    seed: int = 0
    """Fixes initialisation, episodes and noise; test episodes are the same for every seed."""
    num_devices: int | None = None
    """Devices to use; without it all, and on a CPU one for each core."""
    run_dir: Path = Path("runs/few_shot")
    """Where everything of the run is written."""
    resume: bool = False
    """Go on from the last checkpoint of the run's folder."""
    init_from: Path | None = None
    """Folder of a run of `experiments.representation`, whose net, with features learned without
    labels, training starts from."""
    features_from: Path | None = None
    """Folder of such a run whose features of images "cactus" clusters; without it a net is trained
    for them."""
    checkpoint: Path | None = None
    """Folder of an earlier run: its best parameters are tested on these data, ways and shots, and
    nothing is trained. The learner and the net must be those of that run; metric learners take
    other ways."""


# Published: 60,000 steps; 5-way 1 inner step at 0.4, 20-way 5 at 0.1; Adam at 1e-3; as many queries
# as shots, at test as well. For 2 cores fewer steps at a higher, decaying rate, and one inner step.
_OMNIGLOT = Config(
    dataset="omniglot",
    num_queries=1,
    test_queries=(1, 15),
    validate_every=500,
    pretraining_steps=3000,
)

_FIVE_SHOTS: dict[str, Any] = {"num_shots": 5, "num_queries": 5, "test_queries": (5, 15)}
_PUBLISHED: dict[str, Any] = {"steps": 60_000, "outer_rate": 1e-3, "cosine": False}
# Published, and shortened in the other presets: inner steps cost most there.
_TWENTY_WAYS: dict[str, Any] = {
    "num_ways": 20,
    "num_tasks": 16,
    "inner_rate": 0.1,
    "inner_steps": 5,
    "test_steps": 5,
}

PRESETS = {
    "glyphs": Config(num_tasks=8, steps=1600, validate_every=800),
    "smoke": Config(
        steps=6,
        num_tasks=4,
        num_filters=8,
        validate_every=3,
        num_validation_tasks=8,
        num_test_tasks=16,
        pretraining_steps=6,
    ),
    "omniglot-5w1s": replace(_OMNIGLOT, num_ways=5, steps=14000),
    "omniglot-5w5s": replace(_OMNIGLOT, num_ways=5, steps=5000, **_FIVE_SHOTS),
    "omniglot-20w1s": replace(_OMNIGLOT, num_ways=20, num_tasks=16, steps=15000),
    "omniglot-20w5s": replace(_OMNIGLOT, num_ways=20, num_tasks=8, steps=2000, **_FIVE_SHOTS),
    "omniglot-5w1s-published": replace(_OMNIGLOT, num_ways=5, **_PUBLISHED),
    "omniglot-5w5s-published": replace(_OMNIGLOT, num_ways=5, **_FIVE_SHOTS, **_PUBLISHED),
    "omniglot-20w1s-published": replace(_OMNIGLOT, **_TWENTY_WAYS, **_PUBLISHED),
    "omniglot-20w5s-published": replace(_OMNIGLOT, **_TWENTY_WAYS, **_FIVE_SHOTS, **_PUBLISHED),
}

# Published for miniImageNet: 5 inner steps at 0.01, 10 at test, 4 or 2 tasks, 60,000 steps.
_MINI_IMAGENET = Config(
    dataset="mini_imagenet",
    image_size=84,
    rotations=1,
    num_queries=15,
    inner_rate=0.01,
    inner_steps=5,
    num_filters=32,
    strided=False,
    num_tasks=4,
    steps=60_000,
    outer_rate=1e-3,
    cosine=False,
    validate_every=1000,
    pretraining_steps=10_000,
    test_steps=10,
)
_CIFAR_FS = replace(_MINI_IMAGENET, dataset="cifar_fs", image_size=32)

PRESETS |= {
    "cifar-fs-5w1s": _CIFAR_FS,
    "cifar-fs-5w5s": replace(_CIFAR_FS, num_shots=5, num_tasks=2),
    "mini-imagenet-5w1s": _MINI_IMAGENET,
    "mini-imagenet-5w5s": replace(_MINI_IMAGENET, num_shots=5, num_tasks=2),
}

# A validation without adaptation takes a second, and a large one chooses better.
_MATCHING = {"num_tasks": 8, "num_queries": 5, "num_validation_tasks": 1000}

# Over a preset's settings: what the learner is, whatever the data.
_BY_LEARNER: dict[LearnerName, dict[str, Any]] = {
    "reptile": {
        "inner_rate": 1e-3,
        "inner_steps": 5,
        "inner_batch": 10,
        "train_shots": 10,
        "outer_optimizer": "sgd",
        "outer_rate": 1.0,
        "num_tasks": 4,
        "test_steps": 50,
        "validate_every": 5000,
    },
    "imaml": {
        "inner_rate": 0.4,
        "inner_steps": 2,
        "test_steps": 2,
        "strength": 0.1,
        "cg_damping": 10.0,
        "cg_steps": 1,
        "num_tasks": 32,
        "outer_rate": 3e-3,
    },
    "maml_plus_plus": {"inner_rate": 0.1, "inner_steps": 5, "test_steps": 5, "num_tasks": 8},
    "cavia": {"inner_rate": 1.0, "inner_steps": 2},
    "prototypical": {
        "train_ways": 20,
        "num_queries": 5,
        "num_tasks": 8,
        "num_validation_tasks": 1000,
    },
    "matching": _MATCHING,
    "matching_fce": _MATCHING,
    "proto_maml": {"inner_rate": 0.1},
}

# Outer steps of the 1-shot presets of Omniglot; experiments/README.md has the minutes of most.
_OMNIGLOT_STEPS: dict[LearnerName, int] = {
    "reptile": 45_000,
    "imaml": 7000,
    "maml_plus_plus": 24_000,
    "prototypical": 20_000,
    "matching": 8000,
    "matching_fce": 8000,
    "proto_maml": 6000,
    "meta_curvature": 4500,
    "cavia": 9000,
}

# What 20 ways leave no time for.
_AT_20_WAYS: dict[LearnerName, dict[str, Any]] = {
    "maml_plus_plus": {"inner_rate": 0.2, "inner_steps": 2, "test_steps": 2, "steps": 18_000},
}


def with_learner(preset: Config, given: Config) -> Config:
    """A preset with the settings that the learner and the labels of the command line bring."""
    kinds = {"learner": given.learner, "labels": given.labels}
    changed = {name: kind for name, kind in kinds.items() if kind != getattr(preset, name)}
    settings = dict(_BY_LEARNER.get(given.learner, {})) if "learner" in changed else {}
    shortened = preset.dataset == "omniglot" and preset.num_shots == 1 and preset.cosine
    if shortened and given.learner in _OMNIGLOT_STEPS:
        settings["steps"] = _OMNIGLOT_STEPS[given.learner]
    if shortened and preset.num_ways == 20:
        settings |= _AT_20_WAYS.get(given.learner, {})
    kinds = {
        "featured": given.features_from,
        "started": given.init_from,
        "tested": given.checkpoint,
    }
    ends = (*changed.values(), *(end for end, folder in kinds.items() if folder is not None))
    run_dir = preset.run_dir.with_name("-".join((preset.run_dir.name, *ends)))
    baselines = preset.baselines and not changed
    return replace(preset, **settings, **changed, run_dir=run_dir, baselines=baselines)


# Settings without which the parameters of a run mean something else.
_OF_THE_NET = ("learner", "num_filters", "strided", "norm", "distance", "num_context")

_COUNTS = (
    "image_size",
    "train_ways",
    "num_shots",
    "train_shots",
    "num_queries",
    "inner_steps",
    "inner_batch",
    "cg_steps",
    "num_context",
    "num_filters",
    "num_tasks",
    "validate_every",
    "pretraining_steps",
    "test_steps",
)


def check_checkpoint(checkpoint: Path, config: Config) -> None:
    """Raises a UserError if a run is of another net or of other class lists than `config`."""
    advice = "give the --run-dir of a run of experiments.few_shot as --checkpoint"
    trained = program.read_settings(checkpoint, advice=advice)
    of_the_data = ["split", "rotations"] if trained.get("dataset") == config.dataset else []
    of_the_head = [] if config.learner in METRIC_LEARNERS else ["num_ways"]
    for name in (*_OF_THE_NET, *of_the_head, *of_the_data):
        here = getattr(config, name)
        there = trained.get(name, here)
        program.require(
            (
                there == here,
                f"checkpoint {checkpoint} is of a run with {name} {there}, here it is {here}; give "
                f"the {name} of that run, or the checkpoint of another",
            )
        )


def check(config: Config) -> None:
    """Raises a UserError for settings that would fail only after training, or without sense."""
    check_chunk(config.chunk)
    least = dict.fromkeys(_COUNTS, 1) | dict.fromkeys(("num_ways", "steps"), 2)
    given = {name: getattr(config, name) for name in least}
    program.require(
        *(
            (
                given[name] is None or given[name] >= low,
                f"{name} is {given[name]}; give {low} or more",
            )
            for name, low in least.items()
        ),
        *(
            (getattr(config, name) > 0, f"{name} is {getattr(config, name)}; give more than 0")
            for name in ("inner_rate", "outer_rate")
        ),
        (
            config.dataset != "cifar_fs" or config.image_size == 32,
            f"image_size is {config.image_size}; cifar_fs has pictures of 32: give --image-size 32",
        ),
        (
            min(config.test_queries, default=0) >= 1,
            f"test_queries is {config.test_queries}; give one or more numbers of 1 or more",
        ),
        (
            config.num_ways == (config.train_ways or config.num_ways)
            or config.learner in METRIC_LEARNERS,
            f"train_ways is {config.train_ways}; {config.learner} has a head for {config.num_ways} "
            f"classes, only {', '.join(METRIC_LEARNERS)} train with other ways",
        ),
        (
            config.learner != "reptile"
            or (config.outer_optimizer == "sgd" and config.outer_rate <= 1),
            f"outer_optimizer is {config.outer_optimizer} at {config.outer_rate}; reptile needs "
            "sgd at up to 1, or the second moments that it carries could turn negative",
        ),
        (
            config.split == "vinyals" or config.dataset.partition(":")[0] == "omniglot",
            f"split is {config.split} and dataset {config.dataset}; only omniglot has several "
            "class lists: leave --split out",
        ),
        (
            config.labels != "umtra" or (config.train_shots or config.num_shots) == 1,
            f"train_shots is {config.train_shots or config.num_shots}; umtra knows one picture of "
            "each class: give train_shots 1",
        ),
        (
            config.features_from is None or config.labels == "cactus",
            f"features_from is given and labels is {config.labels}, which has no clusters; give "
            "--labels cactus, or --init-from to start from that net",
        ),
        (
            min(config.num_test_tasks, config.num_validation_tasks) >= 2,
            "num_test_tasks and num_validation_tasks need 2 or more for an interval",
        ),
    )
