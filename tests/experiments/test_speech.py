"""The experiment on speech: excerpts, conditions, a whole run, mistakes."""

import json
import wave
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import program, speech, speech_report
from experiments.excerpts import (
    Excerpt,
    as_list,
    cut,
    draw_excerpt_of_each,
    draw_excerpts,
    excerpt_loss,
)
from experiments.speech_config import PRESETS, Config, check, with_conditional
from experiments.speech_data import choose, join, load_splits, select, to_sounds
from experiments.speech_model import bits_a_sample, make_log_prob, make_net, told
from metagen_jax.data.audio import Recordings
from metagen_jax.errors import UserError
from metagen_jax.gradients import gradients
from metagen_jax.parallel import data_parallel

KEY = jax.random.key(0)
SMALL = replace(PRESETS["smoke"], num_filters=3, num_skip=4, num_layers=3)


def recordings_of(*lengths):
    """Noise, of two labels and three speakers, no two recordings alike in both."""
    starts = np.cumsum([0, *lengths])
    rng = np.random.default_rng(0)
    return Recordings(
        rng.integers(-(2**15), 2**15, starts[-1]).astype(np.int16),
        starts,
        np.arange(len(lengths)) % 2,
        np.arange(len(lengths)) // 2 % 3,
        ("a", "b"),
        ("x", "y", "z"),
    )


def test_excerpts_are_what_they_say_and_count_what_they_saw_enough_before():
    sounds = to_sounds(recordings_of(40, 3, 25), conditional=True)
    excerpts, conditions = draw_excerpts(KEY, sounds, count=500, length=10, warm_up=6)
    assert excerpts.values.shape == (500, 16)
    seen = set()
    for codes, counted, condition in zip(*map(np.asarray, excerpts), conditions, strict=True):
        owner = int(np.flatnonzero((np.asarray(sounds.conditions) == condition).all(1))[0])
        first, last = np.flatnonzero(counted)[[0, -1]]
        assert counted[first : last + 1].all()
        of = as_list(sounds)[owner]
        # Where they lie in their recording; the codes of a piece of three or more are its own.
        [begin] = [
            i for i in range(len(of)) if np.array_equal(of[i : i + last + 1], codes[: last + 1])
        ][:1]
        assert first == (0 if begin == 0 else 6)
        assert begin + last + 1 == min(begin + 16, len(of))
        assert last + 1 - first >= min(10, len(of)), "none wastes what could count"
        seen |= {(owner, begin + i) for i in range(first, last + 1)}
    assert len(seen) == 68, "every sample has its turn"


def test_all_samples_count_about_as_often_whatever_the_length_of_their_recording():
    lengths = 4, 9, 300
    sounds = to_sounds(recordings_of(*lengths), conditional=False)
    # Which sample it is, in place of the sample.
    sounds = sounds._replace(values=np.arange(sum(lengths)))
    excerpts, _ = draw_excerpts(KEY, sounds, count=20_000, length=10, warm_up=6)
    times = np.bincount(np.asarray(excerpts.values)[np.asarray(excerpts.counted)])
    of_short, inner = times[:13], times[13 + 16 : -20]
    np.testing.assert_allclose(of_short / inner.mean(), 1, rtol=0.15)
    np.testing.assert_allclose(inner / inner.mean(), 1, rtol=0.25)


def test_one_excerpt_of_each_is_of_the_sequences_asked_for():
    sounds = to_sounds(recordings_of(40, 3, 25), conditional=True)
    owners = jnp.tile(jnp.array([2, 0]), 200)
    excerpts, conditions = draw_excerpt_of_each(KEY, sounds, owners, length=10, warm_up=6)
    np.testing.assert_array_equal(conditions, np.asarray(sounds.conditions)[owners])
    seen = set()
    for owner, codes, counted in zip(owners.tolist(), *map(np.asarray, excerpts), strict=True):
        of = as_list(sounds)[owner]
        last = int(np.flatnonzero(counted)[-1])
        [begin] = [
            i for i in range(len(of)) if np.array_equal(of[i : i + last + 1], codes[: last + 1])
        ][:1]
        seen |= {(owner, begin + i) for i in np.flatnonzero(counted).tolist()}
    assert len(seen) == 40 + 25, "every sample has its turn"


