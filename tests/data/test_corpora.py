"""Collections of texts: the embedded one is whole and its splits share nothing; TFDS's are read."""

from pydoc_data.topics import topics

import numpy as np
import pytest

from metagen_jax.data.corpora import load_documents, split_lines, split_sentences
from metagen_jax.errors import DataError


def test_passages_of_topics_are_in_one_split_and_no_paragraph_is_in_two():
    splits = {name: load_documents("topics", name) for name in ("train", "validation", "test")}
    counts = {name: len(split.texts) for name, split in splits.items()}
    assert counts["train"] > 2.9 * counts["test"] > 150
    assert counts["test"] >= counts["validation"] > 50
    paragraphs = {
        name: {p.strip() for text in split.texts for p in text.split("\n\n")}
        for name, split in splits.items()
    }
    assert not paragraphs["train"] & paragraphs["test"]
    assert not paragraphs["validation"] & paragraphs["test"]
    train = splits["train"]
    assert 250_000 > sum(map(len, train.texts)) > 150_000
    assert train.label_names == splits["test"].label_names
    for text, label in zip(train.texts, train.labels, strict=True):
        assert text.partition("\n\n")[0] in topics[train.label_names[label]]


def test_lines_and_sentences_by_hand():
    text = "USER: Hi. Is it 3.5?  Yes! \n\n SYSTEM: Ok\n"
    assert split_lines(text) == ["USER: Hi. Is it 3.5?  Yes!", "SYSTEM: Ok"]
    assert split_sentences(text) == ["USER: Hi.", "Is it 3.5?", "Yes!", "SYSTEM: Ok"]
    assert split_sentences(" = Title = \n \n He ran . She sat . \n") == [
        "= Title =",
        "He ran .",
        "She sat .",
    ]


def test_sets_of_tfds(data_dir):
    pair = [load_documents("sgd_dialogues", s, data_dir=data_dir) for s in ("train[:9]", "train")]
    assert pair[0].texts == pair[1].texts[:9]
    assert len(pair[1].texts) == 3000
    np.testing.assert_array_equal(pair[0].labels, pair[1].labels[:9])
    assert pair[0].label_names == pair[1].label_names
    # Of all splits; in train are 13, of which the rarest has 58 dialogues.
    assert {"Movies_1", "Flights_4"} < set(pair[1].label_names)
    counts = np.bincount(pair[1].labels)
    assert sorted(counts[counts > 0])[0] == 58
    assert (counts > 0).sum() == 13
    assert split_lines(pair[0].texts[0])[0].startswith("USER: ")
    articles = load_documents("wikitext2_articles", "test", data_dir=data_dir)
    assert len(articles.texts) == 60
    assert articles.label_names == ("wikitext2_articles",)
    with pytest.raises(DataError, match="'mnist' has the features image, label; load_documents"):
        load_documents("mnist", "test", data_dir=data_dir)
    with pytest.raises(DataError, match="no split 'best'; give one of validation, test"):
        load_documents("wikitext2_articles", "best", data_dir=data_dir)


def test_says_which_splits_topics_have():
    with pytest.raises(DataError, match="split is 'dev'; 'topics' has train, validation, test"):
        load_documents("topics", "dev")
