"""The experiment on few-shot generation: every learner and model, and a run that is whole."""

import json
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import few_shot_generation, few_shot_generation_data, program
from experiments.few_shot_generation_config import Config, check
from experiments.few_shot_generation_learners import make_learner
from experiments.few_shot_generation_models import adaptive
from experiments.few_shot_generation_presets import PRESETS, with_model
from metagen_jax.data.classes import LabelledImages
from metagen_jax.errors import UserError
from metagen_jax.evaluation.likelihood import evaluate_log_prob
from metagen_jax.evaluation.likelihood_by_shots import evaluate_nll
from metagen_jax.gradients import task_keys
from metagen_jax.types import Episode

KEY = jax.random.key(0)
SMALL = {
    "num_latents": 3,
    "hidden_sizes": (6,),
    "num_filters": 8,
    "num_layers": 2,
    "train_shots": 2,
    "num_queries": 2,
    "image_size": 8,
}


def config_of(learner, model, **settings):
    chosen = with_model(PRESETS["smoke"], Config(learner=learner, model=model))
    small = SMALL | ({"num_layers": 5} if model == "attention_pixelcnn" else {})
    return replace(chosen, **small, **settings)


def pictures(num_classes=4, size=8, seed=0):
    """Noise of two values, ten of each class."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes, dtype=np.int32), 14)
    images = 255 * rng.integers(0, 2, (len(labels), size, size, 1), dtype=np.uint8)
    return LabelledImages(images, labels, tuple("abcdefgh"[:num_classes]))


@pytest.mark.parametrize(
    ("learner", "model"),
    [
        *(
            (learner, "vae")
            for learner in (
                "maml",
                "fomaml",
                "reptile",
                "meta_sgd",
                "learned_rates",
                "scratch",
            )
        ),
        pytest.param("meta_curvature", "vae", marks=pytest.mark.slow),
        ("maml", "pixelcnn"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                ("maml", "conv_vae"),
                ("maml", "flow_matching"),
                ("fomaml", "flow"),
            )
        ),
        ("pretrained", "pixelcnn"),
        ("reptile", "gan"),
        ("amortised", "set_vae"),
        ("amortised", "attention_pixelcnn"),
    ],
)
def test_every_learner_and_model_has_a_direction_likelihoods_and_samples(learner, model):
    config = config_of(learner, model)
    made = make_learner(config, (8, 8, 1))
    images = jax.ShapeDtypeStruct((3, 8, 8, 1), jnp.int32)
    episode = Episode(images, images)
    params = jax.eval_shape(made.init, KEY, images)
    if made.grad_fn is not None:
        task = images if learner == "pretrained" else episode
        direction, metrics = jax.eval_shape(made.grad_fn, params, task, KEY)
        chex.assert_trees_all_equal_shapes(direction, params)
        assert metrics["generator_loss" if model == "gan" else "loss"].shape == ()
    candidates = jax.eval_shape(made.candidates, params)
    [tested, *others] = candidates.values()
    # Two rates, of each baseline by two optimisers.
    several = 3 if learner in ("pretrained", "scratch") else 1
    assert len(others) == (several if made.takes_steps and model != "gan" else 0)
    nothing = jax.ShapeDtypeStruct((0, 8, 8, 1), jnp.int32)
    for support, steps in ((images, 3), (nothing, 1)):
        if made.log_probs is None:
            continue
        for purpose in ("validation", "test"):
            found = jax.eval_shape(made.log_probs(2, purpose), tested, support, images, KEY)
            assert found.shape == (3,)
        if made.takes_steps:
            tried = jax.eval_shape(made.log_probs(2, "choice"), tested, support, images, KEY)
            assert tried.shape == (steps, 3)
    for support in (images, nothing):
        drawn = jax.eval_shape(made.draw(2), tested, support, jax.random.split(KEY, 4))
        assert (drawn.shape, drawn.dtype) == ((4, 8, 8, 1), jnp.float32)


@pytest.mark.slow
def test_without_shots_the_figure_is_that_of_the_ordinary_likelihood_code():
    config = config_of("maml", "pixelcnn")
    data = few_shot_generation_data.to_class_data(config, pictures())
    made = make_learner(config, (8, 8, 1))
    params = jax.jit(made.init)(KEY, data.examples[:2])
    tested = made.candidates(params)["0.0001"]
    sample = few_shot_generation_data.test_episodes(config)
    options = {"key": KEY, "num_tasks": 6}
    by_shots = evaluate_nll(made.log_probs(5, "test"), tested, sample, data, num_shots=0, **options)
    draw = jax.jit(lambda key: sample(jax.random.split(key)[0], data).query)
    queries = jnp.concatenate([draw(key) for key in task_keys(KEY, 6)])
    log_prob = adaptive(config, (8, 8, 1)).test_log_prob
    ordinary = evaluate_log_prob(log_prob, params, queries, key=KEY)
    assert config.test_queries == 4
    of_queries = -ordinary.per_task.reshape(6, 4)
    np.testing.assert_allclose(by_shots.per_task, of_queries.mean(1), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("learner", "model"), [("maml", "vae"), ("reptile", "gan")])
def test_a_run_gives_every_number_and_picture_and_the_same_when_resumed(
    monkeypatch, tmp_path, learner, model
):
    monkeypatch.setattr(few_shot_generation_data, "load_images", lambda *_, **__: pictures(size=8))
    config = config_of(learner, model, run_dir=tmp_path, use_tasks=3, use_ways=2, use_samples=2)
    numbers = few_shot_generation.main(config)
    json.dumps(numbers)
    for name in ("use_accuracy_real", "use_accuracy_with_samples"):
        assert 0 <= numbers[name] <= 1
    for picture in ("samples", "learning_curve"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 1000
    if model == "gan":
        assert "nll_by_shots" not in numbers
        return
    assert set(numbers["nll_by_shots"]) == {"0", "1"}
    for row in numbers["nll_by_shots"].values():
        assert 0 < row["nats"] < 64 * np.log(2) + 40
        assert row["interval"] > 0
    assert numbers["nll_by_shots"]["0"]["gain"] == 0
    assert (tmp_path / "nll_by_shots.png").stat().st_size > 1000
    with np.load(tmp_path / "nll_by_shots.npz") as values:
        assert values["1"].mean() == pytest.approx(numbers["nll_by_shots"]["1"]["nats"])
    again = few_shot_generation.main(replace(config, resume=True))
    assert again["nll_by_shots"] == numbers["nll_by_shots"]
    tested = replace(config, resume=True, replacement="test", shots=(0, 2), use_tasks=0)
    tested_again = few_shot_generation.main(tested)
    assert set(tested_again["nll_by_shots"]) == {"0", "2"}
    for name in ("best_step", "validation_nll_nats"):
        assert tested_again[name] == numbers[name]


def test_a_frozen_subset_of_classes_is_the_same_whatever_their_order():
    images = pictures(num_classes=8)
    names = few_shot_generation_data.frozen_subset(images, 3).class_names
    assert len(set(names)) == 3
    turned = LabelledImages(images.images, 7 - images.labels, images.class_names[::-1])
    assert few_shot_generation_data.frozen_subset(turned, 3).class_names == names
    assert few_shot_generation_data.frozen_subset(images, None) is images


def test_models_and_learners_bring_their_settings_and_flags_win():
    def parse(*argv):
        return program.parse(
            "few_shot_generation", PRESETS, default="glyphs", vary=with_model, argv=argv
        )

    attention = parse("--preset", "omniglot-lake", "--model", "attention_pixelcnn")
    assert (attention.learner, attention.train_shots) == ("amortised", 9)
    assert (attention.resampling, attention.steps) == ("corner", 9000)
    assert attention.run_dir.name == "few_shot_generation-omniglot-lake-attention_pixelcnn"
    reptile = parse("--learner", "reptile", "--inner-steps", "7")
    assert (reptile.outer_optimizer, reptile.inner_steps) == ("sgd", 7)
    assert reptile.run_dir.name == "few_shot_generation-glyphs-reptile-vae"
    assert parse("--model", "gan").inner_rate == 2e-4
    omniglot = "--preset", "omniglot-lake", "--model", "pixelcnn"
    steps = [parse(*omniglot, "--learner", name).steps for name in ("maml", "pretrained")]
    assert steps == [3500, 21_000]  # Of about the same minutes.
    started = parse(*omniglot, "--init-from", "runs/start")
    assert (started.steps, started.run_dir.name) == (
        1750,
        "few_shot_generation-omniglot-lake-maml-pixelcnn-started",
    )
    assert parse(*omniglot, "--steps", "70", "--init-from", "runs/start").steps == 70
    assert parse("--preset", "omniglot-alphabets").image_size == 26
    assert parse("--preset", "smoke", "--model", "flow_matching").num_test_tasks == 6
    for model, most in (("vae", 50), ("pixelcnn", 20), ("flow_matching", 5)):
        assert parse("--model", model, "--learner", "pretrained").test_steps == most
        assert parse("--model", model).test_steps == min(most, 20)


@pytest.mark.parametrize("learner", ["maml", "pretrained"])
def test_flow_matching_is_chosen_and_tested_in_so_many_likelihoods(learner):
    config = with_model(PRESETS["omniglot-lake"], Config(learner=learner, model="flow_matching"))
    made = make_learner(config, (28, 28, 1))
    tried = len(made.candidates(0.0)) * (config.test_steps + 1) * config.num_choice_tasks
    assert tried * (len(config.shots) - 1) <= 1200
    assert config.num_test_tasks * config.test_queries * len(config.shots) == 1200


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_settings_that_make_sense(preset):
    check(PRESETS[preset])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0; give 1 or more"),
        ({"shots": (1, 4)}, r"shots is \(1, 4\); give different numbers in order"),
        ({"shots": (0, 4, 1)}, r"shots is \(0, 4, 1\); give"),
        ({"model": "set_vae"}, "learner is maml and model set_vae; set_vae and attention_pixelcnn"),
        ({"learner": "amortised"}, "learner is amortised and model vae"),
        ({"learner": "reptile"}, "outer_optimizer is adam; reptile needs sgd"),
        ({"rate_factors": (0.3, 1.0)}, r"rate_factors is \(0\.3, 1\.0\); give 1 first"),
        ({"rate_factors": (1.0, 0.0)}, r"rate_factors is \(1\.0, 0\.0\); .* any others above 0"),
        ({"split": "random1000"}, "split is random1000 and dataset glyphs"),
        ({"sets_of": "alphabets"}, "sets_of is alphabets, dataset glyphs and split lake; only"),
        (
            {"sets_of": "alphabets", "dataset": "omniglot", "split": "random1000"},
            "split random1000; only the splits lake and alphabets45",
        ),
        ({"tuned_rates": ()}, r"tuned_rates is \(\); give one or more"),
        ({"model": "flow", "image_size": 26}, "image_size is 26; a flow halves it twice"),
        ({"model": "gan"}, "learner is maml and model gan; give --learner reptile"),
        ({"use_tasks": 5, "use_shots": 2}, r"use_shots is 2 and shots \(0, 1\); give one"),
        ({"model": "vae", "hidden_sizes": ()}, r"hidden_sizes is \(\); give one or more"),
        (
            {"learner": "amortised", "model": "set_vae", "vary_shots": True},
            "vary_shots is True and learner amortised.*give --no-vary-shots",
        ),
        (
            {"learner": "pretrained", "inner_optimizer": "adam"},
            "inner_optimizer is adam and learner pretrained; only maml",
        ),
        (
            {
                "learner": "amortised",
                "model": "attention_pixelcnn",
                "vary_shots": False,
                "attention_layers": (1, 5),
            },
            r"attention_layers is \(1, 5\) and num_layers 5; give numbers from 1 to 4",
        ),
        ({"train_samples": 5}, "train_samples is 5 and model vae; only set_vae"),
        ({"warmup_steps": 4}, "warmup_steps is 4 and steps 4; give fewer"),
        ({"average_decay": 1.0}, r"average_decay is 1\.0; give 0, or a number below 1"),
        ({"learner": "scratch", "init_from": Path("x")}, "init_from is given and learner scratch"),
        ({"inner_rate": 0.0}, r"inner_rate is 0\.0; give more than 0"),
        ({"num_test_tasks": 1}, "num_test_tasks is 1; give 2 or more"),
    ],
)
def test_mistakes_are_named_before_training(settings, message):
    with pytest.raises(UserError, match=message):
        check(replace(PRESETS["smoke"], **settings))
