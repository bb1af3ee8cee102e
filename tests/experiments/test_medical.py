"""The medical experiment: its metrics, which net it takes from a run, and end to end on little."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import few_shot_config, few_shot_learners, medical, medical_report, program
from metagen_jax.errors import UserError
from metagen_jax.evaluation.few_shot import both_modes
from metagen_jax.nets.conv4 import Conv4
from metagen_jax.runs.checkpoints import BEST, save_checkpoint, to_host
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.types import MetaParams

KEY = jax.random.key(0)
TINY = dataclasses.replace(
    medical.PRESETS["smoke"],
    num_queries=4,
    num_validation_tasks=3,
    num_test_tasks=6,
    num_devices=1,
)


def write_run(folder, learner, **settings):
    """What a run of `experiments.few_shot` leaves of its best net."""
    config = few_shot_config.Config(learner=learner, num_filters=4, image_size=16, **settings)
    brought = few_shot_learners.LEARNERS[learner](config)
    params = brought.init(jax.random.key(7), jnp.zeros((1, 16, 16, 1)))
    save_checkpoint(folder / BEST / "5", to_host(params), {})
    stored = dataclasses.asdict(config) | {"a_later_setting": 1}
    (folder / program.CONFIG).write_text(json.dumps(stored, default=str))
    return params


@pytest.mark.slow
def test_the_metrics_of_a_task_are_those_of_its_margins_and_nan_is_wrong():
    """Four queries, of which one normal one is ranked above one of two ill ones."""
    labels = jnp.array([1, 1, 0, 0])
    margins = jnp.array([2.0, -0.5, 0.5, -3.0])
    logits = jnp.stack([jnp.ones(4), 1 + margins], -1)
    result = medical.score(logits, labels)
    assert result["balanced_accuracy"] == 0.5
    assert result["auc"] == 0.75
    steps = jnp.stack([logits, logits * jnp.nan, -logits])
    result = medical.score(steps, labels)
    np.testing.assert_allclose(result["balanced_accuracy"], [0.5, 0, 0.5])
    np.testing.assert_allclose(result["auc"], [0.75, 0, 0.25])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"shots": ()}, "shots is (); give one or more"),
        ({"shots": (1, 0)}, "shots is (1, 0)"),
        ({"num_queries": 0}, "num_queries is 0; give 1 or more"),
        ({"num_steps": 0}, "num_steps is 0; give 1 or more"),
        ({"num_test_tasks": 1}, "need 2 or more for an interval"),
        ({"dataset": "pneumonia_mnist"}, "checkpoint is not set; give the folder of a run"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, says):
    with pytest.raises(UserError) as raised:
        medical.check(dataclasses.replace(TINY, **settings))
    assert says in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["maml", "meta_sgd", "prototypical", "matching"])
def test_the_net_of_a_run_is_taken_without_its_head(learner, tmp_path):
    params = write_run(tmp_path, learner)
    net, body, size = medical.load_pretrained(dataclasses.replace(TINY, checkpoint=tmp_path))
    trained = params.init if isinstance(params, MetaParams) else params
    trained = trained.get("embed", trained)["params"]
    assert size == 16
    assert set(body["params"]) == {f"{part}{i}" for part in ("conv", "norm") for i in range(4)}
    jax.tree.map(
        np.testing.assert_array_equal,
        body["params"],
        {name: trained[name] for name in body["params"]},
    )
    assert net.apply(body, jnp.zeros((2, 16, 16, 1))).shape == (2, 4)


@pytest.mark.slow
def test_a_net_of_another_kind_and_a_folder_without_a_run_are_refused(tmp_path):
    write_run(tmp_path, "cavia")
    with pytest.raises(UserError, match="not the plain four-block one"):
        medical.load_pretrained(dataclasses.replace(TINY, checkpoint=tmp_path))
    with pytest.raises(UserError, match=r"can't read .*config\.json .* as --checkpoint"):
        medical.load_pretrained(dataclasses.replace(TINY, checkpoint=tmp_path / "none"))


@pytest.mark.slow
def test_from_scratch_starts_from_another_random_net_for_each_key_and_descends():
    net = Conv4(2, num_filters=4)
    images = jax.random.uniform(KEY, (4, 16, 16, 1))
    support = (images, jnp.array([0, 1, 0, 1]))
    predict = jax.jit(medical.scratch_predict(net, num_steps=1))
    start = MetaParams((), jnp.float32(0.5))
    answers = predict(start, support, images, KEY)
    params = net.init(jax.random.split(KEY)[0], images)
    grads = jax.grad(lambda p: cross_entropy_loss(net.apply)(p, support, KEY)[0])(params)
    moved = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    for step, expected in enumerate([params, moved]):
        for mode, logits in both_modes(net.apply)(expected, support, images).items():
            np.testing.assert_allclose(answers[mode][step], logits, rtol=1e-3, atol=1e-4)
    other = predict(start, support, images, jax.random.key(1))
    assert not np.allclose(other["inductive"][0], answers["inductive"][0], atol=1e-2)


def test_synthetic_classes_differ_in_where_they_are_bright():
    data = medical.draw_synthetic(20, seed=0, num_each=10)
    assert data.images.shape == (20, 20, 20, 1)
    upper, lower = (data.images[data.labels == k, ..., 0].mean((0, 2)) for k in (0, 1))
    assert upper[:10].mean() > lower[:10].mean()
    assert upper[10:].mean() < lower[10:].mean()


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    config = dataclasses.replace(TINY, run_dir=tmp_path_factory.mktemp("run"))
    return config, medical.main(config)


@pytest.mark.slow
def test_the_experiment_gives_both_metrics_of_each_method_with_intervals(result):
    _, numbers = result
    methods = ["nearest_neighbour"] + [
        f"{method}_{mode}"
        for method in ("prototypes", "fine_tuned", "from_scratch")
        for mode in ("transductive", "inductive")
    ]
    for name in methods:
        for metric in medical_report.METRICS:
            assert 0 <= numbers[f"{name}_{metric}_2_shot"] <= 1
            assert numbers[f"{name}_{metric}_interval_2_shot"] >= 0
    assert numbers["fine_tuned_inductive_rate_2_shot"] in TINY.rates
    assert 0 <= numbers["from_scratch_transductive_steps_2_shot"] <= TINY.num_steps
    # The spot is in the same half in a class, with noise that is weak beside it.
    assert numbers["nearest_neighbour_auc_2_shot"] > 0.6
    json.dumps(numbers)


@pytest.mark.slow
def test_the_experiment_draws_its_figure(result):
    config, _ = result
    assert (config.run_dir / "medical.png").stat().st_size > 10_000
