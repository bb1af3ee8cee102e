"""Pictures: what they say is right, and all of it is on the picture and legible."""

import subprocess
import sys

import matplotlib
import matplotlib.colors
import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

from metagen_jax.evaluation.estimates import estimate
from metagen_jax.evaluation.plots import plot_adaptation, plot_episode, plot_learning_curve
from metagen_jax.types import Episode


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, in place of their files."""
    figures = []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, path, **_: figures.append(self)
    )
    return figures


def an_episode(num_ways, num_shots, num_queries, channels=1, dtype=np.float32):
    rng = np.random.default_rng(0)

    def part(count):
        images = rng.uniform(size=(num_ways * count, 8, 8, channels))
        if dtype == np.uint8:
            images = 255 * images
        return images.astype(dtype), np.repeat(np.arange(num_ways), count)

    return Episode(part(num_shots), part(num_queries))


def with_errors(episode, *indices):
    """The true labels, but the next class at some indices."""
    predicted = episode.query[1].copy()
    predicted[list(indices)] = (predicted[list(indices)] + 1) % (predicted.max() + 1)
    return predicted


def texts(figure):
    return [t.get_text() for axes in figure.axes for t in axes.texts if t.get_text()]


def assert_legible(figure):
    """No text is cut off and none lies over another."""
    figure.draw_without_rendering()
    shown = [t for axes in figure.axes for t in axes.texts if t.get_text()]
    boxes = [t.get_window_extent() for t in shown]
    for text, box in zip(shown, boxes, strict=True):
        inside = figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        inside &= figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
        assert inside, f"{text.get_text()!r} is cut off"
    for i, box in enumerate(boxes):
        for j in range(i):
            both = repr((shown[i].get_text(), shown[j].get_text()))
            assert not box.padded(-1).overlaps(boxes[j].padded(-1)), f"{both} overlap"


def num_frames(figure, colour):
    lines = figure.axes[0].lines
    return sum(matplotlib.colors.same_color(line.get_color(), colour) for line in lines)


def test_an_episode_is_counted_and_its_errors_marked(drawn):
    episode = an_episode(5, 1, 5)
    plot_episode(episode, with_errors(episode, 3, 24), "x.png", what="letters")
    (figure,) = drawn
    said = texts(figure)
    assert "5-way 1-shot episode of letters: 23 of 25 right" in said
    assert "predicted 2,\nis 1" in said
    assert "predicted 1,\nis 5" in said
    assert sum(text.startswith("predicted") for text in said) == 2
    assert not any(text.startswith("Drawn") for text in said)
    assert (num_frames(figure, "#C8102E"), num_frames(figure, "#009E73")) == (2, 23)
    assert len(figure.axes[0].images) == 5 + 25
    assert_legible(figure)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((5, 1, 15), "Drawn: 10 of 15 queries of each class."),
        ((5, 5, 6), None),
        (
            (20, 5, 15),
            "Drawn: 10 of 20 classes, those with errors first, 6 of 15 queries of each class.",
        ),
        (
            (2, 7, 7),
            "Drawn: 5 of 7 support examples of each class, 6 of 7 queries of each class.",
        ),
    ],
)
def test_what_is_not_drawn_is_said(drawn, size, expected):
    episode = an_episode(*size)
    plot_episode(episode, with_errors(episode, 0, 1), "x.png")
    notes = [text for text in texts(drawn[0]) if text.startswith("Drawn")]
    assert notes == ([expected] if expected else [])
    num_queries = size[0] * size[2]
    assert f": {num_queries - 2} of {num_queries} right" in texts(drawn[0])[0]
    assert_legible(drawn[0])


def test_classes_with_errors_are_drawn_before_others(drawn):
    episode = an_episode(20, 1, 1)
    plot_episode(episode, with_errors(episode, 18), "x.png")
    said = texts(drawn[0])
    assert "class 19" in said
    assert sum(text.startswith("predicted") for text in said) == 1
    assert num_frames(drawn[0], "#C8102E") == 1


def test_long_class_names_are_shortened_to_fit(drawn):
    episode = an_episode(3, 1, 10, channels=3)
    names = ["a sulphur-crested cockatoo", "widescreen monitors", "mushrooms"]
    predicted = (episode.query[1] + 1) % 3
    plot_episode(episode, predicted, "x.png", class_names=names)
    assert "predicted\nwidescreen…" in texts(drawn[0])
    assert_legible(drawn[0])


@pytest.mark.parametrize("ink", ["low", "high"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_ink_is_drawn_dark_on_white(drawn, ink, dtype):
    episode = an_episode(2, 1, 1, dtype=dtype)
    white = 255 if dtype == np.uint8 else 1
    images = np.zeros_like(episode.support[0]) if ink == "high" else white + 0 * episode.support[0]
    images[:, 4] = white - images[:, 4]
    episode = Episode((images, episode.support[1]), (images, episode.query[1]))
    plot_episode(episode, episode.query[1], "x.png", ink=ink)
    for image in drawn[0].axes[0].images:
        pixels = np.asarray(image.get_array())
        assert pixels[4].max() == 0
        assert np.delete(pixels, 4, axis=0).min() == 1


def test_normalised_colours_are_brought_into_range(drawn):
    episode = an_episode(2, 1, 1, channels=3)
    shifted = Episode(*((10 * images - 5, labels) for images, labels in episode))
    plot_episode(shifted, shifted.query[1], "x.png")
    pixels = np.stack([np.asarray(image.get_array()) for image in drawn[0].axes[0].images])
    assert pixels.min() == 0
    np.testing.assert_allclose(pixels.max(), 1, rtol=1e-6)


@pytest.mark.usefixtures("ill_typed")
def test_predictions_must_match_the_queries():
    episode = an_episode(5, 1, 5)
    with pytest.raises(ValueError, match=r"shape \(25, 5\) for 25 queries"):
        plot_episode(episode, np.zeros((25, 5)), "x.png")


def test_the_learning_curve_smooths_training_and_names_the_best_validation(drawn):
    validation = [{"step": s, "validation_accuracy": a} for s, a in [(50, 0.9), (100, 0.8)]]
    training = [
        {"step": i, "loss": 2 / i + i % 2, "accuracy": 1 - 1 / i, "gradient_norm": 1.0}
        for i in range(1, 101)
    ]
    plot_learning_curve([*training, *validation], "x.png", title="A run")
    (figure,) = drawn
    loss, accuracy = figure.axes
    raw, smooth = (line.get_ydata() for line in loss.lines)
    steps = np.arange(1, 101)
    np.testing.assert_allclose(raw, 2 / steps + steps % 2)
    expected = [raw[max(0, i - 2) : i + 3].mean() for i in range(100)]
    np.testing.assert_allclose(smooth, expected)
    np.testing.assert_array_equal(accuracy.lines[2].get_xydata(), [[50, 90], [100, 80]])
    np.testing.assert_array_equal(accuracy.lines[3].get_xydata(), [[50, 90]])
    assert "validation\nbest 90.0 %" in texts(figure)
    assert_legible(figure)


def test_the_best_validation_loss_is_the_lowest_and_missing_values_are_left_out(drawn):
    given = [{"step": s, "validation_loss": x} for s, x in [(1, 3.0), (2, None), (3, 0.5), (4, 1)]]
    plot_learning_curve(given, "x.png")
    (axes,) = drawn[0].axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 3], [3, 0.5], [4, 1]])
    np.testing.assert_array_equal(axes.lines[1].get_xydata(), [[3, 0.5]])
    assert texts(drawn[0]) == ["validation\nbest 0.5"]


def test_a_learning_curve_needs_records():
    with pytest.raises(ValueError, match="none of the 1 records has a loss or an accuracy"):
        plot_learning_curve([{"step": 3}], "x.png")


def test_adaptation_shows_means_intervals_and_levels_with_legible_labels(drawn):
    rng = np.random.default_rng(0)
    curves = {f"learner {i}": estimate(0.9 + 0.01 * rng.uniform(size=(50, 4))) for i in range(4)}
    curves["nearest neighbour"] = estimate(0.1 * rng.uniform(size=50))
    plot_adaptation(curves, "x.png", chance=0.05)
    (figure,) = drawn
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), 100 * curves["learner 0"].mean)
    bar = axes.collections[0].get_segments()[3][:, 1]
    mean, interval = (100 * x[3] for x in curves["learner 0"][:2])
    np.testing.assert_allclose(bar, [mean - interval, mean + interval])
    said = texts(figure)
    assert f"learner 0  {mean:.1f} ± {interval:.1f} %" in said
    assert "guessing  5 %" in said
    assert "at the right: after the last" in axes.get_xlabel()
    assert len(said) == 6
    assert_legible(figure)


def test_adaptation_needs_curves():
    with pytest.raises(ValueError, match="curves is empty"):
        plot_adaptation({}, "x.png")


_DRAW_WITHOUT_PYPLOT = """
import sys
import numpy as np
from metagen_jax.evaluation import plots
assert "matplotlib" not in sys.modules
images, labels = np.random.default_rng(0).uniform(size=(5, 8, 8, 1)), np.arange(5)
plots.plot_episode(((images, labels), (images, labels)), labels, sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
"""


def test_draws_a_file_without_pyplot(tmp_path):
    path = tmp_path / "episode.png"
    command = [sys.executable, "-c", _DRAW_WITHOUT_PYPLOT, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(path) as picture:
        assert 900 <= picture.width <= 1500
        assert np.asarray(picture.convert("L")).std() > 10
