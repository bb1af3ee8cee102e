"""The episodes of few-shot generation, and on which side of a split each drawing is."""

import hashlib
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import few_shot_generation_data
from experiments.few_shot_generation_config import Config
from experiments.few_shot_generation_data import check_sizes, to_class_data
from experiments.few_shot_generation_presets import PRESETS, with_model
from metagen_jax.data.classes import LabelledImages, frozen_classes
from metagen_jax.data.episodes import group_by_class
from metagen_jax.data.sources import load_images
from metagen_jax.errors import UserError

KEY = jax.random.key(0)


def splits(each):
    """Three classes in each part, of so many 2x2 pictures."""
    labels = np.repeat(np.arange(3, dtype=np.int32), each)
    images = LabelledImages(np.zeros((len(labels), 2, 2, 1), np.uint8), labels, tuple("abc"))
    return few_shot_generation_data.Splits(*3 * (to_class_data(PRESETS["smoke"], images),))


@pytest.mark.parametrize(
    ("each", "settings", "message"),
    [
        (9, {}, "the training classes, by train_shots and num_queries: 5 shots and 5 queries need"),
        (7, {"replacement": "test", "train_shots": 1}, "the validation classes: 4 shots and 4"),
        (
            20,
            {"shots": (0, 16), "test_queries": 5},
            "validation classes, by shots and test_queries: 16 shots and 5 queries need 21 "
            "examples .* has 20; ask for fewer",
        ),
    ],
)
def test_classes_that_are_too_small_are_named_with_the_settings_that_ask(each, settings, message):
    config = replace(PRESETS["smoke"], **settings)
    with pytest.raises(UserError, match=message):
        check_sizes(config, splits(each))


@pytest.mark.parametrize("model", ["vae", "pixelcnn"])
def test_sixteen_shots_and_the_queries_of_a_preset_are_a_class_of_twenty(model):
    config = with_model(PRESETS["omniglot-lake"], Config(model=model))
    config = replace(config, shots=(0, 16))
    data = splits(20)
    check_sizes(config, data)
    # Each example is its own number.
    numbered = data.test._replace(examples=jnp.arange(60)[:, None])
    episode = jax.jit(few_shot_generation_data.test_episodes(config))(KEY, numbered)
    assert (len(episode.support), len(episode.query)) == (16, config.test_queries)
    both = np.concatenate(episode)
    assert len(np.unique(both)) == 16 + config.test_queries
    assert len(np.unique(both // 20)) == 1


def test_sets_of_an_alphabet_are_of_any_of_its_characters(monkeypatch):
    """Each example is its own number: 20 of each of 2 characters of 3 alphabets."""
    names = tuple(f"{alphabet}_{i}" for alphabet in ("N_Ko", "Tifinagh", "Avesta") for i in (0, 1))
    numbers = np.arange(120, dtype=np.uint8)[:, None, None, None]
    images = LabelledImages(numbers, np.repeat(np.arange(6, dtype=np.int32), 20), names)
    monkeypatch.setattr(few_shot_generation_data, "load_images", lambda *_, **__: images)
    lake = replace(PRESETS["omniglot-lake"], sets_of="alphabets", num_test_classes=2)
    data = few_shot_generation_data.load_splits(lake)
    assert [part.sizes.tolist() for part in data] == [[40] * 3, [40] * 3, [40] * 2]
    # Grouped as these are, alphabets stand in the order of their names.
    alphabets = few_shot_generation_data.by_alphabet(images)
    assert alphabets.class_names == ("Avesta", "N_Ko", "Tifinagh")
    numbered = group_by_class(np.arange(120)[:, None], alphabets.labels)
    sample = jax.jit(few_shot_generation_data.test_episodes(lake))
    characters = set()
    for key in jax.random.split(KEY, 5):
        drawn = np.concatenate(sample(key, numbered))
        assert len(np.unique(drawn // 40)) == 1
        assert len(np.unique(drawn)) == len(drawn)
        characters.add(len(np.unique(drawn // 20)))
    assert 2 in characters


@pytest.mark.slow
def test_no_drawing_of_omniglot_is_on_two_sides_of_a_split(data_dir, tmp_path):
    """Drawings as they are stored, so that no two become one when they are made smaller."""
    images = load_images("omniglot", "train+test", data_dir=data_dir, cache_dir=tmp_path)
    digests = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in images.images])
    names = np.array(images.class_names)[images.labels]
    for preset in ("omniglot-lake", "omniglot-characters", "omniglot-alphabets"):
        scheme = PRESETS[preset].split
        parts = []
        for part in few_shot_generation_data.PARTS:
            of_part = np.isin(names, frozen_classes("omniglot", f"{scheme}/{part}"))
            assert of_part.sum() == 20 * len(frozen_classes("omniglot", f"{scheme}/{part}"))
            parts.append(set(digests[of_part]))
        for first, second in itertools.combinations(parts, 2):
            assert not first & second


def test_whatever_is_drawn_anew_needs_no_size():
    config = replace(PRESETS["smoke"], shots=(0, 16), test_queries=5)
    check_sizes(replace(config, replacement="test"), splits(20))
    check_sizes(replace(config, replacement="always"), splits(2))
