"""The experiment on text: hidden tokens and counts, orders of segments, and a run is whole."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments import language, language_masked, language_order, program
from experiments.language_config import PRESETS, Config, check, with_task
from experiments.language_data import load_corpus, pairs_of
from experiments.language_encoder import (
    get_encoder,
    hide,
    init_encoder,
    rows_of,
    train_encoder,
)
from metagen_jax.data.text import MASK
from metagen_jax.errors import UserError

SMOKE = replace(PRESETS["smoke"], num_devices=1)


def test_what_is_hidden_is_the_same_every_time_and_all_masked(tmp_path):
    config = replace(SMOKE, run_dir=tmp_path)
    corpus = load_corpus(config)
    assert (tmp_path / "tokenizer.json").exists()
    rows = rows_of(config, corpus, corpus.val)
    masked, again = (hide(config, corpus, rows, 5) for _ in range(2))
    np.testing.assert_array_equal(masked.chosen, again.chosen)
    chosen = np.asarray(masked.chosen)
    assert (np.asarray(masked.inputs)[chosen] == MASK).all()
    assert (rows.tokens[chosen] > MASK).all()
    assert chosen.sum() / (rows.tokens > MASK).sum() == pytest.approx(0.15, abs=0.02)
    # Counts see no more: a neighbour that is hidden tells nothing.
    unigram = language_masked.count_unigrams(config, corpus, rows.tokens[chosen])
    trigram = language_masked.count_neighbours(config, corpus, rows, masked)
    assert trigram.nats.mean() < unigram.nats.mean() - 0.3
    assert trigram.right.mean() > unigram.right.mean() + 0.05
    everything = hide(replace(config, mask_share=0.999), corpus, rows, 5)
    blind = language_masked.count_neighbours(config, corpus, rows, everything)
    assert blind.nats.mean() > unigram.nats.mean() - 0.3


def test_words_that_come_first_are_found_by_a_bag_of_words(tmp_path):
    corpus = load_corpus(replace(SMOKE, run_dir=tmp_path))
    pairs = pairs_of(SMOKE, corpus, corpus.train)
    # A token that none of them has, in each first segment.
    marked = pairs.tokens.copy()
    marked[:, 0, 1] = marked[np.arange(len(marked)), 1, pairs.types[:, 1].argmax(1)] = 261
    pairs = pairs._replace(tokens=marked)
    right = language_order.words_right(corpus, pairs, pairs, pairs)
    assert right.mean() > 0.95


@pytest.mark.slow
def test_another_task_begins_with_the_net_of_a_run(tmp_path):
    first = replace(SMOKE, run_dir=tmp_path / "masked")
    program.prepare_run_dir(first)
    corpus = load_corpus(first)
    expected = train_encoder(first, corpus, first.run_dir).best_params
    then = replace(SMOKE, task="order", run_dir=tmp_path / "order", encoder=first.run_dir)
    then.run_dir.mkdir()
    params = get_encoder(then, load_corpus(then))
    for a, b in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        np.testing.assert_array_equal(a, b)
    start = init_encoder(first, corpus)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (params, start)), strict=True))
    with pytest.raises(UserError, match="has width 8 and this run 16; give it the same"):
        get_encoder(replace(then, width=16), corpus)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["masked", "order"])
def test_a_run_gives_its_numbers_and_draws_its_pictures(tmp_path, task):
    config = replace(SMOKE, task=task, run_dir=tmp_path)
    numbers = language.main(config)
    models = numbers["models"]
    if task == "masked":
        assert list(models) == ["unigram", "two-sided trigram", "transformer"]
        assert models["transformer"]["perplexity"] < 330
        assert (tmp_path / "examples.txt").read_text().count("?") > 20
        assert (tmp_path / "accuracy.png").stat().st_size > 1000
    else:
        assert list(models) == ["bag of words", "transformer"]
        assert all(0.3 < of["accuracy"] < 0.8 for of in models.values())
    assert (tmp_path / "learning_curve.png").stat().st_size > 1000
    json.dumps(numbers)


def test_a_task_has_a_folder_of_its_own():
    def parse(*argv):
        return program.parse("language", PRESETS, default="topics", vary=with_task, argv=argv)

    assert parse().run_dir.name == "language-topics-masked"
    config = parse("--task", "order", "--preset", "dialogues", "--tune-steps", "5")
    assert (config.run_dir.name, config.tune_steps) == ("language-dialogues-order", 5)
    assert config.dataset == "sgd_dialogues"
    assert parse("--task", "classification").tune_steps == 300
    assert parse("--task", "classification", "--preset", "smoke").tune_steps == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0; give 1 or more"),
        ({"vocab_size": 100}, "vocab_size is 100; give 262 or more"),
        ({"num_test": 5}, "num_test is 5; give 20 or more"),
        ({"tune_rate": 0.0}, r"tune_rate is 0\.0; give more than 0"),
        ({"mask_share": 1.0}, r"mask_share is 1\.0; give more than 0 and less than 1"),
        ({"pair_length": 64}, "pair_length is 64 and row_length 32; give at most that"),
        ({"num_heads": 0}, "num_heads is 0; give 2 or more"),
        ({"num_devices": 3}, "batch_size is 8 for 3 devices; give a multiple"),
        ({"width": 9}, "width is 9 for 2 heads; give a multiple of num_heads"),
        ({"encoder": Config().run_dir}, "encoder is the folder of a run of the task masked"),
        ({"task": "classification", "dataset": "wikitext2_articles"}, "has no classes"),
    ],
)
def test_mistakes_are_named_before_training(settings, message):
    with pytest.raises(UserError, match=message):
        check(replace(SMOKE, **settings))
