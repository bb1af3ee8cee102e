"""Presets of `experiments.few_shot_generation`, and what learner and model bring to them."""

from dataclasses import replace
from typing import Any

from experiments.few_shot_generation_config import AMORTISED, Config, LearnerName, ModelName

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
        rate_factors=(1.0, 3.0),
        tuned_rates=(1e-3, 1e-2),
        num_choice_tasks=4,
        choice_samples=2,
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

# Choice and test of a baseline last up to 25 minutes on 2 cores, by the passes that they take.
_BY_MODEL: dict[ModelName, dict[str, Any]] = {
    "conv_vae": {"num_filters": 16, "num_choice_tasks": 50},
    "pixelcnn": {"inner_rate": 1e-4, "num_tasks": 4, "test_queries": 4, "num_choice_tasks": 30},
    "flow": {
        "num_filters": 16,
        "num_tasks": 4,
        "num_choice_tasks": 20,
        "choice_samples": 4,
        "num_test_tasks": 300,
        "test_samples": 10,
    },
    # A likelihood takes 40 passes and their derivatives. So the choice is of 1200 of them, among 4
    # rates of a baseline and 5 steps, and the test of 1200: about 10 minutes in all.
    "flow_matching": {
        "num_tasks": 4,
        "num_validation_tasks": 10,
        "test_steps": 5,
        "tuned_rates": (1e-4, 1e-3),
        "num_choice_tasks": 10,
        "num_test_tasks": 200,
    },
    "gan": {"learner": "reptile", "num_filters": 32},
    "set_vae": {
        "learner": "amortised",
        **_SETS,
        "hidden_sizes": (256,),
        "num_latents": 32,
        "train_samples": 5,
    },
    "attention_pixelcnn": {
        "learner": "amortised",
        **_SETS,
        "num_filters": 24,
        "num_layers": 6,
        "num_tasks": 4,
        "outer_rate": 3e-3,
        "warmup_steps": 300,
        "average_decay": 0.999,
        "test_queries": 4,
    },
}

# Outer steps of the Omniglot presets that 2 cores take in about 40 minutes, 90 for the attention
# PixelCNN: measured for MAML of the VAE and of the PixelCNN, for the others in proportion to the
# products and the numbers that a step computes; the set VAE takes 22. With --init-from half of
# them, as those of that run take the other half of the minutes.
_STEPS: dict[ModelName, dict[LearnerName, int]] = {
    "vae": {
        "maml": 80_000,
        "fomaml": 180_000,
        "reptile": 110_000,
        "meta_sgd": 64_000,
        "learned_rates": 75_000,
        "meta_curvature": 3000,
        "pretrained": 390_000,
    },
    "conv_vae": {
        "maml": 5800,
        "fomaml": 16_000,
        "reptile": 12_000,
        "meta_sgd": 5600,
        "learned_rates": 5700,
        "meta_curvature": 2000,
        "pretrained": 35_000,
    },
    "pixelcnn": {
        "maml": 3500,
        "fomaml": 10_000,
        "reptile": 4100,
        "meta_sgd": 3500,
        "learned_rates": 3500,
        "meta_curvature": 3500,
        "pretrained": 21_000,
    },
    "flow": {
        "maml": 1750,
        "fomaml": 5200,
        "reptile": 2000,
        "meta_sgd": 1750,
        "learned_rates": 1750,
        "meta_curvature": 1750,
        "pretrained": 10_000,
    },
    "flow_matching": {
        "maml": 2500,
        "fomaml": 7500,
        "reptile": 3000,
        "meta_sgd": 2500,
        "learned_rates": 2500,
        "meta_curvature": 2500,
        "pretrained": 15_000,
    },
    "gan": {"reptile": 8700},
    "set_vae": {"amortised": 40_000},
    "attention_pixelcnn": {"amortised": 9000},
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
}

_BY_BOTH: dict[tuple[LearnerName, ModelName], dict[str, Any]] = {
    ("reptile", "gan"): {"inner_rate": 2e-4, "test_steps": 10},
    ("pretrained", "vae"): {"test_steps": 50},
    ("scratch", "vae"): {"test_steps": 50},
    ("pretrained", "conv_vae"): {"test_steps": 50},
    ("scratch", "conv_vae"): {"test_steps": 50},
}


def with_model(preset: Config, line: Config) -> Config:
    """The preset's settings with those that the model and the learner of the command line bring."""
    settings = {**_BY_MODEL.get(line.model, {}), "model": line.model}
    if line.model not in AMORTISED:
        learner = settings.get("learner", line.learner)
        settings |= {**_BY_LEARNER.get(learner, {}), "learner": learner}
        settings |= _BY_BOTH.get((learner, line.model), {})
    chosen = replace(preset, **settings)
    steps = _STEPS.get(chosen.model, {}).get(chosen.learner)
    if preset.dataset == "omniglot" and steps is not None:
        steps = steps if line.init_from is None else steps // 2
        chosen = replace(chosen, steps=steps, validate_every=steps // 20)
    if preset.steps < 10:  # Small ones stay so.
        names = (
            "num_tasks",
            "warmup_steps",
            "num_validation_tasks",
            "test_steps",
            "tuned_rates",
            "num_test_tasks",
            "num_choice_tasks",
            "choice_samples",
            "test_samples",
        )
        chosen = replace(chosen, **{name: getattr(preset, name) for name in names})
    run_dir = preset.run_dir
    kind = chosen.model if chosen.model in AMORTISED else f"{chosen.learner}-{chosen.model}"
    kind += "-features" if line.encoder_from is not None else ""
    kind += "-started" if line.init_from is not None else ""
    return replace(chosen, run_dir=run_dir.with_name(f"{run_dir.name}-{kind}"))
