"""The experiment on texts that are made: what counts, prompts, a whole run, mistakes."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import text_generation, text_generation_report
from experiments.excerpts import Excerpt, as_list, cut, draw_excerpts
from experiments.text_generation_config import PRESETS, check
from experiments.text_generation_data import (
    count_words,
    load_corpus,
    scenes,
    to_sequences,
)
from metagen_jax.errors import UserError

pytest.importorskip("tokenizers", reason="the extra experiments is not installed")

KEY = jax.random.key(0)
SMALL = PRESETS["smoke"]


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(SMALL)


def test_texts_end_with_their_token_and_can_be_read_back(corpus):
    sequences = to_sequences(corpus.tokenizer, corpus.test)
    tokens = as_list(sequences)
    assert len(tokens) == len(corpus.test) == 5
    for text, of in zip(corpus.test, tokens, strict=True):
        assert corpus.tokenizer.decode(of[:-1].tolist()) == text
        assert corpus.tokenizer.id_to_token(int(of[-1])) == "[SEP]"
    assert count_words(["a b  c\nd", ""]).tolist() == [4, 0]


def test_scenes_are_whole_speeches_and_all_of_the_text():
    text = "\n\n".join(f"NAME {i}:\n{'word ' * i}" for i in range(30))
    parts = scenes(text, length=100)
    assert "\n\n".join(parts) == text
    assert all(part.startswith("NAME") for part in parts)
    assert all(100 <= len(part) < 300 for part in parts[:-1])


@pytest.mark.slow
def test_a_text_that_fits_has_the_probability_of_the_whole_and_others_see_what_is_before(corpus):
    """Of a text longer than the net sees, each token given at least `warm_up` before it."""
    config = replace(SMALL, num_devices=1)
    net = text_generation.make_net(config, 300)
    log_prob = text_generation.make_log_prob(net)
    sequences = to_sequences(corpus.tokenizer, ["A short one", corpus.test[0][:60]])
    short, long = as_list(sequences)
    assert len(short) <= 16 < len(long)
    params = jax.jit(net.init)(KEY, jnp.asarray(short))
    pieces = cut(sequences, length=12, reach=4)
    nats = text_generation.nats_of(config, log_prob, params, pieces)
    total = np.bincount(pieces.owners, weights=nats)

    @jax.jit
    def log_probs(row):
        return jax.nn.log_softmax(net.apply(params, row, method="predict_next"))

    def of_row(tokens):
        """What stands after the tokens changes nothing."""
        return log_probs(np.pad(tokens, (0, 16 - len(tokens))))[np.arange(len(tokens)), tokens]

    assert total[0] == pytest.approx(-float(of_row(short).sum()), rel=1e-4)
    by_pieces = 0.0
    for first in (0, *range(16, len(long), 12)):
        begin = max(first - 4, 0)
        by_pieces -= float(of_row(long[begin : begin + 16])[first - begin :].sum())
    assert total[1] == pytest.approx(by_pieces, rel=1e-4)


def test_excerpts_count_as_many_tokens_as_they_should(corpus):
    sequences = to_sequences(corpus.tokenizer, corpus.test)
    excerpts, conditions = draw_excerpts(KEY, sequences, count=50, length=12, warm_up=4)
    assert isinstance(excerpts, Excerpt)
    assert excerpts.values.shape == (50, 16)
    assert conditions.shape == (50, 0)
    assert set(np.unique(excerpts.counted.sum(1))) <= set(range(1, 17))


def test_prompts_are_the_one_given_or_first_lines_of_test_texts(corpus):
    config = replace(SMALL, num_samples=7, warm_up=20, length=80)
    texts = [text for text, _ in text_generation_report.prompts_asked(config, corpus)]
    assert texts[0] == corpus.test[0].split("\n")[0] + "\n"
    assert texts[5:] == texts[:2]
    asked = text_generation_report.prompts_asked(replace(config, prompt="An object"), corpus)
    assert {text for text, _ in asked} == {"An object"}
    assert corpus.tokenizer.decode(asked[0][1].tolist()) == "An object"
    with pytest.raises(UserError, match=r"prompt has \d+ tokens and a text at most 16; give a sh"):
        text_generation_report.prompts_asked(replace(SMALL, prompt="object " * 30), corpus)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["bytes", "characters"])
def test_a_run_gives_its_numbers_and_writes_texts(tmp_path, level):
    vocab_size = {"bytes": 300, "characters": 90}[level]
    config = replace(
        SMALL, level=level, vocab_size=vocab_size, prompt="The object", run_dir=tmp_path
    )
    numbers = text_generation.main(config)
    # 4 steps leave it near tokens that are equally likely.
    even = np.log(numbers["vocab_size"]) * numbers["num_test_tokens"] / numbers["num_test_words"]
    assert numbers["transformer_nats_a_word"] == pytest.approx(even, rel=0.05)
    assert numbers["ngram_nats_a_word"] < 0.6 * even
    assert numbers["ngram_perplexity"] == pytest.approx(np.exp(numbers["ngram_nats_a_word"]))
    gain = numbers["ngram_nats_a_word"] - numbers["transformer_nats_a_word"]
    assert numbers["gain_nats_a_word"] == pytest.approx(gain)
    transcript = (tmp_path / "transcript.txt").read_text(encoding="utf-8")
    assert transcript.count("The object⏵") == 2
    assert (tmp_path / "learning_curve.png").stat().st_size > 1000
    assert (tmp_path / "tokenizer.json").exists()
    json.dumps(numbers)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_settings_that_make_sense(preset):
    check(PRESETS[preset])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0; give 1 or more"),
        ({"num_test": 1}, "num_test is 1; give 2 or more"),
        ({"vocab_size": 200}, "vocab_size is 200; give 262 or more"),
        ({"width": 9}, "width is 9 for 2 heads; give a multiple"),
        ({"ngram": 8}, "ngram is 8 and vocab_size 300; give fewer"),
        ({"rate": 0.0}, r"rate is 0\.0; give more than 0"),
        ({"weight_decay": -1.0}, r"weight_decay is -1\.0; give 0 or more"),
        ({"temperature": -1.0}, r"temperature is -1\.0; give 0 or more"),
        ({"top_p": 1.5}, r"top_p is 1\.5; give a probability over 0"),
    ],
)
def test_mistakes_are_named_before_training(settings, message):
    with pytest.raises(UserError, match=message):
        text_generation.main(replace(SMALL, **settings))
