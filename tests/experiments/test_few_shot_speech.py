"""The experiment on people never heard in training: its parts, its pieces, its table."""

import types
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments import few_shot_speech
from experiments.few_shot_speech import (
    CONVENTIONAL,
    MAML,
    Row,
    draw_episode,
    load_splits,
    pooled,
    print_table,
)
from experiments.few_shot_speech_config import PRESETS, check
from metagen_jax.data.audio import TONES_EACH
from metagen_jax.errors import UserError
from metagen_jax.evaluation.estimates import estimate

SMOKE = replace(PRESETS["smoke"], num_devices=1)


@pytest.fixture(scope="module")
def splits():
    return load_splits(SMOKE)


def test_each_recording_gives_one_piece_and_each_speaker_has_one_part(splits):
    assert list(splits.test) == ["high"]
    for part in (splits.train, splits.val, splits.test["high"]):
        excerpts, said = part.examples
        assert excerpts.values.shape == (6 * TONES_EACH, 64 + 16)
        assert (np.asarray(said).sum(1) == 1).all(), "what is said is told, and not who says it"
        assert said.shape[1] == 6
        # Of a recording's first piece the warm-up counts as well.
        assert set(np.asarray(excerpts.counted.sum(1))) <= {64, 64 + 16, *range(1, 64)}


def test_an_episode_has_other_recordings_of_one_speaker_for_queries(splits):
    episode = draw_episode(jax.random.key(0), splits.val, num_shots=3, num_queries=4)
    (support, _), (query, _) = episode
    assert support.values.shape[0] == 3
    assert query.values.shape[0] == 4
    rows = {bytes(np.asarray(x)) for x in (*support.values, *query.values)}
    assert len(rows) == 7


def test_the_table_has_differences_of_the_same_episodes(capsys):
    bits = {"theo": estimate(np.array([4.0, 5.0])), "nina": estimate(np.array([3.0, 3.0]))}
    assert pooled(bits).mean == 3.75
    rows = {name: {1: Row(bits, 3, 0.1)} for name in (MAML, CONVENTIONAL)}
    print_table(SMOKE, rows, {1: estimate(np.zeros(4))})
    text = capsys.readouterr().out
    assert "4.500 ± 0.980" in text
    assert "3 (0.1)" in text
    assert "0.000 ± 0.000" in text


def test_the_conventional_net_takes_as_many_gradients(monkeypatch, splits):
    steps = {}

    def learn(config, name, grad_fn, sample, params, data, **options):
        steps[name] = options["steps"] * options["count"]
        return types.SimpleNamespace(best_params=params)

    monkeypatch.setattr(few_shot_speech, "learn", learn)
    net = few_shot_speech.make_net(SMOKE)
    few_shot_speech.train(replace(SMOKE, meta_steps=6), net, splits.train)
    # An outer step: 2 tasks of 1 step on 2 recordings and 2 queries.
    assert steps[CONVENTIONAL] == 6 * 2 * (2 + 2)


def test_settings_without_sense_are_refused():
    for changes, message in (
        ({"num_shots": 0}, "num_shots is 0; give 1 or more"),
        ({"rates": ()}, "give one or more, each more than 0"),
        ({"shots": (1, 1)}, "none negative, each once"),
        ({"inner_rate": 0.0}, "inner_rate is 0.0; give more than 0"),
    ):
        with pytest.raises(UserError, match=message):
            check(replace(SMOKE, **changes))
