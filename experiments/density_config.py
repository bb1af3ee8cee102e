"""Settings of `experiments.density`: fields, presets by model and data."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from experiments import program

ModelName = Literal[
    "vae",
    "conv_vae",
    "ladder_vae",
    "iaf_vae",
    "iwae",
    "made",
    "pixelcnn",
    "row_lstm",
    "diagonal_bilstm",
    "realnvp",
    "glow",
    "maf",
    "spline",
    "gan",
    "flow_matching",
]

DatasetName = Literal["binarized_mnist", "mnist", "fashion_mnist", "omniglot", "glyphs", "cifar10"]

Values = Literal["static", "dynamic", "levels"]


@dataclass(frozen=True)
class Config:
    model: ModelName = "vae"
    """What is trained; it brings settings of its own, over which the flags win."""
    dataset: DatasetName = "glyphs"
    """"glyphs" is embedded; the others are sets of TFDS."""
    data_dir: Path | None = None
    """Folder of TFDS data sets; without it $TFDS_DATA_DIR, then TFDS's own default."""
    values: Values = "dynamic"
    """What an element of an image is: 0 or 1, made so once for all ("static": as stored, or more
    than half of the range), or drawn anew with the grey value for probability each time that an
    image is seen ("dynamic"); or one of 256 levels as stored ("levels")."""

    num_latents: int = 50
    """Latents, of the upper level in a ladder."""
    hidden_sizes: tuple[int, ...] = (200, 200)
    """Units of each hidden layer, from the image."""
    num_filters: int = 32
    """Channels of the first convolution, or of each layer of a PixelCNN or PixelRNN."""
    num_layers: int = 7
    """Layers of a PixelCNN or PixelRNN, or of the flow of an `iaf_vae`'s posterior."""
    kernel_size: int = 3
    """Of the layers of a PixelCNN after the first, whose kernels are 7 by 7."""
    num_masks: int = 1
    """Sets of masks of a MADE, of which training takes one a step and the test the mean of all."""
    num_components: int = 5
    """Logistics in the mixture of each value, where values are levels."""
    num_samples: int = 1
    """Samples of the importance weighted bound in training; 1 is the ELBO."""
    doubly_reparameterized: bool = False
    """Train the encoder by the estimator DReG."""

    steps: int = 3000
    """Steps of training."""
    batch_size: int = 100
    """Images in a step."""
    rate: float = 1e-3
    """Learning rate of Adam, which decays to zero along a cosine; that of a GAN stays."""
    epsilon: float = 1e-8
    """Of Adam, beside the root of its second moment. Where most gradients are larger, a larger one,
    such as the 1e-4 of Burda et al. 2016, keeps what is seldom seen from moving as much as the
    rest."""
    weight_decay: float = 0.0
    """Decoupled, as AdamW has it: what a step takes of each parameter, as a share of the rate."""
    validate_every: int = 500
    """Steps between validations."""
    num_validation: int = 1000
    """Images of a validation, the first ones; the parameters that validate best are the result."""

    test_samples: int = 200
    """Samples for each image of the test: of the latents, or of the noise that flows dequantise
    by; models that are exact take none."""
    num_test: int | None = None
    """Images of the test, the first ones; without it all."""
    num_completed: int = 1000
    """Images of the test whose lower half is completed, for models that can; the first ones."""
    quality: bool = False
    """Compare samples with test images by the features of a classifier that is trained for it."""
    num_compared: int = 10_000
    """Samples that are drawn for this, and test images, the first ones."""
    chunk: int = 20
    """Images that a device evaluates at once."""

    seed: int = 0
    """Fixes initialisation, batches and noise; the noise of the test is the same for every seed."""
    num_devices: int | None = None
    """Devices to use; without it all, and on a CPU one for each core."""
    run_dir: Path = Path("runs/density")
    """Where everything of the run is written."""
    resume: bool = False
    """Go on from the last checkpoint of the run's folder."""


_STATIC = Config(dataset="binarized_mnist", values="static", num_validation=2000)
PRESETS = {
    "glyphs": Config(),
    "smoke": Config(
        steps=4, validate_every=2, num_validation=20, num_test=30, test_samples=5, batch_size=8
    ),
    "binarized-mnist": _STATIC,
    "mnist": replace(_STATIC, dataset="mnist", values="dynamic"),
    "fashion-mnist": replace(_STATIC, dataset="fashion_mnist", values="levels", quality=True),
    "omniglot": replace(_STATIC, dataset="omniglot", values="dynamic"),
    "cifar10": replace(_STATIC, dataset="cifar10", values="levels"),
}

_FLOW = {"values": "levels", "test_samples": 10}
# Of models that take many passes of the net for an image.
_SLOW_SAMPLES = {"num_completed": 100, "num_compared": 1000}

