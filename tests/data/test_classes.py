import numpy as np
import pytest

from metagen_jax.data import (
    FROZEN_SPLITS,
    DataError,
    LabelledImages,
    frozen_classes,
    select_classes,
    split_classes,
)


def labelled(num_classes=12, num_examples=50, seed=0):
    """Examples in random order whose picture tells the name of their class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_examples).astype(np.int32)
    images = np.full((num_examples, 2, 3, 1), labels[:, None, None, None], np.uint8)
    return LabelledImages(images, labels, tuple(f"class {i}" for i in range(num_classes)))


def names_in_pictures(data):
    return [f"class {image[0, 0, 0]}" for image in data.images]


def names_by_label(data):
    return [data.class_names[label] for label in data.labels]


@pytest.mark.parametrize(
    ("name", "scheme", "sizes"),
    [
        ("omniglot", "vinyals/", (1028, 172, 423)),
        ("omniglot", "lake/", (883, 81, 659)),
        ("omniglot", "random1200/", (1100, 100, 423)),
        ("omniglot", "random1000/", (1000, 200, 423)),
        ("omniglot", "alphabets45/", (1398, 81, 144)),
        ("glyphs", "", (1000, 138, 200)),
    ],
)
def test_frozen_splits_have_the_published_sizes_and_share_no_class(name, scheme, sizes):
    train, val, test = (frozen_classes(name, scheme + part) for part in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == sizes
    assert len({*train, *val, *test}) == sum(sizes)
    assert frozen_classes(name, scheme + "trainval") == train + val


def test_all_omniglot_splits_are_of_the_same_characters():
    wholes = [
        {*frozen_classes("omniglot", f"{s}/trainval"), *frozen_classes("omniglot", f"{s}/test")}
        for s in ("vinyals", "lake", "random1200", "random1000", "alphabets45")
    ]
    assert all(whole == wholes[0] for whole in wholes)


@pytest.mark.parametrize(("scheme", "sizes"), [("lake", (25, 5, 20)), ("alphabets45", (40, 5, 5))])
def test_splits_of_alphabets_share_no_alphabet(scheme, sizes):
    alphabets = [
        {name.rpartition("_")[0] for name in frozen_classes("omniglot", f"{scheme}/{part}")}
        for part in ("train", "val", "test")
    ]
    assert tuple(map(len, alphabets)) == sizes
    assert len(set.union(*alphabets)) == 50


def test_vinyals_split_is_the_list_of_prototypical_networks_without_rotations(data_dir):
    folder = data_dir / "splits" / "omniglot_vinyals"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    for part in FROZEN_SPLITS["glyphs"]:
        lines = [line.split("/") for line in (folder / f"{part}.txt").read_text().split()]
        expected = [
            (f"{alphabet}_{int(character.removeprefix('character')) - 1}", rotation)
            for alphabet, character, rotation in lines
        ]
        names = frozen_classes("omniglot", f"vinyals/{part}")
        rotated = [(name, f"rot{turn:03d}") for name in names for turn in (0, 90, 180, 270)]
        assert sorted(expected) == sorted(rotated)


@pytest.mark.parametrize(("name", "split"), [("omniglot", "vinyals/dev"), ("mnist", "train")])
def test_unknown_frozen_split_lists_those_there_are(name, split):
    with pytest.raises(DataError, match=r"no frozen split .*(lake/val|glyphs)"):
        frozen_classes(name, split)


def test_select_classes_keeps_each_picture_with_its_name_and_order():
    data = labelled()
    chosen = ("class 7", "class 0", "class 11")
    selected = select_classes(data, chosen)
    expected = [name for name in names_by_label(data) if name in chosen]
    assert names_by_label(selected) == names_in_pictures(selected) == expected
    assert selected.class_names == chosen
    assert selected.labels.dtype == np.int32


@pytest.mark.parametrize(
    ("chosen", "message"),
    [(["class 1", "class 99"], "'class 99' is not among"), (["class 1"] * 2, "given twice")],
)
def test_select_classes_refuses_names_that_are_unknown_or_repeated(chosen, message):
    with pytest.raises(DataError, match=message):
        select_classes(labelled(), chosen)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (7, 3, 2)),
        ({"fractions": (0.5, 0.25, 0.25)}, (6, 3, 3)),
        ({"fractions": (0.5, 0.0, 0.25)}, (6, 0, 3)),
        ({"counts": (5, 4, 3)}, (5, 4, 3)),
        ({"counts": (1, 0, 1)}, (1, 0, 1)),
    ],
)
def test_split_classes_gives_disjoint_classes_in_the_sizes_asked_for(sizes, expected):
    parts = split_classes(labelled(), **sizes)
    assert tuple(len(part.class_names) for part in parts) == expected
    assert len({name for part in parts for name in part.class_names}) == sum(expected)
    for part in parts:
        assert names_by_label(part) == names_in_pictures(part)


def test_split_classes_depends_on_names_and_seed_alone():
    parts = split_classes(labelled(), counts=(4, 4, 4))
    numbers = [[int(name.split()[1]) for name in part.class_names] for part in parts]
    # Written down, so that a platform or a NumPy that splits otherwise fails here.
    assert numbers == [[2, 4, 8, 9], [1, 10, 5, 6], [0, 11, 3, 7]]
    data = labelled(seed=1)
    reversed_names = LabelledImages(data.images, 11 - data.labels, data.class_names[::-1])
    for part, same in zip(parts, split_classes(reversed_names, counts=(4, 4, 4)), strict=True):
        assert part.class_names == same.class_names
    assert parts.train.class_names != split_classes(labelled(), seed=1).train.class_names


@pytest.mark.parametrize(
    ("num_classes", "fractions", "message"),
    [
        (2, (0.6, 0.2, 0.2), "have 2 classes, .* none for test; give data of more classes"),
        (3, (0.6, 0.2, 0.2), "have 3 classes, .* none for val; give data of more classes"),
        (2, (0.75, 0.0, 0.25), "none for test; give data of more classes"),
        (2, (0.1, 0.1, 0.7), "none for train and val; give data of more classes"),
    ],
)
def test_split_classes_refuses_too_few_classes_for_all_parts(num_classes, fractions, message):
    with pytest.raises(DataError, match=message):
        split_classes(labelled(num_classes), fractions=fractions)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fractions": (0.8, 0.2, 0.1)}, "fractions are .* sum 1 at most"),
        ({"fractions": (0.8, -0.2, 0.1)}, "fractions are"),
        ({"counts": (10, 2, 1)}, "counts are .* sum 12 at most"),
    ],
)
def test_split_classes_refuses_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(DataError, match=message):
        split_classes(labelled(), **sizes)
