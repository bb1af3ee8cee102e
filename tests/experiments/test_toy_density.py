"""The experiment on densities of two numbers: every model, a whole run, mistakes."""

import json
from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import program, toy_density
from experiments.toy_density import PRESETS, ModelName
from metagen_jax.errors import UserError

KEY = jax.random.key(0)


@pytest.mark.parametrize("name", get_args(ModelName))
def test_every_model_has_a_loss_a_likelihood_and_samples_of_one_point(name):
    model = toy_density.make_model(replace(PRESETS["smoke"], model=name, hidden_sizes=(4,)))
    points, point = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5, 2), (2,)))
    params = jax.eval_shape(model.init, KEY, points)
    assert jax.eval_shape(model.loss, params, points, KEY)[0].shape == ()
    assert jax.eval_shape(model.log_prob, params, point, KEY).shape == ()
    assert jax.eval_shape(model.sample, params, KEY).shape == (2,)


@pytest.mark.slow
def test_a_run_integrates_what_it_learned_and_draws_it(tmp_path):
    config = replace(
        PRESETS["smoke"],
        model="realnvp",
        density="eight_gaussians",
        num_layers=1,
        hidden_sizes=(4,),
        num_test=500,
        grid=60,
        run_dir=tmp_path,
    )
    numbers = toy_density.main(config)
    # Hardly trained it is a Gaussian of the data's deviation, 2.1 in both directions.
    assert numbers["test_nll_nats"] == pytest.approx(1 + np.log(2 * np.pi * 2.14**2), abs=0.1)
    assert numbers["mass_in_square"] == pytest.approx(0.962, abs=0.02)
    # Eight Gaussians apart: log 8 more than the entropy of one.
    entropy = 1 + np.log(2 * np.pi / 16) + np.log(8)
    assert numbers["true_nll_nats"] == pytest.approx(entropy, abs=0.15)
    difference = numbers["test_nll_nats"] - numbers["true_nll_nats"]
    assert numbers["excess_nats"] == pytest.approx(difference, abs=1e-4)
    for picture in ("density", "learning_curve"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 1000
    json.dumps(numbers)


def test_a_model_brings_its_settings_and_the_command_line_wins():
    def parse(*argv):
        return program.parse(
            "toy_density", PRESETS, default="two-moons", vary=toy_density.with_model, argv=argv
        )

    assert parse().run_dir.name == "toy_density-two-moons-spline"
    assert parse("--model", "flow_matching").hidden_sizes == (128, 128, 128)
    assert parse("--model", "flow_matching", "--hidden-sizes", "8").hidden_sizes == (8,)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_settings_that_make_sense(preset):
    toy_density.check(PRESETS[preset])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0; give 1 or more"),
        ({"num_test": 1}, "num_test is 1; give 2 or more"),
        ({"rate": 0.0}, r"rate is 0\.0; give more than 0"),
        ({"hidden_sizes": (3, 0)}, r"hidden_sizes is \(3, 0\)"),
    ],
)
def test_mistakes_are_named_before_training(settings, message):
    with pytest.raises(UserError, match=message):
        toy_density.main(replace(PRESETS["smoke"], **settings))
