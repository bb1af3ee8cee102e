"""The comparison of optimisers: its tasks, its curves, and the whole experiment on little."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import learned_optimizer as experiment
from experiments.learned_optimizer_tasks import (
    NUM_CLASSES,
    NUM_EXAMPLES,
    Family,
    draw_batch,
    loss_curves,
    sample_task,
    task_data,
)
from metagen_jax.data.classes import ClassSplit
from metagen_jax.data.sources import load_images
from metagen_jax.errors import UserError

KEY = jax.random.key(0)
TEACHER = Family("teacher", (4,))


def test_a_family_draws_another_task_for_each_key():
    params, task = sample_task(TEACHER, None, KEY)
    inputs, labels = task.support
    assert inputs.shape == (NUM_EXAMPLES, 16)
    assert set(np.unique(labels)) <= set(range(NUM_CLASSES))
    other, another = sample_task(TEACHER, None, jax.random.key(1))
    assert not np.array_equal(inputs, another.support[0])
    assert jax.tree.structure(params) == jax.tree.structure(other)


@pytest.mark.slow
def test_letters_come_from_the_part_asked_and_are_ink_between_0_and_1():
    glyphs = ClassSplit(*(load_images("glyphs", part) for part in ClassSplit._fields))
    family = Family("val", (4,), side=14)
    _, task = sample_task(family, task_data(glyphs, family), KEY)
    inputs, labels = task.support
    assert inputs.shape == (NUM_EXAMPLES, 14 * 14)
    assert 0 <= inputs.min() < inputs.max() <= 1
    np.testing.assert_array_equal(np.bincount(labels), NUM_EXAMPLES // NUM_CLASSES)


@pytest.mark.slow
def test_a_curve_is_that_of_a_plain_loop():
    (curve,) = loss_curves(
        jnp.float32(0.1),
        None,
        KEY,
        family=TEACHER,
        rule=optax.sgd,
        batch_size=40,
        num_tasks=1,
        num_steps=3,
    )
    task_key, adapt_key = jax.random.split(jax.random.fold_in(KEY, 0))
    params, task = sample_task(TEACHER, None, task_key)
    for step in range(4):
        loss, _ = TEACHER.loss_fn(params, task.query, KEY)
        np.testing.assert_allclose(curve[step], loss, rtol=1e-5)
        batch_key, _ = jax.random.split(jax.random.fold_in(adapt_key, step))
        batch = draw_batch(task.support, batch_key, 40)
        grads = jax.grad(lambda p, b=batch: TEACHER.loss_fn(p, b, KEY)[0])(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"unroll_steps": 0}, "unroll_steps is 0; give 1 or more"),
        ({"unroll_steps": 30}, "horizon is 100; give a multiple of unroll_steps 30"),
        ({"test_steps": 501}, "test_steps is 501; give at most 500"),
        ({"batch_size": 201}, "batch_size is 201; give 1 to 200"),
        ({"hidden_sizes": (32, 0)}, "hidden_sizes is (32, 0)"),
        ({"num_test_tasks": 1}, "num_test_tasks is 1; give 2 or more"),
        ({"outer_rate": float("nan")}, "outer_rate is nan; give more than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, says):
    with pytest.raises(UserError) as raised:
        experiment.main(dataclasses.replace(experiment.PRESETS["default"], **settings))
    assert says in str(raised.value)


@pytest.mark.parametrize("preset", experiment.PRESETS)
def test_presets_are_settings_that_make_sense(preset):
    experiment.check(experiment.PRESETS[preset])


@pytest.mark.slow
def test_the_experiment_compares_and_gives_the_same_when_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "TEST", experiment.TEST[:1])
    # The state that persistent evolution strategies carry holds that of truncated unrolls.
    config = dataclasses.replace(experiment.PRESETS["smoke"], estimator="pes", run_dir=tmp_path)
    numbers = experiment.main(config)
    losses = [value for name, value in numbers.items() if ", loss after" in name]
    assert len(losses) == 3 * 2 * (len(experiment.TEST) + 1)
    assert np.isfinite(losses).all()
    assert (tmp_path / "learned_optimizer.png").stat().st_size > 1000
    again = experiment.main(dataclasses.replace(config, resume=True))
    assert {name: again[name] for name in numbers if "loss" in name} == {
        name: numbers[name] for name in numbers if "loss" in name
    }
