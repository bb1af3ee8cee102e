"""The picture of likelihoods by shots."""

import numpy as np
import pytest
from PIL import Image

from metagen_jax.evaluation.estimates import estimate
from metagen_jax.evaluation.shot_curves import plot_nll_by_shots

pytest.importorskip("matplotlib")


def test_a_picture_is_drawn_with_and_without_published_figures(tmp_path):
    rng = np.random.default_rng(0)
    curves = {"a model": {n: estimate(rng.normal(90 - n, 3, 50)) for n in (0, 1, 4)}}
    plain, more = tmp_path / "plain.png", tmp_path / "more.png"
    plot_nll_by_shots(curves, plain, title="A title")
    plot_nll_by_shots(curves, more, title="A title", published={"another": {0: 91.0, 4: 80.0}})
    renamed = tmp_path / "renamed.png"
    plot_nll_by_shots(curves, renamed, title="A title", seen="recordings heard")
    assert np.any(np.asarray(Image.open(renamed)) != np.asarray(Image.open(plain)))
    one, other = (np.asarray(Image.open(path)) for path in (plain, more))
    assert one.shape == other.shape
    assert np.any(one != other)
