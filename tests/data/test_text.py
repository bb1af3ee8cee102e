"""Tokens of texts and back; documents in rows, none lost or torn; pairs of segments by hand."""

import json

import numpy as np
import pytest

from metagen_jax.data.corpora import split_sentences
from metagen_jax.data.text import (
    BEGIN,
    END,
    PAD,
    SPECIAL_TOKENS,
    UNKNOWN,
    Document,
    decode,
    encode,
    load_tokenizer,
    pack,
    save_tokenizer,
    sentence_pairs,
    train_tokenizer,
)
from metagen_jax.errors import DataError, UserError

TEXTS = ["the cat sat on the mat", "the dog sat on the cat. The mat?", "a dog, a cat: the end"] * 3
STRANGE = "naïve 漢字\n\ttab 😀 [SEP] [MASK]"


@pytest.fixture(scope="module", params=["bytes", "characters"])
def tokenizer(request):
    return train_tokenizer(TEXTS, vocab_size=280, level=request.param)


def test_special_tokens_come_first_and_bytes_can_say_anything(tokenizer):
    for token, name in enumerate(SPECIAL_TOKENS):
        assert tokenizer.id_to_token(token) == name
    (document,) = encode(tokenizer, [TEXTS[1]])
    assert decode(tokenizer, document.tokens) == TEXTS[1]
    (strange,) = encode(tokenizer, [STRANGE])
    if tokenizer.get_vocab_size() > 200:
        assert decode(tokenizer, strange.tokens) == STRANGE
        assert UNKNOWN not in strange.tokens
    else:
        assert (strange.tokens == UNKNOWN).sum() > 3


def test_pairs_are_joined_by_how_often_they_stand_together():
    """By hand: of "ab ab abc" the pair (a, b) is the most frequent, then (Ġ, ab)."""
    tokenizer = train_tokenizer(["ab ab abc"], vocab_size=5 + 256 + 2)
    (document,) = encode(tokenizer, ["abc ab"])
    assert [tokenizer.id_to_token(int(t)) for t in document.tokens] == ["ab", "c", "Ġab"]
    np.testing.assert_array_equal(document.begins_word, [True, False, True])
    assert document.tokens[0] == 261
    assert document.tokens[2] == 262


def test_each_character_is_a_word():
    tokenizer = train_tokenizer(["ab a"], vocab_size=8, level="characters")
    (document,) = encode(tokenizer, ["a b\nc"])
    assert document.begins_word.all()
    names = [tokenizer.id_to_token(int(t)) for t in document.tokens]
    assert names == ["a", " ", "b", "[UNK]", "[UNK]"]


def test_a_tokenizer_is_what_its_file_holds(tokenizer, tmp_path):
    file = tmp_path / "tokenizer.json"
    save_tokenizer(tokenizer, file)
    assert json.loads(file.read_text(encoding="utf-8"))["added_tokens"][END]["content"] == "[SEP]"
    again = load_tokenizer(file)
    for document, other in zip(encode(tokenizer, TEXTS), encode(again, TEXTS), strict=True):
        np.testing.assert_array_equal(document.tokens, other.tokens)
    file.write_text("{}")
    with pytest.raises(DataError, match="is no tokenizer"):
        load_tokenizer(file)
    other = json.loads(tokenizer.to_str())
    other["added_tokens"][0]["content"] = "[GAP]"
    other["model"]["vocab"]["[GAP]"] = other["model"]["vocab"].pop("[PAD]")
    file.write_text(json.dumps(other))
    with pytest.raises(DataError, match="give a tokenizer that begins with"):
        load_tokenizer(file)


def random_documents(sizes):
    rng = np.random.default_rng(0)
    return [
        Document(
            rng.integers(5, 50, size).astype(np.int32),
            np.concatenate([[True], rng.random(size - 1) < 0.5]) if size else np.zeros(0, bool),
        )
        for size in sizes
    ]


def pieces_of(rows):
    """The tokens of all pieces in rows, with the beginnings of words, by document."""
    found = {}
    for tokens, numbers, starts, sources in zip(*rows, strict=True):
        assert (tokens[numbers == 0] == PAD).all()
        assert (sources[numbers == 0] == -1).all()
        for number in range(1, numbers.max() + 1):
            (where,) = np.nonzero(numbers == number)
            assert (np.diff(where) == 1).all()
            (source,) = set(sources[where])
            found.setdefault(int(source), []).append((list(tokens[where]), list(starts[where])))
    return found


