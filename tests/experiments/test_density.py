"""The experiment on densities: every model gives what it asks for, and a run is whole."""

import itertools
import json
from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import density, density_quality, program
from experiments.density_config import PRESETS, Config, ModelName, check, with_model
from experiments.density_data import Splits, draw_values, load_splits
from experiments.density_model import draw_pixel, num_pixel_params, pixel_log_prob
from experiments.density_models import MODELS
from metagen_jax.errors import UserError

KEY = jax.random.key(0)
SHAPE = (8, 8, 1)
SMALL = {"num_latents": 3, "hidden_sizes": (6, 5), "num_filters": 8, "num_layers": 2}


def config_of(name, **settings):
    line = Config(model=name)
    masks = {"num_masks": 1 if settings.get("values") == "levels" else 3}
    return replace(with_model(PRESETS["smoke"], line), **SMALL, **masks, **settings)


# Flows take both kinds of values by one path, and to trace them takes longest.
FLOWS = ("realnvp", "glow", "maf", "spline", "flow_matching")
SLOW = ("realnvp", "flow_matching")
OTHERS = [name for name in get_args(ModelName) if name not in FLOWS]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, "levels") for name in get_args(ModelName) if name not in SLOW),
        *((name, "dynamic") for name in OTHERS),
        *(pytest.param(name, "levels", marks=pytest.mark.slow) for name in SLOW),
    ],
)
def test_every_model_has_a_loss_a_likelihood_and_samples_of_one_image(name, values):
    config = config_of(name, values=values)
    model = MODELS[name](config, SHAPE)
    images = jax.ShapeDtypeStruct((3, *SHAPE), jnp.int32)
    image = jax.ShapeDtypeStruct(SHAPE, jnp.int32)
    params = jax.eval_shape(model.init, KEY, images)
    direction, _ = jax.eval_shape(model.grad_fn, params, images, KEY)
    assert jax.tree.structure(direction) == jax.tree.structure(params)
    for log_prob in (model.log_prob, model.test_log_prob):
        assert log_prob is None or jax.eval_shape(log_prob, params, image, KEY).shape == ()
    assert jax.eval_shape(model.sample, params, KEY).shape == SHAPE
    if model.reconstruct is not None:
        assert jax.eval_shape(model.reconstruct, params, image).shape == SHAPE
    if model.interpolate is not None:
        weight = jax.ShapeDtypeStruct((), jnp.float32)
        between = jax.eval_shape(model.interpolate, params, image, image, weight)
        assert between.shape == SHAPE
    if model.latents is not None and model.decode_grey is not None:
        vector = jax.eval_shape(model.latents, params, image)
        assert vector.shape == (3,)
        assert jax.eval_shape(model.decode_grey, params, vector).shape == SHAPE
    if model.complete is not None:
        known = jax.ShapeDtypeStruct(SHAPE, jnp.bool)
        completed = jax.eval_shape(model.complete, params, image, known, KEY)
        assert (completed.shape, completed.dtype) == (SHAPE, jnp.int32)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("row_lstm", marks=pytest.mark.slow),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("made", "pixelcnn", "diagonal_bilstm")),
    ],
)
def test_the_probabilities_of_all_small_images_sum_to_one(name):
    shape = (2, 2, 1)
    model = MODELS[name](config_of(name, values="static"), shape)
    every = jnp.array(list(itertools.product((0, 1), repeat=4))).reshape(-1, *shape)
    params = model.init(KEY, every)
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(KEY, x.shape), params)
    log_probs = jax.vmap(model.test_log_prob, (None, 0, None))(params, every, KEY)
    assert jnp.exp(log_probs).sum() == pytest.approx(1, abs=1e-5)
    assert jnp.ptp(log_probs) > 0.1


@pytest.mark.slow
def test_channels_of_colour_levels_know_of_one_another():
    config = config_of("pixelcnn", values="levels")
    outputs = jax.random.normal(KEY, (num_pixel_params(config, 3),))

    def log_prob(*levels):
        return pixel_log_prob(config, jnp.array(levels), outputs)

    # Of independent channels these would be the same.
    of_red = log_prob(160, 90, 90) - log_prob(90, 90, 90)
    given_more_green = log_prob(160, 160, 90) - log_prob(90, 160, 90)
    assert abs(of_red - given_more_green) > 0.01
    drawn = draw_pixel(config, KEY, outputs, 3)
    assert drawn.shape == (3,)
    assert jnp.isfinite(log_prob(*drawn))


