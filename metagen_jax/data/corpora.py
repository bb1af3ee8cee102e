"""Collections of texts: articles, dialogues, plays of TFDS, and CPython's help topics, embedded."""

import importlib
import re
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from metagen_jax.data.cache import Folder, missing_package_named
from metagen_jax.data.sources import prepared_folder
from metagen_jax.errors import DataError

TOPICS = "topics"
"""The name of the embedded collection."""

# Every fifth passage is for tests, the one after it to choose by.
_TOPIC_SPLITS = {"train": (2, 3, 4), "validation": (1,), "test": (0,)}
_PASSAGE = 800
# A set's feature by which its texts have classes.
_LABELS = {"sgd_dialogues": "services"}


class Documents(NamedTuple):
    """Texts, in the order in which they are stored.

    Attributes:
      texts: without what has no meaning, such as blanks at the ends.
      labels: the class of each.
      label_names: of these numbers.
    """

    texts: tuple[str, ...]
    labels: Int32[np.ndarray, " n"]
    label_names: tuple[str, ...]


def load_documents(name: str, split: str, *, data_dir: Folder | None = None) -> Documents:
    """The texts of a split.

    `"topics"`: what `help` of Python says on 79 topics, about 370,000 characters, as passages of
    about 1000, of which no paragraph stands in two. Classes are topics. Of each five passages one
    is of the split `"test"`, one of `"validation"`, three of `"train"`. The words differ a little
    between versions of Python.

    Any other name is a TFDS set with the feature `text`; its splits are TFDS's, such as
    `"train[:80%]"`. Classes of `sgd_dialogues` are the services of which a dialogue makes use,
    numbered alike in all splits; other sets are of one class.

    Args:
      name: of the set.
      split: of the set.
      data_dir: folder of prepared TFDS sets, by default `$TFDS_DATA_DIR`, `~/tensorflow_datasets`.

    Raises:
      DataError: a set, feature, split or package is missing; the message says what to do.
    """
    if name == TOPICS:
        return _load_topics(split)
    with missing_package_named(name):
        return _load_tfds(name, split, data_dir)


def split_lines(text: str) -> list[str]:
    """The lines of a text, such as the turns of a dialogue, without empty ones."""
    return [line for line in map(str.strip, text.split("\n")) if line]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, and whatever else stands in lines of its own.

    A sentence ends with a full stop, a question or an exclamation mark before a blank; this takes
    abbreviations for ends.
    """
    return [sentence for line in split_lines(text) for sentence in re.split(r"(?<=[.!?])\s+", line)]


def _load_topics(split: str) -> Documents:
    if split not in _TOPIC_SPLITS:
        raise DataError(f"split is {split!r}; {TOPICS!r} has {', '.join(_TOPIC_SPLITS)}")
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    seen: set[str] = set()
    passages = [
        (text, label)
        for label, topic in enumerate(sorted(topics))
        for text in _passages(topics[topic], seen)
    ]
    texts, labels = zip(
        *(passage for i, passage in enumerate(passages) if i % 5 in _TOPIC_SPLITS[split]),
        strict=True,
    )
    return Documents(texts, np.array(labels, np.int32), tuple(sorted(topics)))


def _passages(text: str, seen: set[str]) -> list[str]:
    """Paragraphs that have not been seen, in passages that end when they are long enough."""
    passages, passage = [], ""
    for paragraph in re.split(r"\n{2,}", text):
        if paragraph.strip() and paragraph.strip() not in seen:
            seen.add(paragraph.strip())
            passage += f"{paragraph}\n\n"
        if len(passage) >= _PASSAGE:
            passages.append(passage.strip())
            passage = ""
    return [*passages, passage.strip()] if passage else passages


def _load_tfds(name: str, split: str, data_dir: Folder | None) -> Documents:
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(prepared_folder(name, data_dir))
    if "text" not in builder.info.features:
        raise DataError(
            f"{name!r} has the features {', '.join(sorted(builder.info.features))}; "
            "load_documents needs a 'text': give a data set that has it"
        )
    try:
        source = builder.as_data_source(split=split)
    except (KeyError, ValueError):
        known = ", ".join(builder.info.splits)
        raise DataError(f"{name!r} has no split {split!r}; give one of {known}") from None
    examples = source.__getitems__(list(range(len(source))))
    base = name.partition(":")[0]
    feature = _LABELS.get(base)
    if feature is None:
        names, classes = [base], [base] * len(examples)
    else:
        # Of all splits, so that a class has one number in all of them.
        everything = builder.as_data_source(split="+".join(builder.info.splits))
        all_examples = everything.__getitems__(list(range(len(everything))))
        names = sorted({example[feature].decode() for example in all_examples})
        classes = [example[feature].decode() for example in examples]
    number = {label: i for i, label in enumerate(names)}
    return Documents(
        tuple(example["text"].decode().strip() for example in examples),
        np.array([number[label] for label in classes], np.int32),
        tuple(names),
    )
