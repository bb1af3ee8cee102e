"""The experiment on people never heard in training: who is in which part, its bits, a whole run."""

import functools
import types
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import few_shot_speech, few_shot_speech_data, program
from experiments.excerpts import Excerpt
from experiments.few_shot_speech import CONVENTIONAL, MAML, START, bits_a_sample, evaluate, key_of
from experiments.few_shot_speech_config import PRESETS, Config, check, with_gradient
from experiments.few_shot_speech_data import (
    Speaker,
    Splits,
    draw_episode,
    draw_task,
    load_splits,
    told_words,
)
from experiments.few_shot_speech_report import Row, numbers_of, print_table
from metagen_jax.data.audio import TONES_EACH, Recordings, mu_law_decode
from metagen_jax.data.episodes import group_by_class
from metagen_jax.errors import UserError
from metagen_jax.evaluation.estimates import estimate
from metagen_jax.types import MetaParams

KEY = jax.random.key(0)
SMOKE = replace(PRESETS["smoke"], num_devices=1)
# Of nothing but the code of its speaker and number.
SMALL = replace(SMOKE, num_speakers=(2, 1, 2), excerpt=8, warm_up=4)
EACH = 12


def load_constant(source, split, *, data_dir):
    """Four recordings by each of five speakers in a split, each of one code all along."""
    del source, data_dir
    part = ("train", "validation", "test").index(split)
    pairs = [(i % 2, s, 40 * s + 4 * part + i) for s in range(5) for i in range(4)]
    labels, speakers, codes = np.array(sorted(pairs)).T
    lengths = 5 + codes % 40
    levels = np.round(2**15 * np.asarray(mu_law_decode(codes))).astype(np.int16)
    return Recordings(
        np.repeat(levels, lengths),
        np.cumsum([0, *lengths]),
        labels,
        speakers,
        ("yes", "no"),
        tuple("abcde"),
    )


@pytest.fixture
def splits(monkeypatch):
    monkeypatch.setattr(few_shot_speech_data, "load_recordings", load_constant)
    return load_splits(SMALL, reach=6)


def codes_of(excerpts):
    """The one code of each excerpt."""
    values, counted = map(np.asarray, excerpts)
    codes = values.max(1, where=counted, initial=0)
    assert (np.where(counted, values, codes[:, None]) == codes[:, None]).all()
    return codes


def test_no_speaker_is_in_two_parts_and_all_recordings_are_in_one(splits):
    train, val, test = splits
    assert list(test) == ["d", "e"]
    parts = [
        np.asarray(train.sounds.values)[np.asarray(train.sounds.starts)[:-1]],
        codes_of(val.examples[0]),
        *(codes_of(speaker.pieces.examples[0]) for speaker in test.values()),
    ]
    for codes, speakers in zip(parts, ([0, 1], [2], [3], [4]), strict=True):
        expected = [40 * speaker + number for speaker in speakers for number in range(EACH)]
        assert sorted(codes.tolist()) == expected
    assert train.speakers.sizes.tolist() == [EACH, EACH]


def test_a_test_piece_sees_all_that_the_net_does_and_is_told_what_is_said(splits):
    pieces, recordings = splits.test["e"]
    excerpts, said = pieces.examples
    assert excerpts.values.shape == (EACH, 8 + 6)
    np.testing.assert_array_equal(said, told_words(recordings).conditions)
    assert said.shape == (EACH, 2)
    lengths = np.diff(recordings.starts)
    for counted, length in zip(np.asarray(excerpts.counted), lengths, strict=True):
        # The whole of one that fits; else its beginning, or up to 8 after 6 that don't count.
        first, count = int(counted.argmax()), int(counted.sum())
        assert (first, count) == (0, min(length, 14)) or (first == 6 and count <= 8)


