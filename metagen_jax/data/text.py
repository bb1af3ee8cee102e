"""Texts as tokens: byte-pair encoding or characters, and documents packed into rows.

    tokenizer = train_tokenizer(documents.texts, vocab_size=2000)
    pieces = encode(tokenizer, documents.texts)
    rows = pack(pieces, length=128)

Needs the package `tokenizers`, whose own JSON files `save_tokenizer` writes.

Sennrich, Haddow, Birch: Neural Machine Translation of Rare Words with Subword Units, 2016.
Radford, Wu, Child, Luan, Amodei, Sutskever: Language Models are Unsupervised Multitask Learners,
2019. Lan, Chen, Goodman, Gimpel, Sharma, Soricut: ALBERT: A Lite BERT for Self-supervised Learning
of Language Representations, 2020.
"""

import bisect
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32

from metagen_jax.data.cache import Folder, missing_package_named
from metagen_jax.errors import DataError, UserError, one_line, writing

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""The first tokens of every tokenizer made here, by the names that BERT's have."""

PAD, UNKNOWN, BEGIN, END, MASK = range(len(SPECIAL_TOKENS))

_NUM_BYTES = 256


class Document(NamedTuple):
    """A text as tokens.

    Attributes:
      tokens: of the text.
      begins_word: whether each is the first of a word, as the tokenizer takes words.
    """

    tokens: Int32[np.ndarray, " t"]
    begins_word: Bool[np.ndarray, " t"]


class Rows(NamedTuple):
    """Pieces of documents beside each other in rows of one length, none in two rows.

    Attributes:
      tokens: `PAD` where a row has nothing.
      documents: which piece of the row a token is of, 1, 2, ..., and 0 where there is nothing.
      begins_word: see `Document`; special tokens are words of their own.
      sources: the index of the document that a token comes from, -1 where there is nothing.
    """

    tokens: Int32[np.ndarray, "n t"]
    documents: Int32[np.ndarray, "n t"]
    begins_word: Bool[np.ndarray, "n t"]
    sources: Int32[np.ndarray, "n t"]


class SentencePairs(NamedTuple):
    """Two segments that follow one another, `[CLS] a [SEP] b [SEP]`, and the same two turned round.

    Attributes:
      tokens: in the right order at 0, in the wrong one at 1.
      documents: 1 for tokens, 0 for padding.
      types: 1 for tokens of the segment that stands second and its `[SEP]`, otherwise 0.
      sources: the document that both come from.
    """

    tokens: Int32[np.ndarray, "n 2 t"]
    documents: Int32[np.ndarray, "n 2 t"]
    types: Int32[np.ndarray, "n 2 t"]
    sources: Int32[np.ndarray, " n"]


def train_tokenizer(
    texts: Sequence[str],
    *,
    vocab_size: int,
    level: Literal["bytes", "characters"] = "bytes",
) -> "Tokenizer":
    """A tokenizer made for texts; `SPECIAL_TOKENS` are its first tokens.

    Args:
      texts: to learn from; give no test text.
      vocab_size: how many tokens there are at most, special ones included.
      level: "bytes" begins with the 256 bytes and joins the most frequent pairs within words
        (Sennrich et al. 2016, Radford et al. 2019), so that any text is tokens and can be read off
        them again; "characters" has the most frequent characters, each a word of its own, and
        `UNKNOWN` for others.

    Raises:
      UserError: for a level that is unknown or a vocabulary too small for it.
      DataError: the package `tokenizers` is missing.
    """
    with missing_package_named("a tokenizer"):
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = list(SPECIAL_TOKENS)
    least = len(special) + (_NUM_BYTES if level == "bytes" else 1)
    if vocab_size < least:
        raise UserError(f"vocab_size is {vocab_size}; of {level} give at least {least}")
    if level == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif level == "characters":
        tokenizer = Tokenizer(models.WordLevel(unk_token=special[UNKNOWN]))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        trainer = trainers.WordLevelTrainer(
            vocab_size=vocab_size, special_tokens=special, show_progress=False
        )
    else:
        raise UserError(f'level is {level!r}; give "bytes" or "characters"')
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True  # "[SEP]" in a text is five characters.
    return tokenizer


def save_tokenizer(tokenizer: "Tokenizer", file: Folder) -> None:
    """Writes the JSON of `tokenizers`, which `load_tokenizer` and Hugging Face's programs read.

    Raises:
      UserError: the file can't be written.
    """
    with writing(Path(file)):
        Path(file).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def load_tokenizer(file: Folder) -> "Tokenizer":
    """The tokenizer of a JSON file.

    Raises:
      DataError: the file is no tokenizer or has other special tokens, or the package `tokenizers`
        is missing.
    """
    with missing_package_named("a tokenizer"):
        from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(Path(file).read_text(encoding="utf-8"))
    # The package raises nothing more precise.
    except Exception as error:
        raise DataError(
            f"{file} is no tokenizer ({one_line(error)}); give a file that save_tokenizer has "
            "written"
        ) from None
    found = [tokenizer.id_to_token(i) for i in range(len(SPECIAL_TOKENS))]
    if tuple(found) != SPECIAL_TOKENS:
        raise DataError(
            f"{file} has the first tokens {found}; give a tokenizer that begins with "
            f"{list(SPECIAL_TOKENS)}"
        )
    tokenizer.encode_special_tokens = True  # Its file doesn't say so.
    return tokenizer


