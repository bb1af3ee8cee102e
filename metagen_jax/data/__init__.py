"""Data: image sets as arrays, splits by class, episodes drawn on the device.

Importing this loads neither TFDS nor Pillow nor matplotlib; `load_images` does when it needs them.
"""

from metagen_jax.data.classes import FROZEN_SPLITS as FROZEN_SPLITS
from metagen_jax.data.classes import ClassSplit as ClassSplit
from metagen_jax.data.classes import LabelledImages as LabelledImages
from metagen_jax.data.classes import frozen_classes as frozen_classes
from metagen_jax.data.classes import select_classes as select_classes
from metagen_jax.data.classes import split_classes as split_classes
from metagen_jax.data.episodes import ClassData as ClassData
from metagen_jax.data.episodes import check_episodes as check_episodes
from metagen_jax.data.episodes import group_by_class as group_by_class
from metagen_jax.data.episodes import sample_episode as sample_episode
from metagen_jax.data.glyphs import render_glyphs as render_glyphs
from metagen_jax.data.set_episodes import sample_set_episode as sample_set_episode
from metagen_jax.data.sources import load_images as load_images
from metagen_jax.errors import DataError as DataError
