"""The texts of `experiments.language`, and what batches are drawn from."""

import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, Int32, PyTree

from experiments.language_config import Config, DatasetName
from metagen_jax.data.corpora import Documents, load_documents, split_lines, split_sentences
from metagen_jax.data.text import (
    SentencePairs,
    decode,
    load_tokenizer,
    save_tokenizer,
    sentence_pairs,
    train_tokenizer,
)
from metagen_jax.evaluation.bag_of_words import Bags, count_tokens
from metagen_jax.evaluation.estimates import Estimate, estimate_ratio
from metagen_jax.types import PRNGKey

TOKENIZER = "tokenizer.json"
# Words, and marks by themselves.
_WORD = re.compile(r"\w+|[^\w\s]")

# To learn from, to choose by, to test. The dialogues' own validation and test splits are of other
# services, so that no classifier could know them.
_SPLITS: dict[DatasetName, tuple[str, str, str]] = {
    "topics": ("train", "validation", "test"),
    "wikitext2_articles": ("validation[:90%]", "validation[90%:]", "test"),
    "sgd_dialogues": ("train[:80%]", "train[80%:90%]", "train[90%:]"),
}


class Corpus(NamedTuple):
    """Texts to learn from, to choose by and to test, and a tokenizer made for the first."""

    tokenizer: Any
    train: Documents
    val: Documents
    test: Documents

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()


def load_corpus(config: Config) -> Corpus:
    """The texts, and the tokenizer of the encoder or else a new one, which is kept with the run."""
    train, val, test = (
        _first(load_documents(config.dataset, split, data_dir=config.data_dir), config.num_test)
        for split in _SPLITS[config.dataset]
    )
    if config.encoder is None:
        tokenizer = train_tokenizer(train.texts, vocab_size=config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.encoder / TOKENIZER)
    save_tokenizer(tokenizer, config.run_dir / TOKENIZER)
    return Corpus(tokenizer, train, val, test)


def _first(documents: Documents, number: int | None) -> Documents:
    texts, labels, names = documents
    return Documents(texts[:number], labels[:number], names)


def pairs_of(config: Config, corpus: Corpus, documents: Documents) -> SentencePairs:
    """Neighbouring turns of dialogues, without who speaks, or segments of whole sentences."""
    split = _turns if config.dataset == "sgd_dialogues" else split_sentences
    return sentence_pairs(
        corpus.tokenizer,
        documents.texts,
        split,
        length=config.pair_length,
        segment_length=config.segment_length,
    )


def _turns(dialogue: str) -> list[str]:
    return [re.sub(r"^(USER|SYSTEM): ", "", line) for line in split_lines(dialogue)]


def bags_of_words(
    corpus: Corpus, train: Int32[np.ndarray, "n t"], *others: Int32[np.ndarray, "_ t"]
) -> list[Bags]:
    """How often each word stands in rows of tokens, of the words that are in `train`."""
    words = [
        [_WORD.findall(decode(corpus.tokenizer, row).lower()) for row in rows]
        for rows in (train, *others)
    ]
    number = {word: i + 1 for i, word in enumerate(sorted({x for row in words[0] for x in row}))}
    bags = []
    for rows in words:
        numbers = np.zeros((len(rows), max(1, *map(len, rows))), int)
        for row, found in zip(numbers, rows, strict=True):
            row[: len(found)] = [number.get(word, 0) for word in found]
        bags.append(count_tokens(numbers, num_tokens=len(number) + 1, ignore=(0,)))
    return bags


def over_texts(values: Float[np.ndarray, " m"], sources: Int[np.ndarray, " m"]) -> Estimate:
    """The mean over all values, with an interval that takes texts to be independent."""
    _, text, counts = np.unique(sources, return_inverse=True, return_counts=True)
    return estimate_ratio(np.bincount(text, values), counts)


def draw_batch(key: PRNGKey, data: PyTree, *, batch_size: int) -> PyTree:
    """Random examples of arrays that have them in their leading axes."""
    chosen = jax.random.randint(key, (batch_size,), 0, len(jax.tree.leaves(data)[0]))
    return jax.tree.map(lambda x: x[chosen], data)
