"""Classes from few labels: which texts and classes are taken, and what their words tell."""

from dataclasses import replace

import numpy as np
import pytest

from experiments.language_classification import LEAST, beginnings, label, main, words_right
from experiments.language_config import PRESETS
from experiments.language_data import Corpus, load_corpus
from metagen_jax.data.corpora import Documents
from metagen_jax.data.text import BEGIN, END, PAD, decode, train_tokenizer

SMOKE = replace(PRESETS["smoke"], task="classification")


def corpus_of(labels):
    """Texts that name their class."""
    texts = tuple(f"this is about the class {'abc'[label]} and nothing else" for label in labels)
    documents = Documents(texts, np.array(labels, np.int32), ("a", "b", "c"))
    return Corpus(train_tokenizer(texts, vocab_size=300), documents, documents, documents)


def test_classes_with_too_few_texts_are_left_out_and_the_others_numbered():
    parts = label(SMOKE, corpus_of([0] * LEAST + [1] * (LEAST - 1) + [2] * LEAST))
    for part in parts:
        np.testing.assert_array_equal(part.labels, [0] * LEAST + [1] * LEAST)
        np.testing.assert_array_equal(part.documents, part.tokens != PAD)


def test_a_row_holds_the_beginning_of_a_text():
    corpus = corpus_of([0, 1])
    long, short = beginnings(
        SMOKE, corpus, Documents(("a " * 50, "class"), np.zeros(2, np.int32), ("all",))
    )
    assert len(long) == SMOKE.row_length
    assert long[0] == short[0] == BEGIN
    assert long[-1] == END
    assert decode(corpus.tokenizer, long).startswith("a a a")
    assert decode(corpus.tokenizer, short) == "class"
    assert (short == PAD).sum() == SMOKE.row_length - 2 - (short > END).sum()


def test_words_that_name_the_class_tell_it():
    parts = label(SMOKE, corpus := corpus_of([0] * LEAST + [2] * LEAST))
    assert words_right(corpus, *parts, 2).all()


@pytest.mark.slow
def test_a_run_gives_accuracies_of_every_share_and_start(tmp_path):
    config = replace(SMOKE, run_dir=tmp_path)
    numbers = main(config, load_corpus(config))
    assert list(numbers["accuracies"]) == ["0.01", "0.1", "1"]
    for of in numbers["accuracies"].values():
        for name in ("bag of words", "from scratch", "from the encoder"):
            assert 0 <= of[name] <= 1
            assert of[f"{name}, interval"] < 0.5
    assert (tmp_path / "few_labels.png").stat().st_size > 1000
