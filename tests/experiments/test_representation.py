"""The experiment on features: every method gives what it asks for, and a run is whole."""

import functools
import types
from dataclasses import replace
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    few_shot_config,
    few_shot_data,
    few_shot_generation_presets,
    few_shot_start,
    program,
    representation,
    representation_data,
    representation_report,
)
from experiments.few_shot_generation_models import learned_features
from experiments.few_shot_learners import LEARNERS
from experiments.representation_config import (
    PRESETS,
    TWO_VIEWS,
    Config,
    MethodName,
    check,
    with_method,
)
from experiments.representation_data import Part, make_views
from experiments.representation_methods import METHODS
from experiments.representation_report import judge_by_few_shots, judge_by_probes, over_seeds
from metagen_jax.data.classes import LabelledImages
from metagen_jax.errors import UserError
from metagen_jax.nets.conv4 import Conv4
from metagen_jax.nets.resnet import ResNet
from metagen_jax.parallel import data_parallel
from metagen_jax.self_supervised.cpc import patch_grid

KEY = jax.random.key(0)
METHOD_NAMES = get_args(MethodName)


def config_of(name, **settings):
    return replace(with_method(PRESETS["smoke"], Config(method=name)), **settings)


def squares(dataset, split, **_):
    """Grey or coloured squares on noise, for ten classes of a picture or 30 of a character."""
    del split
    size, channels, num_classes = (32, 3, 10) if dataset == "cifar10" else (28, 1, 30)
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(num_classes, dtype=np.int32), 10 if channels == 1 else 25)
    images = rng.integers(0, 60, (len(labels), size, size, channels))
    for image, label in zip(images, labels, strict=True):
        image[4:20, 2 + label // 2 : 10 + label // 2] += 20 * (label % 8)
    return LabelledImages(images.astype(np.uint8), labels, tuple(map(str, range(num_classes))))


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.setattr(representation_data, "load_images", squares)


def shape_of(dataset):
    return (8, 28, 28, 1) if dataset == "glyphs" else (8, 32, 32, 3)


@pytest.mark.parametrize("dataset", ["glyphs", pytest.param("cifar10", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_every_method_has_a_direction_and_features(name, dataset):
    dataset = "cifar10" if name == "colorization" else dataset
    config = config_of(name, dataset=dataset)
    config = replace(config, net="resnet" if dataset == "cifar10" else config.net)
    check(config)
    images = jax.ShapeDtypeStruct(shape_of(dataset), float)
    method = METHODS[name](config, np.zeros(images.shape, np.uint8))
    params = jax.eval_shape(method.init, KEY, images)
    grad_fn = data_parallel(method.grad_fn, devices=jax.devices("cpu")[:2])
    direction, metrics = jax.eval_shape(grad_fn, params, images, KEY)
    assert jax.tree.structure(direction) == jax.tree.structure(params)
    assert metrics["loss"].shape == ()
    features = jax.eval_shape(functools.partial(method.features, num_reference=4), params, images)
    assert features.shape[0] == 8
    assert len(features.shape) == 2
    assert set(jax.tree.leaves(method.net(params))) <= set(jax.tree.leaves(params))
    if method.draw is not None:
        drawn = jax.eval_shape(method.draw, params, images, KEY)
        assert drawn.shape[:2] == (len(method.rows), 8)
        assert drawn.shape[-1] == images.shape[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_batch_norm_of_net_and_head_goes_by_the_images_of_all_devices(name):
    with jax.enable_x64(True):
        images = jax.random.uniform(KEY, (16, 28, 28, 1))
        method = METHODS[name](config_of(name), np.zeros((2, 28, 28, 1), np.uint8))
        params = jax.tree.map(jnp.float64, jax.jit(method.init)(KEY, images[:2]))
        one, eight = (
            data_parallel(method.grad_fn, devices=jax.devices("cpu")[:num])(params, images, KEY)
            for num in (1, 8)
        )
        # Its metric of a device's spread is another.
        chex.assert_trees_all_close(eight[0], one[0], atol=1e-9)
        np.testing.assert_allclose(eight[1]["loss"], one[1]["loss"], rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "size", "stride"),
    [("context_prediction", 7, 8), pytest.param("cpc", 8, 4, marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_a_net_of_patches_never_sees_a_whole_image(name, size, stride):
    config = config_of(name, dataset="cifar10")
    method = METHODS[name](config, np.zeros(shape_of("cifar10"), np.uint8))
    images = jax.random.uniform(KEY, (2, 32, 32, 3))
    params = jax.jit(method.init)(KEY, images)
    patches = patch_grid(2 * images - 1, patch_size=size, stride=stride)
    apply = jax.jit(ResNet(None, (8, 16, 32)).apply)
    expected = [
        apply(method.net(params), of_image.reshape(-1, size, size, 3)).mean(0)
        for of_image in patches
    ]
    features = jax.jit(method.features)(params, images)
    np.testing.assert_allclose(features, jnp.stack(expected), atol=1e-5)


def test_features_of_characters_depend_on_no_other_image_of_a_block(no_data):
    """A norm by the batch goes by images of training alone."""
    config = config_of("simclr", num_filters=8)
    splits = representation_data.load_splits(config)
    splits = splits._replace(test=Part(*(x[:40] for x in splits.test)))
    method = METHODS["simclr"](config, splits.train.images)
    params = jax.jit(method.init)(KEY, jnp.zeros((2, 28, 28, 1)))
    extract = functools.partial(representation.features_of, config, method.features, splits.train)
    together = extract(params, splits.test.images)
    alone = extract(params, splits.test.images[7:8])
    np.testing.assert_allclose(together[7:8], alone, atol=1e-4)
    assert np.abs(together[7] - together[20]).max() > 1e-2


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
def test_a_run_gives_its_numbers_and_draws_its_pictures(tmp_path, no_data):
    numbers = representation.main(config_of("inpainting", run_dir=tmp_path))
    assert list(numbers["features"]) == [
        "raw pixels",
        "random initialisation",
        "inpainting",
        "supervised",
    ]
    assert numbers["images_seen"] == 16
    assert numbers["supervised_images_seen"] == 32
    for features in numbers["features"].values():
        assert 0 <= features["alignment"] <= 4
    # What two steps learn is little: pixels, which tell the squares, tell a lower bound.
    assert numbers["features"]["raw pixels"]["5_way_1_shot_class_mean"] > 0.4
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"learning_curve.png", "neighbours.png", "map.png", "drawings.png"}


def test_the_whole_net_is_tuned_on_each_share_of_the_labels(no_data, monkeypatch):
    config = config_of("simclr", dataset="cifar10", net="resnet")
    method = METHODS["simclr"](config, np.zeros((8, 32, 32, 3), np.uint8))
    splits = representation_data.load_splits(config)
    params = jax.eval_shape(method.init, KEY, jnp.zeros((2, 32, 32, 3)))

    def fine_tune(apply, params, train, val, test, *, fraction, num_steps, **_):
        assert num_steps == config.tuning_steps
        answers = jax.eval_shape(apply, params, test.images[:2])
        assert answers.shape == (2, 10)
        return types.SimpleNamespace(accuracy=fraction)

    monkeypatch.setattr(representation, "fine_tune", fine_tune)
    numbers = representation.tune(config, method, params, splits)
    assert numbers == {
        "tuned_1_percent": 0.01,
        "tuned_10_percent": 0.1,
        "tuned_100_percent": 1.0,
    }


@pytest.mark.slow
def test_seeds_are_runs_of_their_own_whose_means_are_given(tmp_path, no_data, monkeypatch, capsys):
    config = config_of("simclr", run_dir=tmp_path, seeds=2, seed=5)
    numbers = representation.main(config)
    assert capsys.readouterr().out.count("judging raw pixels") == 1
    assert [run["images_seen"] for run in numbers["runs"]] == [16, 16]
    for kind in ("raw pixels", "simclr"):
        values = [run["features"][kind]["5_way_1_shot_class_mean"] for run in numbers["runs"]]
        assert numbers["features"][kind]["5_way_1_shot_class_mean"] == pytest.approx(
            np.mean(values)
        )
    assert numbers["features"]["raw pixels"]["5_way_1_shot_class_mean_interval"] == 0
    # The net of one of them is what few-shot learning starts from.
    learned = tmp_path / "seed6"
    config = replace(few_shot_config.PRESETS["smoke"], init_from=learned)
    few_shot_start.check_start(learned, config)
    images = jnp.zeros((2, 28, 28, 1))
    for learner in ("maml", "prototypical"):
        params = LEARNERS[learner](replace(config, learner=learner)).init(KEY, images)
        started = few_shot_start.start_from(learned, params)
        assert jax.tree.structure(started) == jax.tree.structure(params)
        moved = jnp.abs(started["params"]["conv0"]["kernel"] - params["params"]["conv0"]["kernel"])
        assert moved.max() > 1e-3
        if learner == "maml":
            np.testing.assert_array_equal(
                started["params"]["head"]["kernel"], params["params"]["head"]["kernel"]
            )
    # Resumed, what has been written is read again.
    monkeypatch.setattr(representation, "run_seed", None)
    again = representation.main(config_of("simclr", run_dir=tmp_path, seeds=2, seed=5, resume=True))
    assert again == numbers


def test_few_shot_learning_starts_from_the_same_net_alone(tmp_path):
    learned = replace(PRESETS["omniglot"], run_dir=tmp_path / "learned")
    program.prepare_run_dir(learned)
    config = few_shot_config.PRESETS["omniglot-5w1s"]
    few_shot_start.check_start(learned.run_dir, config)
    few_shot_start.check_start(learned.run_dir, replace(config, learner="prototypical"))
    for changes, message in (
        ({"num_filters": 32}, "with num_filters 64, here it is 32; give"),
        ({"norm": "group"}, "with norm batch, here it is group"),
        ({"strided": False}, "leave --no-strided out"),
        ({"learner": "matching"}, "learner is matching; with init_from give one of maml"),
        ({"split": "lake"}, "learned from the split vinyals, here it is lake, of whose"),
    ):
        with pytest.raises(UserError, match=message):
            few_shot_start.check_start(learned.run_dir, replace(config, **changes))
    with pytest.raises(UserError, match=r"can't read .* as --init-from"):
        few_shot_start.check_start(tmp_path, config)
    generating = replace(few_shot_generation_presets.PRESETS["omniglot-lake"], model="set_vae")
    for changes, message in (
        ({}, "with norm batch, here it is group"),
        ({"norm": "group"}, "lake"),
    ):
        folder = tmp_path / f"encoder{len(changes)}"
        program.prepare_run_dir(replace(learned, run_dir=folder, **changes))
        with pytest.raises(UserError, match=message):
            learned_features(replace(generating, encoder_from=folder), (28, 28, 1))
    other = replace(learned, method="mae", run_dir=tmp_path / "other")
    program.prepare_run_dir(other)
    with pytest.raises(UserError, match="is of a run with another net than four blocks"):
        few_shot_start.check_start(other.run_dir, config)


@pytest.mark.slow
def test_features_of_a_run_are_clustered_and_tell_a_generator_what_a_class_is_like(tmp_path):
    learned = config_of("vicreg", norm="group", run_dir=tmp_path / "learned")
    program.prepare_run_dir(learned)
    net = Conv4(None, learned.num_filters, norm="group")
    params = jax.jit(net.init)(KEY, jnp.zeros((1, 28, 28, 1)))
    representation.keep_net(learned, params)
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28, 1)).astype(np.uint8)
    ink = 1 - images / np.float32(255)
    expected = jax.jit(net.apply)(params, ink)
    clustering = replace(
        few_shot_config.PRESETS["smoke"],
        labels="cactus",
        norm="group",
        features_from=learned.run_dir,
        run_dir=tmp_path / "clustering",
    )
    few_shot_config.check(clustering)
    features = few_shot_data.embed(clustering, jnp.asarray(images))
    np.testing.assert_allclose(features, expected, atol=1e-5)
    generating = replace(
        few_shot_generation_presets.PRESETS["omniglot-lake"],
        model="set_vae",
        encoder_from=learned.run_dir,
    )
    of_generator = jax.jit(learned_features(generating, (28, 28, 1)))
    np.testing.assert_allclose(of_generator(ink), expected, atol=1e-5)
    with pytest.raises(UserError, match=r"norm group, here it is batch; .* as --features-from"):
        few_shot_data.embed(replace(clustering, norm="batch"), jnp.asarray(images))


def test_means_over_seeds_have_intervals_by_students_t():
    runs = [
        {"simclr": {"probe": value, "probe_interval": 9.0, "collapse": collapse}}
        for value, collapse in ((0.5, None), (0.6, "complete"), (0.7, None))
    ]
    numbers = over_seeds(runs)["simclr"]
    assert numbers["probe"] == pytest.approx(0.6)
    # 4.303 is the quantile of two degrees of freedom in the tables.
    assert numbers["probe_interval"] == pytest.approx(4.303 * 0.1 / np.sqrt(3), rel=1e-3)
    assert numbers["collapse"] == "complete"


@pytest.mark.parametrize("size", [None, 20])
def test_views_differ_and_stay_pictures(size):
    image = jnp.zeros((1, 28, 28, 1)).at[0, 6:22, 12:16].set(1.0)
    views = np.asarray(make_views(config_of("simclr", view_size=size), image, num_views=3))
    assert views.shape == (1, 3, size or 28, size or 28, 1)
    assert ((views >= -1e-5) & (views <= 1 + 1e-5)).all()
    assert np.abs(views[0, 0] - views[0, 1]).max() > 0.3


@pytest.mark.parametrize("preset", ["glyphs", "omniglot", "cifar10"])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_every_method_of_every_preset_makes_sense_and_flags_win(preset, name):
    def parse(*argv):
        argv = ("--preset", preset, "--method", name, *argv)
        return program.parse(
            "representation", PRESETS, default="glyphs", vary=with_method, argv=argv
        )

    if name == "colorization" and preset != "cifar10":
        return
    config = parse()
    check(config)
    assert config.run_dir.name == f"representation-{preset}-{name}"
    assert (config.view_size == 24) == (preset == "cifar10" and name in TWO_VIEWS)
    assert config.fine_tuning == (preset == "cifar10" and name == "simclr")
    assert parse("--steps", "7").steps == 7


def test_settings_without_sense_are_refused():
    for changes, message in (
        ({"method": "colorization"}, "colorization asks for colours"),
        ({"method": "cpc", "net": "conv4"}, "cpc takes patches, or draws, and net is conv4"),
        ({"num_filters": 12}, "num_filters is 12; give a multiple of 8"),
        ({"num_images": 100}, "num_images is 100; give 200 or more"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"split": "lake"}, "split is lake and dataset glyphs"),
        ({"seeds": 0}, "seeds is 0; give 1 or more"),
        ({"dataset": "cifar10"}, "norm is batch, .*; give --net resnet or --norm group"),
        ({"method": "mae", "view_size": 24}, "view_size is 24; .* none to mae"),
        ({"fine_tuning": True}, "fine_tuning asks for classes with many labels"),
    ):
        with pytest.raises(UserError, match=message):
            check(replace(Config(), **changes))


def test_too_few_test_images_are_refused_before_training(no_data, monkeypatch):
    monkeypatch.setattr(representation, "run_seed", None)
    with pytest.raises(UserError, match=r"5 shots and 8 queries need 13 examples .* class has 10"):
        representation.main(config_of("simclr", num_queries=8, num_images=None))
