"""The experiment on sequences: excerpts, methods, judging, speakers held out, a whole run."""

from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import time_series
from experiments.time_series_config import PRESETS, Config, MethodName, check
from experiments.time_series_data import (
    Dataset,
    Part,
    Sequences,
    choose,
    draw_excerpts,
    load,
    padded,
    split,
)
from experiments.time_series_methods import (
    METHODS,
    check_length,
    features,
    first_step,
    make_net,
    supervised,
)
from experiments.time_series_report import RAW, judge, summarise
from metagen_jax.errors import DataError, UserError
from metagen_jax.evaluation.estimates import estimate
from metagen_jax.parallel import data_parallel

KEY = jax.random.key(0)
SMOKE = PRESETS["smoke"]


def sequences_of(*lengths):
    """Numbers of which no two are alike, from 1 on."""
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    return Sequences(1 + np.arange(starts[-1], dtype=np.float32)[:, None], starts)


def test_excerpts_are_pieces_of_their_own_sequences_from_all_places():
    data = sequences_of(7, 3, 5), jnp.arange(3)
    (values, lengths), labels = jax.jit(lambda key: draw_excerpts(key, data, count=600, length=5))(
        KEY
    )
    seen = set()
    for piece, length, label in zip(np.asarray(values)[..., 0], lengths, labels, strict=True):
        of = split(data[0])[int(label)][:, 0]
        assert length == min(len(of), 5)
        begin = int(piece[0] - of[0])
        np.testing.assert_array_equal(piece[:length], of[begin : begin + int(length)])
        assert (piece[length:] == 0).all()
        seen.add((int(label), begin))
    assert seen == {(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)}
    assert np.bincount(labels, minlength=3).min() > 150


def test_parts_of_sequences_and_their_padding_are_by_hand():
    part = Part(sequences_of(2, 3, 1), {"class": np.arange(3)}, np.arange(3.0)[:, None])
    kept = choose(part, np.array([True, False, True]))
    assert [sequence[:, 0].tolist() for sequence in split(kept.sequences)] == [[1, 2], [6]]
    assert kept.labels["class"].tolist() == [0, 2]
    values, lengths = padded(part.sequences, 2)
    assert values[..., 0].tolist() == [[1, 2], [3, 4], [6, 0]]
    assert lengths.tolist() == [2, 2, 1]


@pytest.mark.parametrize("name", get_args(MethodName))
def test_every_method_has_a_direction_and_the_net_features(name):
    config = replace(SMOKE, method=name)
    net = make_net(config, "waves", 102)
    values, lengths = jax.ShapeDtypeStruct((4, 102, 1), float), jax.ShapeDtypeStruct((4,), int)
    for method in (METHODS[name](config, net), supervised(config, net, 6)):
        params = jax.eval_shape(method.init, KEY, values)
        grad_fn = data_parallel(method.grad_fn, devices=jax.devices("cpu")[:2])
        direction, metrics = jax.eval_shape(grad_fn, params, ((values, lengths), lengths), KEY)
        assert jax.tree.structure(direction) == jax.tree.structure(params)
        assert metrics["loss"].shape == ()
        of = jax.eval_shape(lambda *args: features(net, *args), params, (values, lengths))
        assert of.shape == (4, 3 * 16)


@pytest.mark.slow
def test_features_of_a_sequence_know_nothing_of_its_padding():
    net = make_net(SMOKE, "waves", 102)
    values = jax.random.normal(KEY, (2, 60, 1))
    params = METHODS["cpc"](SMOKE, net).init(KEY, values)
    whole = features(net, params, (values.at[:, 45:].set(7.0), jnp.array([45, 45])))
    alone = features(net, params, (values[:, :45], jnp.array([45, 45])))
    np.testing.assert_allclose(whole, alone, rtol=1e-4, atol=1e-5)


def known_features(labels, width):
    """Features that name the class, and noise that names none."""
    rng = np.random.default_rng(0)
    return {
        "known": np.eye(width, dtype=np.float32)[labels],
        "noise": rng.normal(size=(len(labels), width)).astype(np.float32),
    }


