"""Which runs the training of few-shot generation may begin with."""

from dataclasses import replace

import numpy as np
import pytest

from experiments import few_shot_generation, program
from experiments.few_shot_generation_data import to_class_data
from experiments.few_shot_generation_learners import make_learner
from experiments.few_shot_generation_presets import PRESETS
from experiments.few_shot_generation_start import check_resumed, check_start, first_params
from metagen_jax.data.classes import LabelledImages
from metagen_jax.errors import UserError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "random1000"}, "of a run with split random1000, here it is lake; give"),
        ({"dataset": "glyphs"}, "of a run with dataset glyphs, here it is omniglot; give"),
        ({"resampling": "lanczos"}, "with resampling lanczos, here it is corner"),
        ({"image_size": 26}, "with image_size 26, here it is 28"),
        ({"values": "bernoulli"}, "with values bernoulli, here it is stored"),
        ({"model": "conv_vae"}, "with model conv_vae, here it is vae"),
        ({"learner": "reptile"}, "of a run by reptile, whose parameters have those of its rule"),
    ],
)
def test_training_begins_with_runs_of_the_same_model_and_images_alone(tmp_path, changes, message):
    before = replace(PRESETS["omniglot-lake"], learner="pretrained", run_dir=tmp_path / "before")
    config = replace(PRESETS["omniglot-lake"], init_from=before.run_dir)
    with pytest.raises(UserError, match=r"can't read .*give the run_dir of a run for --init-from"):
        check_start(config)
    program.prepare_run_dir(before)
    check_start(config)
    changed = replace(before, run_dir=tmp_path / "changed", **changes)
    program.prepare_run_dir(changed)
    with pytest.raises(UserError, match=message):
        few_shot_generation.main(replace(config, init_from=changed.run_dir))


@pytest.mark.parametrize("values", ["stored", "bernoulli"])
def test_first_scales_are_those_of_images_whose_ink_is_more_than_half_grey(values):
    grey = np.array([0, 60, 127, 128, 255], np.uint8)[None, None, :, None]
    images = LabelledImages(255 - grey, np.zeros(1, np.int32), ("a",))
    config = replace(PRESETS["smoke"], values=values)
    seen = make_learner(config, (28, 28, 1))._replace(init=lambda key, images: images)
    found = first_params(config, seen, to_class_data(config, images))
    np.testing.assert_array_equal(found[0, 0, :, 0], [0, 0, 0, 1, 1])


@pytest.mark.parametrize(
    ("trained", "now", "again"),
    [
        ({}, {"replacement": "test", "shots": (0, 16), "test_queries": 4, "use_tasks": 9}, True),
        ({"replacement": "test"}, {"replacement": "never", "num_test_classes": 50}, True),
        ({"replacement": "always"}, {"replacement": "always", "test_samples": 10}, True),
        ({}, {"replacement": "always"}, False),
        ({"replacement": "always"}, {"replacement": "test"}, False),
    ],
)
def test_settings_of_the_test_alone_may_change_of_a_trained_model(tmp_path, trained, now, again):
    before = replace(PRESETS["smoke"], run_dir=tmp_path / "run", **trained)
    program.prepare_run_dir(before)
    config = replace(before, resume=True, **now)
    program.prepare_run_dir(config)
    if again:
        check_resumed(config)
        return
    with pytest.raises(UserError, match=r"holds a run trained with --replacement .* here it is"):
        few_shot_generation.main(config)


def test_settings_of_training_may_not_change(tmp_path):
    before = replace(PRESETS["smoke"], run_dir=tmp_path / "run")
    program.prepare_run_dir(before)
    with pytest.raises(UserError, match="holds a run with --inner-steps 3 where this one has"):
        program.prepare_run_dir(replace(before, resume=True, inner_steps=4))