def encode(tokenizer: "Tokenizer", texts: Sequence[str]) -> list[Document]:
    """Texts as tokens, without special ones."""
    documents = []
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        words = np.array(encoding.word_ids, np.int32)
        begins = np.concatenate([[True], words[1:] != words[:-1]])[: len(words)]
        documents.append(Document(np.array(encoding.ids, np.int32), begins))
    return documents


def decode(tokenizer: "Tokenizer", tokens: Int[np.ndarray, " t"]) -> str:
    """The text of tokens; special ones are left out."""
    return tokenizer.decode([int(token) for token in tokens])


def pack(
    documents: Sequence[Document],
    *,
    length: int,
    begin: int | None = BEGIN,
    end: int | None = END,
) -> Rows:
    """Documents in as few rows as fit them well: the longest first, each where least room is left.

    A document that is longer than a row is cut into pieces, each a document of its own to a net;
    none is cut otherwise.

    Args:
      documents: from `encode`.
      length: tokens of a row.
      begin: put before each piece; None for nothing.
      end: put after the last piece of each document; None for nothing.

    Raises:
      UserError: for a length with no room for a token beside `begin` and `end`, or no tokens.
    """
    room = length - (begin is not None)
    if room < 1 + (end is not None):
        raise UserError(f"length is {length}; give more, for begin, end and a token between them")
    pieces = []
    for source, document in enumerate(documents):
        tokens, starts = document
        if len(tokens) and end is not None:
            tokens, starts = np.append(tokens, end), np.append(starts, True)
        for first in range(0, len(tokens), room):
            piece, begins_word = tokens[first : first + room], starts[first : first + room]
            if begin is not None:
                piece, begins_word = np.append(begin, piece), np.append(True, begins_word)
            pieces.append((source, piece, begins_word))
    if not pieces:
        raise UserError("the documents have no tokens; give at least one that has some")
    rows = _place([len(piece) for _, piece, _ in pieces], length)
    packed = Rows(
        np.full((len(rows), length), PAD, np.int32),
        np.zeros((len(rows), length), np.int32),
        np.zeros((len(rows), length), bool),
        np.full((len(rows), length), -1, np.int32),
    )
    for row, members in enumerate(rows):
        first = 0
        for number, index in enumerate(members, start=1):
            source, tokens, begins_word = pieces[index]
            place = row, slice(first, first + len(tokens))
            packed.tokens[place] = tokens
            packed.documents[place] = number
            packed.begins_word[place] = begins_word
            packed.sources[place] = source
            first += len(tokens)
    return packed


def _place(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which pieces stand in each row: best fit, the largest first."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # Of each row what room it has, sorted.
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect.bisect_left(rooms, (sizes[index], -1))
        room, row = rooms.pop(at) if at < len(rooms) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        bisect.insort(rooms, (room - sizes[index], row))
    return rows


def sentence_pairs(
    tokenizer: "Tokenizer",
    texts: Sequence[str],
    split: Callable[[str], list[str]],
    *,
    length: int,
    segment_length: int = 1,
) -> SentencePairs:
    """All pairs of segments that follow one another in a text.

    A segment is as many sentences as have at least `segment_length` tokens together, as in section
    3.1 of Lan et al. 2020. Of a pair too long for a row the longer segment loses its end, the same
    in both orders.

    Args:
      tokenizer: of the tokens.
      texts: the documents.
      split: into sentences, such as `metagen_jax.data.corpora.split_sentences`.
      length: tokens of a row, special ones included.
      segment_length: in tokens.

    Raises:
      UserError: for a length below 5, or no text of two segments.
    """
    if length < 5:
        raise UserError(f"length is {length}; give 5 or more, for two tokens and three special")
    pairs, sources = [], []
    for source, text in enumerate(texts):
        segments = _segments([x.tokens for x in encode(tokenizer, split(text))], segment_length)
        for a, b in itertools.pairwise(segments):
            pairs.append(_cut(a, b, length - 3))
            sources.append(source)
    if not pairs:
        raise UserError("no text has two segments; give longer texts or a lower segment_length")
    shape = len(pairs), 2, length
    filled = SentencePairs(
        np.full(shape, PAD, np.int32),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
        np.array(sources, np.int32),
    )
    for i, pair in enumerate(pairs):
        for order, (a, b) in enumerate((pair, pair[::-1])):
            row = np.concatenate([[BEGIN], a, [END], b, [END]])
            filled.tokens[i, order, : len(row)] = row
            filled.documents[i, order, : len(row)] = 1
            filled.types[i, order, len(a) + 2 : len(row)] = 1
    return filled


def _segments(sentences: list[np.ndarray], least: int) -> list[np.ndarray]:
    """Sentences joined until they have so many tokens; what is left over is dropped."""
    segments, pending = [], np.zeros(0, np.int32)
    for sentence in sentences:
        pending = np.concatenate([pending, sentence])
        if len(pending) >= least:
            segments.append(pending)
            pending = pending[:0]
    return segments


def _cut(a: np.ndarray, b: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """The beginnings of two segments that together have room, cut off the longer one first."""
    of_a = min(len(a), max(room - len(b), room // 2))
    return a[:of_a], b[: room - of_a]
