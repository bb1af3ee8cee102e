"""What the learners of the experiment on few-shot generation do, against each other and by hand."""

import json
from dataclasses import asdict, replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import few_shot_generation, few_shot_generation_data, program
from experiments.few_shot_generation_compare import load_other, save_figures
from experiments.few_shot_generation_config import LEARNED_RULES, Config
from experiments.few_shot_generation_learners import Learner, make_learner
from experiments.few_shot_generation_models import adaptive, density_model
from experiments.few_shot_generation_presets import PRESETS, with_model
from experiments.few_shot_generation_report import as_published
from experiments.few_shot_generation_start import Averaged, first_params
from metagen_jax.data.classes import LabelledImages
from metagen_jax.errors import UserError
from metagen_jax.evaluation.estimates import estimate
from metagen_jax.training import load_params
from metagen_jax.types import Episode

KEY = jax.random.key(0)
SHAPE = (4, 4, 1)
SMALL = {
    "num_latents": 2,
    "hidden_sizes": (3,),
    "num_filters": 8,
    "train_shots": 2,
    "num_queries": 2,
    "image_size": 4,
}


def config_of(learner, model, **settings):
    chosen = with_model(PRESETS["smoke"], Config(learner=learner, model=model))
    layers = {"num_layers": 5 if model == "attention_pixelcnn" else 1}
    return replace(chosen, **SMALL | layers | settings)