# Over a preset's settings: what the model is, whatever the data.
_BY_MODEL: dict[ModelName, dict[str, Any]] = {
    "vae": {"batch_size": 20, "epsilon": 1e-4},
    "iwae": {"num_samples": 50, "test_samples": 5000, "batch_size": 20, "epsilon": 1e-4},
    "made": {"hidden_sizes": (8000,), "rate": 2e-4, "num_masks": 32, **_SLOW_SAMPLES},
    "pixelcnn": {"num_layers": 5, "kernel_size": 5, "batch_size": 16, "rate": 2e-3},
    "row_lstm": {"num_filters": 16, "batch_size": 16, "rate": 2e-3, **_SLOW_SAMPLES},
    "diagonal_bilstm": {
        "num_filters": 16,
        "num_layers": 4,
        "batch_size": 16,
        "rate": 2e-3,
        **_SLOW_SAMPLES,
    },
    "realnvp": {**_FLOW, "batch_size": 16, "num_completed": 20},
    "glow": {**_FLOW, "batch_size": 16, "num_completed": 20},
    "maf": {**_FLOW, "hidden_sizes": (512,), "num_compared": 1000},
    "spline": {**_FLOW, "hidden_sizes": (256,), "num_compared": 1000},
    "gan": {"values": "levels", "num_filters": 32, "batch_size": 64, "rate": 2e-4},
    "flow_matching": {
        "values": "levels",
        "num_filters": 32,
        "batch_size": 64,
        "num_test": 1000,
        **_SLOW_SAMPLES,
    },
    "iaf_vae": {"num_layers": 4, "epsilon": 1e-4},
    "ladder_vae": {"num_latents": 32, "hidden_sizes": (512, 256)},
}

# Steps on pictures of 28x28 zeros and ones that 2 cores take in about 30 minutes, those of PixelCNN
# and PixelRNN in 60, by what some hundred of them took; of levels a VAE takes fewer.
_STEPS: dict[ModelName, int] = {
    "vae": 400_000,
    "iwae": 150_000,
    "iaf_vae": 120_000,
    "ladder_vae": 60_000,
    "made": 12_000,
    "pixelcnn": 24_000,
    "row_lstm": 24_000,
    "diagonal_bilstm": 16_000,
    "glow": 20_000,
    "realnvp": 6000,
    "maf": 40_000,
    "spline": 6000,
    "gan": 6000,
}
_STEPS_OF_LEVELS: dict[ModelName, int] = {"vae": 60_000}


def with_model(preset: Config, line: Config) -> Config:
    """The preset's settings with those that the model of the command line brings."""
    brought = dict(_BY_MODEL.get(line.model, {}))
    if preset.values == "static":
        brought.pop("values", None)  # Stored as 0 and 1.
    values = brought.get("values", preset.values)
    if values == "levels":
        brought.pop("num_masks", None)
    if {preset.dataset, line.dataset} != {"glyphs"} and line.model in _STEPS:
        levels = _STEPS_OF_LEVELS if values == "levels" else {}
        steps = levels.get(line.model, _STEPS[line.model])
        brought |= {"steps": steps, "validate_every": max(500, steps // 40)}
    run_dir = preset.run_dir.with_name(f"{preset.run_dir.name}-{line.model}")
    return replace(preset, **brought, model=line.model, run_dir=run_dir)


def check(config: Config) -> None:
    """Raises a UserError for settings that would fail only after training, or without sense."""
    counts = (
        "num_latents",
        "num_filters",
        "num_layers",
        "num_masks",
        "num_components",
        "num_samples",
        "steps",
        "batch_size",
        "validate_every",
        "test_samples",
        "num_completed",
        "chunk",
    )
    # An interval needs two, a covariance more.
    least = {name: 1 for name in counts} | {"num_validation": 2, "num_compared": 30}
    if config.num_test is not None:
        least |= {"num_test": 30}  # As many are drawn.
    program.require(
        *(
            (getattr(config, name) >= low, f"{name} is {getattr(config, name)}; give {low} or more")
            for name, low in least.items()
        ),
        (
            not config.quality or config.dataset in ("mnist", "fashion_mnist", "cifar10"),
            f"quality asks for a classifier of few classes, and dataset is {config.dataset}; give "
            "--no-quality, or a set of ten classes",
        ),
        (
            config.kernel_size >= 3 and config.kernel_size % 2 == 1,
            f"kernel_size is {config.kernel_size}; give an odd number from 3",
        ),
        (config.rate > 0, f"rate is {config.rate}; give more than 0"),
        (config.epsilon >= 0, f"epsilon is {config.epsilon}; give 0 or more"),
        (config.weight_decay >= 0, f"weight_decay is {config.weight_decay}; give 0 or more"),
        (
            config.weight_decay == 0 or config.model != "gan",
            f"weight_decay is {config.weight_decay}, and gan's players have none; give 0",
        ),
        (
            not config.doubly_reparameterized or config.model in ("vae", "conv_vae", "iwae"),
            f"doubly_reparameterized asks for a Gaussian posterior, and model is {config.model}; "
            "give --no-doubly-reparameterized, or vae, conv_vae or iwae",
        ),
        (
            min(config.hidden_sizes, default=1) >= 1,
            f"hidden_sizes is {config.hidden_sizes}; give 1 or more units for each hidden layer",
        ),
        (
            config.model != "ladder_vae" or len(config.hidden_sizes) == 2,
            f"hidden_sizes is {config.hidden_sizes} and model ladder_vae, which has two levels; "
            "give the units of each",
        ),
        (
            config.model != "made" or config.values != "levels" or config.dataset != "cifar10",
            "made of cifar10's levels has half a billion weights; give --model pixelcnn",
        ),
        (
            config.num_masks == 1 or config.values != "levels",
            f"num_masks is {config.num_masks} and values is levels, of which a mean over masks is "
            "not made; give --num-masks 1, or --values static",
        ),
        (
            config.dataset != "binarized_mnist" or config.values == "static",
            f"dataset binarized_mnist has the values 0 and 1 alone, and values is {config.values}; "
            "give --values static, or --dataset mnist",
        ),
    )