@pytest.mark.slow
def test_a_cut_counts_every_sample_once_and_is_exact():
    """In pieces, padded, the log-probability of each recording is that of the recording alone."""
    sounds = to_sounds(recordings_of(70, 9, 41), conditional=True)
    net = make_net(SMALL)
    assert net.receptive_field == 23
    log_prob = make_log_prob(net)
    params = jax.jit(net.init)(KEY, sounds.values[:1], told(jnp.asarray(sounds.conditions[0])))
    pieces = cut(sounds, length=13, reach=23)
    assert pieces.excerpts.counted.sum() == 120
    config = replace(SMALL, num_devices=1, chunk=3)
    bits = bits_a_sample(config, log_prob, params, pieces)
    alone = []
    for codes, condition in zip(as_list(sounds), sounds.conditions, strict=True):
        whole = Excerpt(codes, np.ones(len(codes), bool))
        alone.append(float(jax.jit(log_prob)(params, (whole, condition), KEY)))
    assert float(bits.mean) == pytest.approx(-sum(alone) / 120 / np.log(2), rel=1e-5)
    lengths = np.array([70, 9, 41])
    expected = -np.array(alone) / np.log(2) - bits.mean * lengths
    np.testing.assert_allclose(bits.per_task - bits.mean, expected / 40, atol=1e-4)


