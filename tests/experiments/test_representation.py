"""The experiment on features: every method gives what it asks for, and a run is whole."""

from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import representation, representation_report
from experiments.representation_config import (
    PRESETS,
    Config,
    MethodName,
    check,
    with_method,
)
from experiments.representation_data import Part, make_views
from experiments.representation_methods import METHODS
from experiments.representation_report import judge_by_few_shots, judge_by_probes
from metagen_jax.errors import UserError
from metagen_jax.parallel import data_parallel

KEY = jax.random.key(0)


def config_of(name, **settings):
    return replace(with_method(PRESETS["smoke"], Config(method=name)), **settings)


@pytest.mark.parametrize("dataset", ["glyphs", pytest.param("cifar10", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", get_args(MethodName))
def test_every_method_has_a_direction_and_features(name, dataset):
    if name == "colorization" and dataset == "glyphs":
        return
    config = config_of(name, dataset=dataset)
    check(config)
    method = METHODS[name](config)
    images = jax.ShapeDtypeStruct((8, 28, 28, 1) if dataset == "glyphs" else (8, 32, 32, 3), float)
    params = jax.eval_shape(method.init, KEY, images)
    grad_fn = data_parallel(method.grad_fn, devices=jax.devices("cpu")[:2])
    direction, metrics = jax.eval_shape(grad_fn, params, images, KEY)
    assert jax.tree.structure(direction) == jax.tree.structure(params)
    assert metrics["loss"].shape == ()
    features = jax.eval_shape(method.features, params, images)
    assert features.shape[0] == 8
    assert len(features.shape) == 2
    if method.draw is not None:
        drawn = jax.eval_shape(method.draw, params, images, KEY)
        assert drawn.shape == (len(method.rows), *images.shape)


@pytest.mark.slow
def test_features_that_know_the_class_are_worth_most_and_noise_is_at_chance(monkeypatch):
    monkeypatch.setattr(representation_report, "TASKS", ((5, 2),))
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(25), 12)
    part = Part(np.zeros((300, 2, 2, 1), np.uint8), labels)
    config = config_of("simclr", num_test_tasks=30)
    known = judge_by_few_shots(config, part, np.eye(25, dtype=np.float32)[labels])
    noise = judge_by_few_shots(config, part, rng.normal(size=(300, 8)).astype(np.float32))
    for name in ("class_mean", "logistic"):
        assert known[f"5_way_2_shot_{name}"] == 1
        interval = noise[f"5_way_2_shot_{name}_interval"]
        assert abs(noise[f"5_way_2_shot_{name}"] - 0.2) < 2.5 * interval
    probes = judge_by_probes(*[(np.eye(25, dtype=np.float32)[labels], labels)] * 3)
    assert probes == {"linear_probe": 1.0, "nearest_neighbours": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simclr", "mae"])
def test_a_run_gives_its_numbers_and_draws_its_pictures(tmp_path, name):
    config = config_of(name, run_dir=tmp_path)
    numbers = representation.main(config)
    assert list(numbers["features"]) == ["raw pixels", "random initialisation", name, "supervised"]
    for features in numbers["features"].values():
        assert 0.2 < features["5_way_1_shot_class_mean"] <= 1
    pictures = ["learning_curve", "views", "neighbours", "map"]
    for picture in [*pictures, "drawings"] if name == "mae" else pictures:
        assert (tmp_path / f"{picture}.png").stat().st_size > 1000


def test_views_differ_and_stay_pictures():
    image = jnp.zeros((1, 28, 28, 1)).at[0, 6:22, 12:16].set(1.0)
    views = np.asarray(make_views(config_of("simclr"), image, num_views=3))
    assert views.shape == (1, 3, 28, 28, 1)
    assert ((views >= -1e-5) & (views <= 1 + 1e-5)).all()
    assert np.abs(views[0, 0] - views[0, 1]).max() > 0.3


def test_settings_without_sense_are_refused():
    for changes, message in (
        ({"method": "colorization"}, "colorization asks for colours"),
        ({"method": "cpc", "net": "conv4"}, "cpc takes patches, or draws, and net is conv4"),
        ({"num_filters": 12}, "num_filters is 12; give a multiple of 8"),
        ({"num_images": 100}, "num_images is 100; give 200 or more"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ):
        with pytest.raises(UserError, match=message):
            check(replace(Config(), **changes))
