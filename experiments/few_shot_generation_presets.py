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
    "pixelcnn": {"inner_rate": 1e-4, "num_tasks": 4, "test_queries": 5, "num_choice_tasks": 50},
    "flow": {"num_filters": 16, "num_tasks": 4, "test_samples": 10, "num_choice_tasks": 50},
    "flow_matching": {"num_tasks": 4, "num_test_tasks": 200, "num_choice_tasks": 20},
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
        "test_queries": 5,
    },
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
    "pretrained": {"test_steps": 50},
    "scratch": {"test_steps": 50},
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
        names = (
            "num_tasks",
            "warmup_steps",
            "test_steps",
            "num_test_tasks",
            "num_choice_tasks",
            "test_samples",
        )
        chosen = replace(chosen, **{name: getattr(preset, name) for name in names})
    run_dir = preset.run_dir
    kind = chosen.model if chosen.model in AMORTISED else f"{chosen.learner}-{chosen.model}"
    kind += "-features" if line.encoder_from is not None else ""
    return replace(chosen, run_dir=run_dir.with_name(f"{run_dir.name}-{kind}"))
