"""The episodes of few-shot generation, and on which side of a split each drawing is."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import few_shot_generation_data
from experiments.few_shot_generation_config import Config
from experiments.few_shot_generation_data import check_sizes, to_class_data
from experiments.few_shot_generation_presets import PRESETS, with_model
from metagen_jax.data.classes import LabelledImages
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


def test_whatever_is_drawn_anew_needs_no_size():
    config = replace(PRESETS["smoke"], shots=(0, 16), test_queries=5)
    check_sizes(replace(config, replacement="test"), splits(20))
    check_sizes(replace(config, replacement="always"), splits(2))
