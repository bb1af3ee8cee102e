"""Features on a plane: by hand, and that the picture is drawn."""

import numpy as np

from metagen_jax.evaluation.feature_maps import plot_feature_map, principal_plane


def test_the_plane_is_that_of_the_largest_variance():
    rng = np.random.default_rng(0)
    angles = rng.uniform(-0.3, 0.3, 50)
    on_circle = np.stack([np.cos(angles), np.sin(angles), np.zeros(50)], 1).astype(np.float32)
    places = principal_plane(on_circle * rng.uniform(1, 9, (50, 1)).astype(np.float32))
    along = on_circle[:, 1] - on_circle[:, 1].mean()
    assert abs(np.corrcoef(places[:, 0], along)[0, 1]) > 0.999
    assert places[:, 0].std() > 5 * places[:, 1].std()
    np.testing.assert_array_equal(principal_plane(np.ones((4, 1), np.float32)), 0)


def test_a_map_is_drawn_of_many_classes_and_of_one(tmp_path):
    features = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    for name, labels in (("many", np.arange(30) % 9), ("one", np.zeros(30, int))):
        file = tmp_path / f"{name}.png"
        plot_feature_map(features, labels, file, title="a map", class_names=[*"abcdefghi"])
        assert file.stat().st_size > 1000