@pytest.mark.slow
def test_features_that_know_the_class_are_worth_most_and_noise_is_at_chance():
    labels = np.arange(120) % 4
    part = Part(sequences_of(*[1] * 120), {"class": labels}, known_features(labels, 4)["noise"])
    data = Dataset(part, part, None, part, part, "noise", {"class": ("a", "b", "c", "d")})
    other = replace(SMOKE, num_test_tasks=40)
    kinds = {
        kind: dict.fromkeys(("learned", "train", "test", "few"), of)
        for kind, of in known_features(labels, 4).items()
    }
    kinds["fresh"] = {**kinds["noise"], "test": np.roll(kinds["noise"]["test"], 1, axis=0)}
    judged = judge(other, "waves", data, "class", kinds)
    assert list(judged) == [
        "waves: class",
        "waves: class, 4-way 1-shot",
        "waves: class, 4-way 5-shot",
    ]
    for task, accuracies in judged.items():
        assert accuracies["known"].mean == 1, task
        noise = accuracies["fresh" if task == "waves: class" else "noise"]
        assert abs(noise.mean - 0.25) < max(3 * noise.interval, 0.15), task


def test_every_set_of_series_is_long_enough_for_every_method_or_refused():
    for method in get_args(MethodName):
        for length in (15, 24, 96, 341):
            check_length(replace(Config(), method=method), "waves", length)
    with pytest.raises(UserError, match="has 11 frames, too few for cpc with num_steps 7"):
        check_length(replace(Config(), num_steps=7), "waves", 15)
    with pytest.raises(UserError, match="too few for order_verification; give a larger crop"):
        check_length(replace(Config(), method="order_verification"), "waves", 9)


def test_cpc_asks_first_for_a_frame_that_shares_nothing_with_the_context():
    for length in (15, 341):
        encoder = (net := make_net(Config(), "waves", length)).encoder
        assert encoder.stride * (first_step(net) - 1) < encoder.window
        assert encoder.stride * first_step(net) >= encoder.window


def test_gains_are_those_of_the_same_examples():
    own, raw = np.array([1.0, 1, 0, 1]), np.array([0.0, 1, 0, 0])
    judged = {"waves: class": {RAW: estimate(raw), "cpc": estimate(own)}}
    numbers = summarise(Config(), judged)
    of_task = numbers["accuracies"]["waves: class"]
    assert of_task["cpc"] == 0.75
    assert of_task[f"gain_over_{RAW}"] == 0.5
    np.testing.assert_allclose(
        of_task[f"gain_over_{RAW}_interval"], 1.96 * np.std(own - raw, ddof=1) / 2
    )
    assert numbers["average_over_sets"] == {}
    two = summarise(Config(), {**judged, "tones: class": judged["waves: class"]})
    assert two["average_over_sets"] == {RAW: 0.25, "cpc": 0.75}


@pytest.mark.slow
def test_nothing_is_learned_from_speakers_who_are_held_out():
    config = replace(PRESETS["tones"], held_out=("low", "high"))
    data = load(config, "tones")
    low, middle, high = range(3)
    assert set(data.learned.labels["speaker"]) == {middle}
    assert set(data.few.labels["speaker"]) == {low, high}
    assert set(data.test.labels["speaker"]) == {low, middle, high}
    assert len(data.few.raw) == 2 * 6 * 16
    assert data.val is not None
    with pytest.raises(DataError, match="tones has no speaker nobody; give some of low, middle"):
        load(replace(config, held_out=("low", "nobody")), "tones")
    with pytest.raises(DataError, match="held_out names all speakers of tones"):
        load(replace(config, held_out=("low", "middle", "high")), "tones")


@pytest.mark.slow
def test_a_run_gives_its_numbers_and_draws_its_pictures(tmp_path):
    numbers = time_series.main(replace(SMOKE, run_dir=tmp_path))
    assert next(iter(numbers["accuracies"])) == "waves: class"
    kinds = numbers["accuracies"]["waves: class"]
    for kind in (RAW, "random initialisation", "cpc", "supervised"):
        assert 0.15 < kinds[kind] <= 1
    for picture in ("accuracies", "waves/learning_curve", "waves/examples", "waves/map"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 1000


def test_settings_without_sense_are_refused():
    for changes, message in (
        ({"datasets": ()}, "datasets are none; give one or more"),
        ({"num_steps": 0}, "num_steps is 0; give 1 or more"),
        ({"crop": 1.5}, "crop is 1.5, a share of each series"),
        ({"datasets": ("tones",), "method": "arrow_of_time"}, "tones has sounds of many"),
        ({"held_out": ("low", "high")}, "held_out names speakers, and waves has none"),
        ({"datasets": ("tones",), "held_out": ("low",)}, "held_out is low; give two or more"),
        ({"datasets": ("tones",), "held_out": ("low", "low")}, "give two or more .* once"),
    ):
        with pytest.raises(UserError, match=message):
            check(replace(Config(), **changes))
