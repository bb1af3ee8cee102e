"""The few-shot experiment: what it refuses, and end to end on little."""

import dataclasses
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import few_shot, few_shot_config, few_shot_data, few_shot_report, program
from experiments.few_shot_learners import LEARNERS
from metagen_jax.data.classes import ClassSplit, LabelledImages
from metagen_jax.errors import UserError
from metagen_jax.types import Episode

SMOKE = few_shot.PRESETS["smoke"]


def colour_splits(_) -> ClassSplit:
    """Eight classes in each part, told apart by a colour, ten noisy pictures of each."""
    rng = np.random.default_rng(0)

    def part():
        labels = np.repeat(np.arange(8, dtype=np.int32), 10)
        colours = rng.integers(60, 200, (8, 1, 1, 3))
        noise = rng.integers(-50, 50, (80, 8, 8, 3))
        return LabelledImages((colours[labels] + noise).astype(np.uint8), labels, tuple("abcdefgh"))

    return ClassSplit(part(), part(), part())


def test_ink_of_letters_is_high_and_colours_stay_as_they_are():
    bytes_ = jnp.array([0, 51, 255], jnp.uint8)
    letters = few_shot.normalise(jnp.broadcast_to(bytes_[:, None, None, None], (3, 4, 4, 1)))
    colours = few_shot.normalise(jnp.broadcast_to(bytes_, (2, 4, 4, 3)))
    np.testing.assert_allclose(letters[:, 0, 0, 0], [1, 0.8, 0], atol=1e-7)
    np.testing.assert_allclose(colours[0, 0, 0], [0, 0.2, 1], atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_ways": 1}, "num_ways is 1; give 2 or more"),
        ({"num_shots": 0}, "num_shots is 0; give 1 or more"),
        ({"inner_steps": 0}, "inner_steps is 0"),
        ({"test_queries": ()}, "test_queries is ()"),
        ({"test_queries": (5, 0)}, "test_queries is (5, 0)"),
        ({"num_test_tasks": 1}, "need 2 or more for an interval"),
        ({"split": "lake"}, "split is lake and dataset glyphs"),
        ({"learner": "reptile"}, "outer_optimizer is adam at 0.003; reptile needs sgd at up to 1"),
        (
            {"learner": "reptile", "outer_optimizer": "sgd", "outer_rate": 1.5},
            "outer_optimizer is sgd at 1.5; reptile needs sgd at up to 1",
        ),
        ({"train_shots": 0}, "train_shots is 0; give 1 or more"),
        ({"outer_rate": -1.0}, "outer_rate is -1.0; give more than 0"),
        ({"inner_rate": float("nan")}, "inner_rate is nan"),
        ({"dataset": "cifar_fs"}, "image_size is 28; cifar_fs has pictures of 32"),
        ({"features_from": Path("x")}, "features_from is given and labels is true, which has no"),
    ],
)
def test_settings_that_would_fail_after_training_are_refused_before(settings, says):
    with pytest.raises(UserError, match=r"give|need|leave") as raised:
        few_shot.check(dataclasses.replace(SMOKE, **settings))
    assert says in str(raised.value)


@pytest.mark.parametrize("preset", few_shot.PRESETS)
def test_presets_are_settings_that_make_sense(preset):
    few_shot.check(few_shot.PRESETS[preset])


def test_too_few_classes_or_pictures_name_what_is_needed_and_what_there_is():
    images = colour_splits(None).test
    config = dataclasses.replace(SMOKE, num_ways=50, rotations=4)
    with pytest.raises(
        UserError,
        match=r"the test classes of glyphs .* 50 classes and the data has 32 .*; lower num_ways",
    ):
        few_shot.to_class_data(config, images, "test")
    with pytest.raises(UserError, match=r"need 16 examples of each class and the smallest .* 10"):
        few_shot.to_class_data(SMOKE, images, "test")
    few = dataclasses.replace(SMOKE, num_queries=12, test_queries=(2, 13))
    for part, named in (("training", "num_queries 12"), ("test", r"test_queries \(2, 13\)")):
        with pytest.raises(UserError, match=rf"num_shots 1, {named}\): .*; ask for fewer"):
            few_shot.to_class_data(few, images, part)


@pytest.mark.parametrize(("names", "what"), [(["x"], "no labels, or a single one"), ("xy", "2 cl")])
def test_a_set_of_too_few_classes_to_divide_is_named(monkeypatch, capsys, names, what):
    images = LabelledImages(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int32), tuple(names))
    monkeypatch.setattr(few_shot_data, "load_images", lambda *_, **__: images)
    with pytest.raises(UserError, match=f"dataset some has {what}.*; give a --dataset of more"):
        few_shot_data.load_splits(dataclasses.replace(SMOKE, dataset="some"))
    assert capsys.readouterr().out == ""