@pytest.mark.slow
def test_the_loss_is_the_mean_over_what_counts_on_any_number_of_devices():
    """Of excerpts of which some end early; what does not count changes nothing."""
    sounds = to_sounds(recordings_of(30, 12, 5, 26), conditional=False)
    net = make_net(SMALL)
    log_prob = make_log_prob(net)
    params = jax.jit(net.init)(KEY, sounds.values[:1])
    excerpts, conditions, _ = cut(sounds, length=30, reach=23)

    def predict(params, codes, conditions):
        return net.apply(params, codes)

    def evaluate(excerpts, num_devices):
        grad_fn = data_parallel(
            gradients(excerpt_loss(predict)), devices=jax.devices()[:num_devices]
        )
        direction, metrics = jax.jit(grad_fn)(params, (excerpts, conditions), KEY)
        assert metrics.pop("count") == 73 / num_devices
        return direction, metrics

    one = evaluate(excerpts, 1)
    total = sum(
        float(jax.jit(log_prob)(params, (Excerpt(values, counted), condition), KEY))
        for values, counted, condition in zip(*excerpts, conditions, strict=True)
    )
    assert float(one[1]["loss"]) == pytest.approx(-total / 73, rel=1e-5)
    changed = Excerpt(np.where(excerpts.counted, excerpts.values, 200), excerpts.counted)
    chex.assert_trees_all_close(evaluate(changed, 1), one, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(evaluate(excerpts, 2), one, rtol=1e-5, atol=1e-6)


def test_recordings_are_chosen_evenly_and_conditions_name_them():
    recordings = recordings_of(5, 6, 7, 8)
    half = choose(recordings, 2)
    np.testing.assert_array_equal(half.of(1), recordings.of(2))
    assert half.labels.tolist() == [0, 0]
    assert choose(recordings, 9) is recordings
    again = join([select(recordings, np.array([0, 3])), select(recordings, np.array([2]))])
    np.testing.assert_array_equal(again.of(1), recordings.of(3))
    np.testing.assert_array_equal(again.of(2), recordings.of(2))
    assert again.labels.tolist() == [0, 1, 0]
    assert again.speakers.tolist() == [0, 1, 1]
    sounds = to_sounds(recordings, conditional=True)
    np.testing.assert_array_equal(sounds.conditions[3], [0, 1, 0, 1, 0])
    assert to_sounds(recordings, conditional=False).conditions.shape == (4, 0)


def test_samples_are_asked_for_by_name_or_in_turn():
    recordings = recordings_of(3, 3, 3, 3)
    config = replace(SMALL, num_samples=5)
    asked = speech_report.conditions_asked(config, recordings)
    assert asked == [(0, 0), (1, 1), (0, 1), (1, 2), (0, 2)]
    one = replace(config, digit="b", speaker="z")
    assert set(speech_report.conditions_asked(one, recordings)) == {(1, 2)}
    with pytest.raises(UserError, match="digit is '7'; give one of a, b"):
        speech_report.conditions_asked(replace(config, digit="7"), recordings)
    with pytest.raises(UserError, match="speaker is 'theo'; give one of x, y, z"):
        speech_report.conditions_asked(replace(config, speaker="theo"), recordings)


@pytest.mark.slow
@pytest.mark.parametrize("conditional", [True, False])
def test_a_run_gives_its_numbers_and_makes_sounds(tmp_path, conditional):
    config = replace(SMALL, conditional=conditional, run_dir=tmp_path)
    numbers = speech.main(config)
    # 4 steps leave it near the 8 bits of codes that are equally likely.
    assert 7 < numbers["wavenet_bits"] < 8.2
    assert numbers["linear_prediction_of_amplitudes_bits"] < numbers["3_gram_bits"] < 7
    assert numbers["num_test"] == 9
    gain = numbers["3_gram_bits"] - numbers["wavenet_bits"]
    assert numbers["gain_over_3_gram"] == pytest.approx(gain)
    for picture in ("learning_curve", "spectrograms"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 1000
    files = sorted((tmp_path / "samples").glob("*.wav"))
    assert len(files) == 3
    with wave.open(str(files[0])) as file:
        assert (file.getframerate(), file.getnframes()) == (8000, 400)
    json.dumps(numbers)


def test_splits_are_as_large_as_asked_and_the_command_line_wins():
    splits = load_splits(PRESETS["smoke"])
    assert [len(part.labels) for part in splits] == [144, 3, 9]

    def parse(*argv):
        return program.parse("speech", PRESETS, default="tones", vary=with_conditional, argv=argv)

    assert parse("--no-conditional").run_dir.name == "speech-tones-unconditional"
    assert parse("--preset", "digits", "--steps", "3").steps == 3


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_settings_that_make_sense(preset):
    check(PRESETS[preset])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0; give 1 or more"),
        ({"num_test": 1}, "num_test is 1; give 2 or more"),
        ({"rate": 0.0}, r"rate is 0\.0; give more than 0"),
        ({"ngram": 8}, "ngram is 8; give 7 or less"),
        ({"seconds": 0.0}, r"seconds is 0\.0; give more than 0"),
        ({"temperature": -1.0}, r"temperature is -1\.0; give 0 or more"),
        ({"top_p": 0.0}, r"top_p is 0\.0; give a probability over 0"),
        ({"conditional": False, "digit": "up a third"}, "give --conditional, or neither"),
        ({"speaker": "theo"}, "speaker is 'theo'; give one of low, middle, high"),
    ],
)
def test_mistakes_are_named_before_training(settings, message):
    with pytest.raises(UserError, match=message):
        speech.main(replace(PRESETS["smoke"], **settings))


def test_what_is_asked_of_a_trained_model_may_change_when_it_is_resumed(tmp_path):
    config = replace(Config(), run_dir=tmp_path / "run")
    program.prepare_run_dir(config)
    program.prepare_run_dir(replace(config, resume=True, digit="level", temperature=0.5))
    with pytest.raises(UserError, match="--steps 1000 where this one has --steps 9"):
        program.prepare_run_dir(replace(config, resume=True, steps=9))