def pictures(num_classes=4, each=16):
    """Noise of two values."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(num_classes, dtype=np.int32), each)
    images = 255 * rng.integers(0, 2, (len(labels), *SHAPE), dtype=np.uint8)
    return LabelledImages(images, labels, tuple("abcdefgh"[:num_classes]))


@pytest.fixture
def small_data(monkeypatch):
    def load_images(*arguments, **options):
        del arguments, options
        return pictures()

    monkeypatch.setattr(few_shot_generation_data, "load_images", load_images)


def images(count, seed=0):
    return jax.random.bernoulli(jax.random.key(seed), 0.5, (count, *SHAPE)).astype(jnp.int32)


@pytest.mark.slow
def test_learned_rates_begin_as_the_inner_rate_and_both_fine_tunings_are_their_optimisers():
    rate = 0.03
    by_name, params = {}, None
    for learner, options in (
        ("meta_sgd", {}),
        ("learned_rates", {}),
        ("meta_curvature", {}),
        ("pretrained", {"tuned_rates": (0.001, rate)}),
        ("maml", {}),
        ("maml", {"inner_optimizer": "adam"}),
    ):
        settings = {"inner_rate": rate, "rate_factors": (1.0,), **options}
        made = make_learner(config_of(learner, "vae", **settings), SHAPE)
        start = jax.jit(made.init)(KEY, images(3))
        if learner in ("meta_sgd", "learned_rates"):
            chex.assert_trees_all_equal(start.rule, jax.tree.map(jnp.ones_like, start.rule))
        log_probs = jax.jit(made.log_probs(3, "choice"))
        for name, tested in made.candidates(start).items():
            # The same start for all, moved from where a VAE's gradients are zero.
            params = jax.tree.map(lambda x: x + 0.1, tested.init) if params is None else params
            found = log_probs(tested._replace(init=params), images(2), images(2, seed=1), KEY)
            by_name[learner, name, *options.values()] = found
    assert len(by_name) == 9
    sgd, adam = by_name["maml", "0.03"], by_name["maml", "0.03", "adam"]
    assert np.abs(sgd[1:] - sgd[:-1]).min() > 1e-3
    assert np.abs(sgd[1:] - adam[1:]).min() > 1e-3
    tuned = {name: found for (learner, name, *_), found in by_name.items() if learner != "maml"}
    np.testing.assert_allclose(tuned["sgd 0.03"], sgd, rtol=1e-5)
    for learner in LEARNED_RULES:
        np.testing.assert_allclose(by_name[learner, "learned"], sgd, rtol=1e-5)
    np.testing.assert_allclose(tuned["adam 0.03"], adam, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["maml", "meta_sgd", "reptile"])
def test_a_factor_of_the_rate_scales_every_step(learner):
    config = config_of(learner, "pixelcnn", inner_rate=0.02, rate_factors=(1.0, 3.0))
    made = make_learner(config, SHAPE)
    start = jax.jit(made.init)(KEY, images(3))
    one, three = made.candidates(start).values()
    thrice = make_learner(replace(config, inner_rate=0.06, rate_factors=(1.0,)), SHAPE)
    [same] = thrice.candidates(start).values()

    def by_step(learner, tested):
        return jax.jit(learner.log_probs(3, "choice"))(tested, images(2), images(2, seed=1), KEY)

    found = by_step(made, three)
    np.testing.assert_allclose(found, by_step(thrice, same), rtol=1e-5)
    assert np.abs(found[1:] - by_step(made, one)[1:]).min() > 1e-3


@pytest.mark.slow
def test_first_order_maml_takes_the_gradient_where_its_steps_lead():
    config = config_of("fomaml", "pixelcnn", inner_rate=0.05, inner_steps=2)
    made, model = make_learner(config, SHAPE), adaptive(config, SHAPE)
    params = jax.jit(made.init)(KEY, images(2))
    support, query = images(3), images(2, seed=1)
    gradient = jax.jit(jax.grad(lambda params, batch: model.loss_fn(params, batch, KEY)[0]))
    adapted = params
    for _ in range(2):
        moved = gradient(adapted, support)
        adapted = jax.tree.map(lambda x, g: x - 0.05 * g, adapted, moved)
    direction, _ = jax.jit(made.grad_fn)(params, Episode(support, query), KEY)
    chex.assert_trees_all_close(direction, gradient(adapted, query), rtol=1e-4, atol=1e-5)
    maml = make_learner(replace(config, learner="maml"), SHAPE)
    second, _ = jax.jit(maml.grad_fn)(params, Episode(support, query), KEY)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(direction, second, rtol=1e-2, atol=1e-3)


def test_the_average_follows_the_parameters_and_the_rate_warms_up(tmp_path):
    config = config_of(
        "maml",
        "vae",
        steps=40,
        warmup_steps=4,
        average_decay=0.6,
        outer_optimizer="sgd",
        outer_rate=1.0,
        num_devices=1,
        run_dir=tmp_path,
    )
    ones = Learner(
        init=lambda key, images: jnp.zeros(()),
        grad_fn=lambda params, task, key: (jnp.ones_like(params), {"loss": params}),
        sample=lambda key, data: jnp.zeros(1),
        candidates=lambda params: {"none": params},
        log_probs=None,
        draw=None,
        kind="",
    )
    data = few_shot_generation_data.Splits(jnp.zeros(1), None, None)
    result = few_shot_generation.train(config, ones, jnp.zeros(()), data)
    current = average = 0.0
    for step in range(40):
        falling = 0.5 * (1 + np.cos(np.pi * (step - 4) / 36))
        current -= step / 4 if step < 4 else falling
        average += 0.4 * (current - average)
    np.testing.assert_allclose(result.best_params, average, rtol=1e-5)


def test_a_gan_sees_pixels_as_it_makes_them():
    config = config_of("reptile", "gan", image_size=8)
    model = density_model(config, (8, 8, 1))
    params = jax.jit(model.init)(KEY, jnp.zeros((1, 8, 8, 1), jnp.int32))
    drawn = jax.jit(model.sample)(params, KEY)
    # The tanh of a fresh generator is about 0, which is grey.
    assert 0.25 < drawn.mean() < 0.75


@pytest.mark.slow
def test_figr_takes_the_inner_rate_for_both_players():
    rate = 0.01
    config = config_of("reptile", "gan", image_size=8, inner_rate=rate, inner_steps=1)
    made = make_learner(config, (8, 8, 1))
    params = jax.jit(made.init)(KEY, jnp.zeros((1, 8, 8, 1), jnp.int32))
    batch = jax.random.bernoulli(KEY, 0.5, (3, 8, 8, 1)).astype(jnp.int32)
    direction, _ = jax.jit(made.grad_fn)(params, Episode(batch, batch), KEY)
    # Adam's first step is of the rate wherever there is a gradient.
    for player in (direction.generator, direction.discriminator):
        largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(player))
        assert largest == pytest.approx(rate, rel=1e-3)


@pytest.mark.slow
def test_flow_matching_adapts_by_the_error_of_all_elements():
    model = adaptive(config_of("maml", "flow_matching", image_size=8), (8, 8, 1))
    batch = jnp.ones((64, 8, 8, 1), jnp.int32)
    params = jax.jit(model.init)(KEY, batch)
    loss, _ = jax.jit(model.loss_fn)(params, batch, KEY)
    # Ink is uniform from 0 to 1 and noise normal: of a velocity of zero (1/3 + 1) an element.
    assert 0.5 * 64 * 4 / 3 < loss < 2 * 64 * 4 / 3


def test_only_runs_of_the_same_episodes_are_compared(tmp_path):
    config = replace(PRESETS["smoke"], against=tmp_path / "other")
    before = replace(config, learner="reptile", seed=3, run_dir=tmp_path / "other")
    program.prepare_run_dir(before)
    nll = np.array([3.0, 5.0, 4.0])
    save_figures(before, {0: estimate(nll)})
    other = load_other(config)
    assert other.name == "vae by reptile"
    np.testing.assert_array_equal(other.figures[0].per_task, [3.0, 5.0, 4.0])
    same = load_other(replace(config, learner="reptile", shots=(0, 1)))
    assert same.name == "vae by reptile (other)"
    for settings, named in (
        ({"num_test_tasks": 7}, "num_test_tasks 6 for 7"),
        ({"shots": (0, 1, 4)}, "most shots 1 for 4"),
        ({"replacement": "always"}, "replacement at test False for True"),
        ({"test_queries": 2}, "test_queries 1 for 2"),
        ({"sets_of": "alphabets"}, "sets_of characters for alphabets"),
    ):
        with pytest.raises(UserError, match=f"other episodes than this one.*{named}"):
            load_other(replace(config, **settings))
    assert load_other(replace(config, against=None)) is None
    # Tested again, by episodes of which its first settings know nothing.
    save_figures(replace(before, replacement="test"), {0: estimate(nll)})
    with pytest.raises(UserError, match="replacement at test True for False"):
        load_other(config)
    load_other(replace(config, replacement="test"))
    (tmp_path / "other" / "nll_by_shots.npz").unlink()
    with pytest.raises(UserError, match=r"can't read .*give the run_dir of a finished run"):
        load_other(config)
    with pytest.raises(UserError, match=r"can't read .*config\.json"):
        load_other(replace(config, against=tmp_path))


@pytest.mark.parametrize(
    ("preset", "settings", "theirs"),
    [
        ("omniglot-lake", {"replacement": "test"}, True),
        ("omniglot-lake", {"replacement": "always"}, True),
        ("omniglot-lake", {}, False),
        ("omniglot-lake", {"replacement": "test", "num_test_classes": 100}, False),
        ("omniglot-lake", {"replacement": "test", "values": "bernoulli"}, False),
        ("omniglot-lake", {"replacement": "test", "sets_of": "alphabets"}, False),
        ("omniglot-characters", {"replacement": "test"}, False),
        ("glyphs", {"replacement": "test"}, False),
    ],
)
def test_published_figures_stand_beside_those_of_their_protocol_alone(preset, settings, theirs):
    assert as_published(replace(PRESETS[preset], **settings)) == theirs


@pytest.mark.usefixtures("small_data")
def test_episodes_of_the_classifier_are_checked_before_training():
    config = config_of("maml", "vae", use_tasks=2, use_ways=5, use_shots=1)
    with pytest.raises(UserError, match="the test classes, for use_tasks: 5-way episodes need 5"):
        few_shot_generation_data.load_splits(config)


@pytest.mark.slow
@pytest.mark.usefixtures("small_data")
@pytest.mark.parametrize(
    ("learner", "model", "settings"),
    [
        ("scratch", "vae", {"replacement": "always"}),
        ("fomaml", "vae", {"shots": (0,)}),
        ("amortised", "attention_pixelcnn", {"replacement": "test"}),
    ],
)
def test_every_kind_of_learner_runs_from_beginning_to_end(tmp_path, learner, model, settings):
    config = config_of(learner, model, run_dir=tmp_path, **settings)
    numbers = few_shot_generation.main(config)
    json.dumps(numbers)
    assert list(numbers["nll_by_shots"]) == [str(n) for n in config.shots]
    for row in numbers["nll_by_shots"].values():
        assert 0 < row["nats"] < 16 * np.log(2) + 40
    assert ("best_step" in numbers) == (learner != "scratch")
    assert numbers["replacement"] == settings.get("replacement", "never")


@pytest.mark.slow
@pytest.mark.usefixtures("small_data")
def test_training_goes_on_from_another_run_and_is_compared_with_it(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    before = config_of("pretrained", "vae", run_dir=first, average_decay=0.9)
    numbers = few_shot_generation.main(before)
    assert numbers["nll_by_shots"]["1"]["rate"].split()[0] in ("adam", "sgd")
    config_file = json.dumps(asdict(before), default=str)
    (first / "config.json").write_text(config_file, encoding="utf-8")
    config = config_of("meta_sgd", "vae", run_dir=second, init_from=first, against=first)
    splits = few_shot_generation_data.load_splits(config)
    made = make_learner(config, SHAPE)
    start = first_params(config, made, splits.train)
    kept = load_params(first, Averaged(start.init, start.init))
    chex.assert_trees_all_equal(start.init, kept.average)
    found = few_shot_generation.main(config)
    assert found["against"] == "vae by pretrained"
    for shots in ("0", "1"):
        row = found["nll_by_shots"][shots]
        with np.load(first / "nll_by_shots.npz") as a, np.load(second / "nll_by_shots.npz") as b:
            difference = a[shots] - b[shots]
        assert row["less_than_other"] == pytest.approx(difference.mean())
        spread = 1.96 * difference.std(ddof=1) / np.sqrt(len(difference))
        assert row["less_than_other_interval"] == pytest.approx(spread)