def test_any_set_of_tfds_is_divided_by_class(monkeypatch):
    names, labels = tuple("abcdefghij"), np.repeat(np.arange(10, dtype=np.int32), 3)
    images = LabelledImages(np.zeros((30, 8, 8, 3), np.uint8), labels, names)
    asked = []
    monkeypatch.setattr(few_shot_data, "load_images", lambda *a, **_: asked.append(a) or images)
    parts = few_shot_data.load_splits(dataclasses.replace(SMOKE, dataset="some"))
    assert asked == [("some", "train")]
    assert [len(part.class_names) for part in parts] == [6, 2, 2]
    assert sorted(name for part in parts for name in part.class_names) == [*names]
    assert [len(part.images) for part in parts] == [18, 6, 6]


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_has_a_direction_and_an_answer_in_both_modes(name):
    given = dataclasses.replace(SMOKE, learner=name)
    config = dataclasses.replace(
        few_shot.with_learner(SMOKE, given), num_filters=4, train_ways=None, train_shots=None
    )
    images, labels = jnp.zeros((20, 28, 28, 1)), jnp.arange(20) % 5
    episode = Episode((images, labels), (images, labels))
    key = jax.random.key(0)
    learner = LEARNERS[name](config)
    params = jax.eval_shape(learner.init, key, images)
    batch = episode
    if learner.schedule is not None:
        batch = (episode, jax.eval_shape(learner.schedule, jnp.int32(0)))
    direction, metrics = jax.eval_shape(learner.grad_fn, params, batch, key)
    chex.assert_trees_all_equal_shapes(direction, params)
    assert metrics["loss"].shape == metrics["accuracy"].shape == ()
    steps = 1 if name in ("prototypical", "matching", "matching_fce") else config.test_steps + 1
    answers = jax.eval_shape(learner.predict, params, episode.support, images, key)
    assert {mode: x.shape for mode, x in answers.items()} == {
        "transductive": (steps, 20, 5),
        "inductive": (steps, 20, 5),
    }