@pytest.mark.slow
def test_a_run_gives_its_numbers_and_draws_its_pictures(tmp_path):
    config = replace(config_of("made"), run_dir=tmp_path)
    numbers = density.main(config)
    assert numbers["kind"] == "exact"
    # 4 steps leave it near what each pixel's own probability gives, 165 nats.
    assert 100 < numbers["test_nll_nats"] < 250
    bits = numbers["test_nll_nats"] / (28 * 28 * np.log(2))
    assert numbers["test_bits_per_dim"] == pytest.approx(bits)
    assert numbers["completion_error_mean_training_image"] < 0.25
    for picture in ("learning_curve", "samples", "completions"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 1000
    json.dumps(numbers)


@pytest.mark.slow
def test_samples_are_compared_with_as_many_test_images(tmp_path, monkeypatch):
    monkeypatch.setattr(density_quality, "CLASSIFIER_STEPS", 2)
    config = config_of("vae", values="levels", dataset="mnist", quality=True, num_compared=40)
    config = replace(config, run_dir=tmp_path)
    rng = np.random.default_rng(0)
    train, val, test = (rng.integers(0, 256, (n, 28, 28, 1), np.uint8) for n in (90, 10, 60))
    splits = Splits(train, val, test, np.arange(90, dtype=np.int32) % 3, np.arange(60) % 3)
    model = MODELS["vae"](config, (28, 28, 1))
    params = model.init(KEY, jnp.asarray(train[:8], jnp.int32))
    numbers = density_quality.compare_and_report(config, model, params, splits)
    assert numbers["num_samples"] == 40
    assert numbers["samples_are"] == "means of the pixels"
    # Images of one distribution are nearer than samples of a model that has learned nothing.
    assert 0 <= numbers["frechet_distance_of_training_images"] < numbers["frechet_distance"]
    assert 0 <= numbers["smallest_share_of_a_class"] <= 1 / 3
    assert (tmp_path / "nearest.png").stat().st_size > 1000
    json.dumps(numbers)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_model_has_settings_for_every_preset(preset):
    for name in get_args(ModelName):
        if (name, preset) != ("made", "cifar10"):
            check(with_model(PRESETS[preset], replace(PRESETS[preset], model=name)))


def test_a_model_brings_its_settings_and_the_command_line_wins():
    def parse(*argv):
        return program.parse("density", PRESETS, default="glyphs", vary=with_model, argv=argv)

    assert parse("--model", "iwae").num_samples == 50
    assert parse("--model", "iwae", "--num-samples", "5").num_samples == 5
    assert parse("--model", "glow").values == "levels"
    assert parse("--model", "glow").run_dir.name == "density-glyphs-glow"
    assert parse("--preset", "binarized-mnist", "--model", "glow").values == "static"
    assert parse("--dataset", "mnist", "--model", "made").steps == 12_000


def test_values_are_ink_high_and_binary_ones_drawn_in_proportion():
    config = replace(PRESETS["smoke"], num_validation=500)
    splits = load_splits(config)
    assert splits.val.shape == (500, 28, 28, 1)
    # Most of a letter's picture is paper, which is dark here.
    assert splits.val.mean() < 64
    drawn = draw_values(config, KEY, splits.val)
    assert set(np.unique(drawn)) == {0, 1}
    assert float(drawn.mean()) == pytest.approx(splits.val.mean() / 255, abs=2e-3)
    static = load_splits(replace(config, values="static")).val
    np.testing.assert_array_equal(static, splits.val > 127)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0; give 1 or more"),
        ({"num_test": 5}, "num_test is 5; give 30 or more"),
        ({"rate": 0.0}, r"rate is 0\.0; give more than 0"),
        ({"hidden_sizes": (3, 0)}, r"hidden_sizes is \(3, 0\)"),
        ({"dataset": "binarized_mnist"}, "give --values static"),
        ({"kernel_size": 4}, "kernel_size is 4; give an odd number from 3"),
        ({"epsilon": -1.0}, r"epsilon is -1\.0; give 0 or more"),
        ({"weight_decay": -1.0}, r"weight_decay is -1\.0; give 0 or more"),
        ({"model": "iaf_vae", "doubly_reparameterized": True}, "and model is iaf_vae"),
        ({"quality": True}, "dataset is glyphs; give --no-quality"),
        ({"num_masks": 2, "values": "levels"}, "num_masks is 2 .*; give --num-masks 1"),
        ({"model": "gan", "weight_decay": 0.1}, "gan's players have none; give 0"),
    ],
)
def test_mistakes_are_named_before_training(settings, message):
    with pytest.raises(UserError, match=message):
        check(replace(PRESETS["smoke"], **settings))
