"""The texts of `experiments.text_generation`, as tokens that each end with one for the end."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from experiments.excerpts import Sequences
from experiments.text_generation_config import Config, DatasetName
from metagen_jax.data.corpora import load_documents
from metagen_jax.data.text import END, encode, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Splits of the source. Of articles there is no train text.
_SPLITS: dict[DatasetName, tuple[str, str, str]] = {
    "topics": ("train", "validation", "test"),
    "sgd_dialogues": ("train", "validation", "test"),
    "tiny_shakespeare": ("train", "validation", "test"),
    "wikitext2_articles": ("validation[:50]", "validation[50:]", "test"),
}
# Shakespeare comes as one text; an interval needs several.
_SCENE = 2000


class Corpus(NamedTuple):
    """Texts of the three splits and the tokenizer made for those of the first."""

    tokenizer: "Tokenizer"
    train: list[str]
    val: list[str]
    test: list[str]


def load_corpus(config: Config) -> Corpus:
    """The texts, of validation and test as many as the settings ask for."""
    train, val, test = (
        _texts(config, split, kept)
        for split, kept in zip(
            _SPLITS[config.dataset], (None, config.num_validation, config.num_test), strict=True
        )
    )
    tokenizer = train_tokenizer(train, vocab_size=config.vocab_size, level=config.level)
    return Corpus(tokenizer, train, val, test)


def _texts(config: Config, split: str, kept: int | None) -> list[str]:
    texts = load_documents(config.dataset, split, data_dir=config.data_dir).texts
    if config.dataset == "tiny_shakespeare":
        texts = [scene for text in texts for scene in scenes(text)]
    return list(texts[:kept])


def scenes(text: str, *, length: int = _SCENE) -> list[str]:
    """Speeches, which blank lines part, one after the other until they have so many characters."""
    parts, part = [], ""
    for speech in text.split("\n\n"):
        part = f"{part}\n\n{speech}" if part else speech
        if len(part) >= length:
            parts.append(part)
            part = ""
    return [*parts, part] if part else parts


def to_sequences(tokenizer: "Tokenizer", texts: Sequence[str]) -> Sequences:
    """The tokens of each text and one for its end."""
    tokens = [np.append(document.tokens, END) for document in encode(tokenizer, texts)]
    starts = np.cumsum([0, *map(len, tokens)])
    return Sequences(np.concatenate(tokens), starts, np.zeros((len(tokens), 0), np.float32))


def count_words(texts: Sequence[str]) -> np.ndarray:
    """What blanks part, of each text."""
    return np.array([len(text.split()) for text in texts])