@pytest.mark.slow
def test_the_experiment_gives_every_number_and_picture_and_the_same_when_resumed(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(few_shot, "load_splits", colour_splits)
    config = dataclasses.replace(
        few_shot.with_learner(SMOKE, dataclasses.replace(SMOKE, learner="maml_plus_plus")),
        test_queries=(1, 3),
        test_steps=3,
        num_queries=2,
        num_filters=4,
        validate_every=3,
        baselines=True,
        run_dir=tmp_path,
    )
    numbers = few_shot.main(config)
    for name in ("before_adaptation", "test", "fine_tuned", "nearest_neighbour"):
        for mode in ("", "_inductive"):
            for suffix in ("", "_3_queries"):
                assert 0 <= numbers[f"{name}_accuracy{mode}{suffix}"] <= 1
                assert numbers[f"{name}_interval{mode}{suffix}"] >= 0
    assert numbers["queries_per_class"] == 1
    assert numbers["queries_per_class_3_queries"] == 3
    assert numbers["fine_tuned_steps"] <= few_shot_report.FINE_TUNING_STEPS
    assert numbers["fine_tuned_rate"] in few_shot_report.FINE_TUNING_RATES
    last = len([name for name in numbers if re.fullmatch(r"after_\d+_steps_accuracy", name)])
    assert last > 0
    # Chance is 1 in 5; colours are told apart by their pixels, and by what is adapted to them.
    assert numbers["nearest_neighbour_accuracy"] > 0.5
    assert numbers["num_tasks"] == SMOKE.num_test_tasks
    for picture in ("learning_curve.png", "episode.png", "adaptation.png"):
        assert (tmp_path / picture).stat().st_size > 1000
    again = few_shot.main(dataclasses.replace(config, resume=True))
    assert {name: again[name] for name in again if "accuracy" in name} == {
        name: numbers[name] for name in numbers if "accuracy" in name
    }


@pytest.mark.slow
def test_a_checkpoint_is_tested_at_other_ways_and_nothing_is_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(few_shot, "load_splits", colour_splits)
    trained, elsewhere = tmp_path / "trained", tmp_path / "elsewhere"
    config = dataclasses.replace(
        SMOKE, learner="prototypical", test_queries=(3,), num_filters=4, run_dir=trained
    )
    elsewhere.mkdir()
    program.prepare_run_dir(config)
    numbers = few_shot.main(config)
    tested = dataclasses.replace(config, checkpoint=trained)
    again = few_shot.main(dataclasses.replace(tested, run_dir=elsewhere))
    assert again["test_accuracy"] == numbers["test_accuracy"]
    assert "train_seconds" not in again
    assert sorted(path.name for path in elsewhere.iterdir()) == ["adaptation.png", "episode.png"]
    easier = few_shot.main(dataclasses.replace(tested, num_ways=2, run_dir=elsewhere))
    assert easier["test_accuracy"] > numbers["test_accuracy"]


def test_a_checkpoint_of_another_net_or_of_other_class_lists_is_refused(tmp_path):
    trained = dataclasses.replace(few_shot.PRESETS["omniglot-5w1s"], run_dir=tmp_path / "trained")
    program.prepare_run_dir(trained)
    tested = dataclasses.replace(trained, checkpoint=trained.run_dir)
    few_shot_config.check_checkpoint(trained.run_dir, tested)
    others = {"strided": False, "norm": "group", "learner": "anil", "split": "lake", "num_ways": 20}
    for name, value in others.items():
        other = {name: value}
        with pytest.raises(UserError, match=f"with {name} .*, here it is {value}; give the {name}"):
            few_shot.main(dataclasses.replace(tested, **other))
    glyphs = dataclasses.replace(tested, dataset="glyphs", split="vinyals", rotations=1)
    few_shot_config.check_checkpoint(trained.run_dir, glyphs)
    with pytest.raises(UserError, match=r"can't read .*config\.json .* as --checkpoint"):
        few_shot.main(dataclasses.replace(tested, checkpoint=tmp_path))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--preset", "omniglot"), "invalid choice"),
        (("--data-dir", "/no/folder"), "data_dir /no/folder does not exist"),
        (("--dataset", "circles", "--data-dir", "."), "'circles' is not in data_dir ."),
        (("--num-ways", "5000"), "5000"),
        (("--checkpoint", "/no/run"), "can't read /no/run/config.json"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_status_2(tmp_path, capsys, flags, says):
    with pytest.raises(SystemExit) as leaving:
        program.run(
            "few_shot",
            few_shot.main,
            few_shot.PRESETS,
            default="smoke",
            vary=few_shot_config.with_learner,
            argv=["--run-dir", str(tmp_path / "run"), *flags],
        )
    printed = capsys.readouterr().err
    assert leaving.value.code == 2
    assert says in printed
    assert printed.count("\n") == 1


def test_a_learner_brings_its_settings_and_a_folder_of_its_own_and_flags_win_over_them():
    def parse(*argv):
        return program.parse(
            "few_shot", few_shot.PRESETS, default="glyphs", vary=few_shot.with_learner, argv=argv
        )

    reptile = parse("--preset", "omniglot-5w1s", "--learner", "reptile", "--inner-steps", "7")
    assert (reptile.inner_rate, reptile.inner_steps, reptile.outer_optimizer) == (1e-3, 7, "sgd")
    assert reptile.num_queries == few_shot.PRESETS["omniglot-5w1s"].num_queries
    assert str(reptile.run_dir) == "runs/few_shot-omniglot-5w1s-reptile"
    assert not reptile.baselines
    assert parse("--checkpoint", "x").run_dir.name == "few_shot-glyphs-tested"
    assert parse("--preset", "smoke", "--learner", "maml").baselines


def test_other_ways_in_training_are_refused_where_a_head_has_a_fixed_number():
    with pytest.raises(UserError, match="train_ways is 20; maml has a head for 5 classes"):
        few_shot.check(dataclasses.replace(SMOKE, train_ways=20))
    few_shot.check(dataclasses.replace(SMOKE, train_ways=20, learner="prototypical"))


@pytest.mark.parametrize("labels", ["umtra", pytest.param("cactus", marks=pytest.mark.slow)])
def test_training_without_labels_draws_episodes_of_the_shape_asked(tmp_path, labels):
    config = dataclasses.replace(
        SMOKE, labels=labels, num_queries=2, image_size=8, run_dir=tmp_path, pretraining_steps=3
    )
    images = few_shot.to_class_data(config, colour_splits(None).train, "training")
    data, sample = few_shot.training_episodes(config, images)
    episode = sample(jax.random.key(0), data)
    assert episode.support[0].shape == (5, 8, 8, 3)
    assert episode.query[0].shape == (10, 8, 8, 3)
    np.testing.assert_array_equal(episode.query[1], np.repeat(np.arange(5), 2))
    again = sample(jax.random.key(1), data)
    assert not np.array_equal(episode.support[0], again.support[0])


def test_labels_bring_a_folder_of_their_own_and_umtra_knows_one_shot():
    def parse(*argv):
        return program.parse(
            "few_shot", few_shot.PRESETS, default="glyphs", vary=few_shot.with_learner, argv=argv
        )

    config = parse("--preset", "omniglot-5w1s", "--learner", "prototypical", "--labels", "cactus")
    assert str(config.run_dir) == "runs/few_shot-omniglot-5w1s-prototypical-cactus"
    assert parse("--features-from", "x").run_dir.name == "few_shot-glyphs-featured"
    assert config.train_ways == 20
    assert not config.baselines
    with pytest.raises(UserError, match="umtra knows one picture of each class"):
        few_shot.check(dataclasses.replace(SMOKE, labels="umtra", num_shots=5))


@pytest.mark.parametrize("dataset", ["cifar_fs", "mini_imagenet"])
def test_presets_of_the_colour_sets_load_their_class_lists(monkeypatch, dataset):
    asked = []

    def load(split, **options):
        asked.append((split, options.get("size")))
        return split

    monkeypatch.setattr(few_shot_data, f"load_{dataset}", load)
    preset = few_shot.PRESETS[f"{dataset.replace('_', '-')}-5w5s"]
    assert few_shot.load_splits(preset) == ClassSplit("train", "val", "test")
    size = {"cifar_fs": None, "mini_imagenet": 84}[dataset]
    assert asked == [(part, size) for part in ClassSplit._fields]