@pytest.mark.parametrize(("begin", "end"), [(BEGIN, END), (None, END), (None, None)])
def test_packed_documents_can_be_read_off_their_rows(begin, end):
    length = 12
    documents = random_documents([3, 30, 12, 0, 1, 7, 10, 11, 2, 2, 5])
    found = pieces_of(pack(documents, length=length, begin=begin, end=end))
    assert sorted(found) == [i for i, document in enumerate(documents) if len(document.tokens)]
    room = length - (begin is not None)
    for source, pieces in found.items():
        tokens, starts = map(list, documents[source])
        if end is not None:
            tokens, starts = [*tokens, end], [*starts, True]
        expected = []
        for first in range(0, len(tokens), room):
            piece = tokens[first : first + room], starts[first : first + room]
            if begin is not None:
                piece = [begin, *piece[0]], [True, *piece[1]]
            expected.append(piece)
        assert sorted(pieces) == sorted(expected)


def test_rows_are_filled_well():
    rows = pack(random_documents([6, 4, 5, 5, 7, 3, 1, 9]), length=10, begin=None, end=None)
    assert rows.tokens.shape == (4, 10)
    assert (rows.documents > 0).all()
    # The longest first, each where least room is left: 9 and 1, 7 and 3, 6 and 4, 5 and 5.
    np.testing.assert_array_equal((rows.documents == 1).sum(1), [9, 7, 6, 5])


def test_pairs_of_segments_by_hand():
    tokenizer = train_tokenizer(["abcdefgh. "], vocab_size=20, level="characters")
    a, b, c, d, dot = (tokenizer.token_to_id(x) for x in "abcd.")
    texts = ["a. b. cc. d.", "a."]
    pairs = sentence_pairs(tokenizer, texts, split_sentences, length=8)
    np.testing.assert_array_equal(pairs.sources, [0, 0, 0])
    right = [BEGIN, a, dot, END, b, dot, END, PAD]
    np.testing.assert_array_equal(pairs.tokens[0, 0], right)
    np.testing.assert_array_equal(pairs.tokens[0, 1], [BEGIN, b, dot, END, a, dot, END, PAD])
    np.testing.assert_array_equal(pairs.documents[0, 0], [1, 1, 1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(pairs.types[0, 0], [0, 0, 0, 0, 1, 1, 1, 0])
    np.testing.assert_array_equal(pairs.tokens[1, 1], [BEGIN, c, c, dot, END, b, dot, END])
    np.testing.assert_array_equal(pairs.types[1, 1], [0, 0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(pairs.tokens[2, 0], [BEGIN, c, c, dot, END, d, dot, END])
    # Segments of at least 4 tokens, "a.b." and "cc.d.": each is cut to what half a row holds.
    (longer,) = sentence_pairs(tokenizer, texts, split_sentences, length=8, segment_length=4).tokens
    np.testing.assert_array_equal(longer[0], [BEGIN, a, dot, END, c, c, dot, END])
    # A short one stays as it is.
    cut = sentence_pairs(tokenizer, ["a. bbbbbbb."], split_sentences, length=8).tokens[0]
    np.testing.assert_array_equal(cut[1], [BEGIN, b, b, b, END, a, dot, END])


@pytest.mark.usefixtures("ill_typed")
def test_says_what_is_needed():
    for call, message in (
        (lambda: train_tokenizer(TEXTS, vocab_size=260), "of bytes give at least 261"),
        (lambda: train_tokenizer(TEXTS, vocab_size=300, level="words"), "level is 'words'; give"),
        (lambda: pack(random_documents([3]), length=2), "length is 2; give more"),
        (lambda: pack(random_documents([0]), length=9), "the documents have no tokens"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    tokenizer = train_tokenizer(["ab. "], vocab_size=9, level="characters")
    with pytest.raises(UserError, match="length is 4; give 5 or more"):
        sentence_pairs(tokenizer, TEXTS, split_sentences, length=4)
    with pytest.raises(UserError, match="no text has two segments"):
        sentence_pairs(tokenizer, ["a."], split_sentences, length=9)
