import unicodedata
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.ft2font import FT2Font  # noqa: E402
from PIL import ImageFont  # noqa: E402

from metagen_jax.data import frozen_classes, glyphs  # noqa: E402
from metagen_jax.data.glyphs import FACES, draw_letter, render_glyphs  # noqa: E402

PARTS = ("train", "val", "test")
ALL_NAMES = [name for part in PARTS for name in frozen_classes("glyphs", part)]
SOME_NAMES = ALL_NAMES[::40]
FILES = [Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf" for face in FACES]


@pytest.fixture(scope="module")
def pictures():
    return render_glyphs(SOME_NAMES)


@pytest.fixture(scope="module")
def shapes_of_letters():
    """The classes of the README, derived again: sets of letters that share a shape in some face."""
    common = set.intersection(*({*FT2Font(str(file)).get_charmap()} for file in FILES))
    letters = sorted(chr(code) for code in common if unicodedata.category(chr(code))[0] == "L")
    assert len(letters) == 1511
    alike = {letter: {letter} for letter in letters}
    for file in FILES:
        font = ImageFont.truetype(file, 100, layout_engine=ImageFont.Layout.BASIC)
        same_ink = defaultdict(list)
        for letter in letters:
            ink = draw_letter(letter, font)
            same_ink[ink.size, ink.tobytes()].append(letter)
        for first, *others in same_ink.values():
            for other in others:
                joined = alike[first] | alike[other]
                alike.update(dict.fromkeys(joined, joined))
    return {frozenset(group) for group in alike.values()}


def test_classes_are_all_common_letters_with_those_of_one_shape_merged(shapes_of_letters):
    first_of_each = sorted(unicodedata.name(min(group)) for group in shapes_of_letters)
    assert sorted(ALL_NAMES) == first_of_each
    assert len(ALL_NAMES) == 1338


def test_letters_with_one_base_are_in_one_split(shapes_of_letters):
    split_of_name = {n: part for part in PARTS for n in frozen_classes("glyphs", part)}
    splits_of_base = defaultdict(set)
    for group in shapes_of_letters:
        split = split_of_name[unicodedata.name(min(group))]
        for letter in group:
            base = unicodedata.normalize("NFKD", letter)[0].casefold()
            splits_of_base[unicodedata.normalize("NFKD", base)[0]].add(split)
    assert {base: splits for base, splits in splits_of_base.items() if len(splits) > 1} == {}


def test_pictures_are_dark_ink_on_white_paper_that_touches_no_edge(pictures):
    assert pictures.shape == (len(SOME_NAMES), 20, 28, 28, 1)
    assert pictures.dtype == np.uint8
    edges = [pictures[:, :, [0, -1]], pictures[:, :, :, [0, -1]]]
    assert all((edge == 255).all() for edge in edges)
    assert (pictures.min((2, 3, 4)) < 160).all()
    assert np.median(pictures) == 255


def test_no_two_pictures_are_equal(pictures):
    flat = pictures.reshape(-1, 28 * 28)
    assert len(np.unique(flat, axis=0)) == len(flat)


def test_pictures_depend_on_the_seed_alone(pictures):
    np.testing.assert_array_equal(render_glyphs(SOME_NAMES), pictures)
    assert (render_glyphs(SOME_NAMES, seed=1) != pictures).any((1, 2, 3, 4)).all()


@pytest.mark.parametrize("size", [16, 28, 64])
def test_without_jitter_example_i_is_face_i_mod_12_centred(size, monkeypatch):
    for bound in ("_MAX_ROTATION", "_MAX_LOG_SCALE", "_MAX_SHEAR", "_MAX_SHIFT"):
        monkeypatch.setattr(glyphs, bound, 0.0)
    ink = 255.0 - render_glyphs(SOME_NAMES[:8], size=size)[..., 0]
    np.testing.assert_array_equal(ink[:, 12:], ink[:, :8])
    assert (ink[:, 0] != ink[:, 1]).any((1, 2)).all()
    for axis in (2, 3):
        inked = ink.any(5 - axis)
        before, after = inked.argmax(-1), inked[..., ::-1].argmax(-1)
        assert (np.abs(before - after) <= 1).all()


def test_jitter_moves_centres_little_and_keeps_the_ink_off_the_margin():
    rng = np.random.default_rng(0)
    side, scale = 56, 2
    jitter = rng.uniform(-1, 1, (500, 5))
    ink = rng.uniform(2, 160, (500, 2))
    for inverse, (width, height) in zip(glyphs._affine(jitter, ink, scale, side), ink, strict=True):
        to_letter = np.vstack([np.reshape(inverse, (2, 3)), [0, 0, 1]])
        corners = np.array([[x, y, 1] for x in (0, width) for y in (0, height)])
        in_picture = (np.linalg.inv(to_letter) @ corners.T)[:2]
        assert in_picture.min() >= side / 28 - 1e-9
        assert in_picture.max() <= side - side / 28 + 1e-9
        shift = in_picture.mean(1) - side / 2
        assert np.abs(shift).max() <= 1.5 / 28 * side + 1e-9


def test_jitter_turns_scales_and_shears_as_far_as_said():
    extreme = np.array([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]], float)
    maps = [np.reshape(m, (2, 3))[:, :2] for m in glyphs._affine(extreme, np.ones((3, 2)), 1, 28)]
    turn, grow, shear = (np.linalg.inv(m) for m in maps)
    tenth = np.deg2rad(10)
    np.testing.assert_allclose(
        turn, [[np.cos(tenth), -np.sin(tenth)], [np.sin(tenth), np.cos(tenth)]], atol=1e-12
    )
    np.testing.assert_allclose(grow, np.exp(0.1) * np.eye(2), atol=1e-12)
    np.testing.assert_allclose(shear, [[1, 0.15], [0, 1]], atol=1e-12)


def test_progress_counts_letters():
    calls = []
    render_glyphs(SOME_NAMES[:3], progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