def test_a_task_has_other_recordings_of_one_speaker_for_queries_and_new_places_each_time(splits):
    draw = jax.jit(functools.partial(draw_task, SMALL))
    seen = set()
    for key in jax.random.split(KEY, 40):
        (support, _), (query, told) = draw(key, splits.train)
        assert support.values.shape == query.values.shape == (2, 8 + 4)
        assert told.shape == (2, 2)
        codes = np.concatenate([codes_of(support), codes_of(query)])
        assert len(set(codes.tolist())) == 4
        assert len(set((codes // 40).tolist())) == 1
        seen |= {
            (int(code), int(counted.argmax()))
            for code, counted in zip(codes[:2], np.asarray(support.counted), strict=True)
        }
    assert {code // 40 for code, _ in seen} == {0, 1}
    assert {first for _, first in seen} == {0, 4}, "from the beginning, and from further on"


def piece_of(code, count):
    return np.full(32, code), np.arange(32) < count


def evaluated(num_queries, num_tasks):
    """Of pieces of 10 samples that need 1 bit each, and 30 that need 3; two speakers alike."""
    values, counted = map(np.stack, zip(piece_of(0, 10), piece_of(1, 30), strict=True))
    pieces = group_by_class(
        (Excerpt(values, counted), np.ones((2, 1), np.float32)), np.zeros(2, int)
    )
    logits = jnp.log(jnp.array([1 / 2, 1 / 8, 3 / 8]))
    net = types.SimpleNamespace(
        apply=lambda params, codes, said: jnp.broadcast_to(logits, (*codes.shape, 3))
    )
    config = replace(SMOKE, shots=(0,), num_queries=num_queries, num_test_tasks=num_tasks)
    speaker = Speaker(pieces, load_constant("", "test", data_dir=None))
    splits = Splits(None, None, {"a": speaker, "b": speaker})
    return evaluate(config, net, {MAML: {}}, splits)[MAML][0].bits


def test_bits_are_by_samples_and_not_by_pieces():
    """(10 + 90) / 40 of both pieces, where the mean of pieces' means is 2."""
    for bits in evaluated(2, 3).values():
        np.testing.assert_allclose(bits.per_task, 2.5, rtol=1e-6)
    by_hand = bits_a_sample(
        estimate(np.log(2) * np.array([10.0, 90.0])), estimate(np.array([10.0, 30.0]))
    )
    assert by_hand.mean == pytest.approx(2.5)


def test_episodes_weigh_as_much_as_they_count_and_each_speaker_has_its_own():
    drawn = []
    for bits in evaluated(1, 20).values():
        short = bits.per_task == bits.per_task.min()
        total = np.where(short, 10, 90).sum() / np.where(short, 10, 30).sum()
        assert 0 < short.sum() < 20
        assert bits.mean == pytest.approx(total, rel=1e-6)
        drawn.append(short)
    assert (drawn[0] != drawn[1]).any()


def test_no_two_trainings_draw_alike():
    keys = [key_of(SMOKE, name) for name in ("parameters", START, MAML, CONVENTIONAL)]
    assert len({bytes(jax.random.key_data(key)) for key in keys}) == 4


def test_the_conventional_net_takes_as_many_gradients(monkeypatch, splits):
    steps = {}

    def learn(config, name, grad_fn, sample, params, data, **options):
        steps[name] = options["steps"] * options["count"]
        return types.SimpleNamespace(best_params=params)

    monkeypatch.setattr(few_shot_speech, "learn", learn)
    monkeypatch.setattr(few_shot_speech, "first_params", lambda *_: {})
    net = few_shot_speech.make_net(SMOKE)
    few_shot_speech.train(replace(SMOKE, meta_steps=6), net, splits.train)
    # An outer step: 2 tasks of 1 step on 2 recordings and 2 queries.
    assert steps[CONVENTIONAL] == 6 * 2 * (2 + 2)


def test_numbers_and_table_are_by_speaker_and_tell_of_edges(capsys):
    config = replace(SMOKE, sgd_rates=(0.1, 0.3, 1.0), test_steps=5)
    bits = {"theo": estimate(np.array([4.0, 5.0])), "nina": estimate(np.array([3.0, 3.0]))}
    params = MetaParams({}, {})
    rows = {
        MAML: {0: Row(bits, 0, None, params), 5: Row(bits, 3, "sgd 0.3", params)},
        CONVENTIONAL: {0: Row(bits, 0, None, params), 5: Row(bits, 3, "sgd 1", params)},
    }
    less = {n: {name: estimate(np.zeros(2)) for name in bits} for n in (0, 5)}
    numbers = numbers_of(config, rows, less)
    of = numbers["bits_by_shots"][CONVENTIONAL]["5"]
    assert (of["steps"], of["rate"], of["at_edge"], of["mean"]) == (3, "sgd 1", True, 3.75)
    assert of["speakers"]["theo"] == pytest.approx({"bits": 4.5, "interval": 0.98})
    assert not numbers["bits_by_shots"][MAML]["5"]["at_edge"]
    assert numbers["maml_needs_less"]["5"]["speakers"]["nina"] == {"bits": 0, "interval": 0}
    assert rows[MAML][5]._replace(num_steps=5).at_edge(config)
    assert not rows[CONVENTIONAL][5]._replace(num_steps=0).at_edge(config)
    print_table(config, rows, less)
    text = capsys.readouterr().out
    for cell in ("4.500 ± 0.980", "3 (sgd 0.3) ", "3 (sgd 1)*", "0.000 ± 0.000", "3.750"):
        assert cell in text


@pytest.mark.slow
def test_a_run_of_embedded_voices_and_its_replay_give_the_same_numbers(tmp_path):
    config = replace(SMOKE, run_dir=tmp_path)
    numbers = few_shot_speech.main(config)
    for name in (MAML, CONVENTIONAL):
        by_shots = numbers["bits_by_shots"][name]
        assert list(by_shots) == ["0", "2"]
        for of in by_shots.values():
            assert list(of["speakers"]) == ["cello", "viola"]
            # 4 steps leave it near the 8 bits of codes that are equally likely.
            assert 7 < of["mean"] < 8.5
    for picture in ("bits_by_shots", "spectrograms"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 1000
    sounds = [file.name.partition(", ")[2] for file in sorted((tmp_path / "samples").glob("*.wav"))]
    assert sounds == ["before.wav", "before.wav", "after.wav", "after.wav", "true.wav", "true.wav"]
    again = few_shot_speech.main(replace(config, resume=True))
    assert {**again, "train_seconds": 0} == {**numbers, "train_seconds": 0}


@pytest.mark.slow
def test_an_episode_of_the_embedded_voices_has_all_its_recordings(tmp_path):
    splits = load_splits(replace(Config(), run_dir=tmp_path), reach=16)
    for sizes in (splits.train.speakers.sizes, splits.val.sizes):
        assert set(sizes.tolist()) == {6 * TONES_EACH}
    assert len(splits.train.speakers.sizes) == 8
    pieces, recordings = splits.test["viola"]
    episode = draw_episode(KEY, pieces, num_shots=90, num_queries=6)
    drawn = np.concatenate([episode.support[1], episode.query[1]]).sum(0)
    assert drawn.tolist() == np.bincount(recordings.labels).tolist()


def test_too_few_speakers_or_recordings_are_named_before_training(monkeypatch):
    monkeypatch.setattr(few_shot_speech_data, "load_recordings", load_constant)
    for changes, message in (
        ({"num_speakers": (3, 1, 2)}, r"num_speakers is \(3, 1, 2\) and voices has 5 in all"),
        ({"shots": (0, 100)}, "100 shots and 2 queries need 102 examples of each class .* has 12"),
        ({"num_shots": 11}, "11 shots and 2 queries need 13"),
    ):
        with pytest.raises(UserError, match=message):
            few_shot_speech.main(replace(SMALL, **changes))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_settings_that_make_sense(preset):
    check(PRESETS[preset])
    assert with_gradient(Config(), replace(Config(), gradient="remat")).run_dir.name.endswith(
        "-remat"
    )


def test_what_sounds_are_made_may_change_when_a_run_is_resumed(tmp_path):
    config = replace(Config(), run_dir=tmp_path / "run")
    program.prepare_run_dir(config)
    program.prepare_run_dir(replace(config, resume=True, num_samples=5))
    with pytest.raises(UserError, match="--meta-steps 30 where this one has --meta-steps 9"):
        program.prepare_run_dir(replace(config, resume=True, meta_steps=9))


def test_settings_without_sense_are_refused():
    for changes, message in (
        ({"num_shots": 0}, "num_shots is 0; give 1 or more"),
        ({"sgd_rates": (), "adam_rates": ()}, "give one rate or more, each more than 0"),
        ({"adam_rates": (0.1, 0.0)}, "give one rate or more, each more than 0"),
        ({"shots": (1, 1)}, "none negative, each once"),
        ({"inner_rate": 0.0}, "inner_rate is 0.0; give more than 0"),
        ({"meta_rate": -1.0}, "meta_rate is -1.0; give more than 0"),
        ({"num_speakers": (1, 1, 1)}, "give two or more to learn from"),
        ({"num_speakers": (3, 1, 0)}, "one or more to test"),
        ({"num_samples": 3}, "num_samples is 3; give at most num_queries, 2"),
    ):
        with pytest.raises(UserError, match=message):
            check(replace(SMOKE, **changes))
