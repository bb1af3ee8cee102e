"""Features on a plane, a colour for each class."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from metagen_jax.evaluation.figures import COLOURS, File, new_figure, save
from metagen_jax.similarity import unit_rows


def principal_plane(features: Float[np.ndarray, "n features"]) -> Float[np.ndarray, "n 2"]:
    """The two directions in which features of length 1 vary most; one of theirs gives zeros."""
    unit = np.asarray(unit_rows(jnp.asarray(features)))
    centred = unit - unit.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    places = centred @ directions[:2].T
    return np.pad(places, ((0, 0), (0, 2 - places.shape[1])))


def plot_feature_map(
    features: Float[np.ndarray, "n features"],
    labels: Int[np.ndarray, " n"],
    path: File,
    *,
    title: str,
    class_names: Sequence[str] | None = None,
) -> None:
    """Features on their `principal_plane`, the six most frequent classes in colours.

    Args:
      features: `(n, features)`.
      labels: `(n,)`; of equally frequent classes the first are shown.
      path: the picture to write; its suffix is the format.
      title: of the picture.
      class_names: by label; None for "class 0", "class 1", ...
    """
    places = principal_plane(features)
    classes, counts = np.unique(labels, return_counts=True)
    shown = classes[np.argsort(-counts, kind="stable")][: len(COLOURS)]
    figure = new_figure(max(6.0, 0.1 * len(title)), 5.0, title)
    axes = figure.subplots()
    for colour, label in zip(COLOURS, shown, strict=False):
        of_class = labels == label
        name = f"class {label}" if class_names is None else class_names[label]
        axes.scatter(*places[of_class].T, s=8, color=colour, label=name)
    axes.legend(frameon=False)
    axes.set_xticks([])
    axes.set_yticks([])
    save(figure, path)
