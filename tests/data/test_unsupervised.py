"""UMTRA and CACTUs: episodes without labels, and the clusters behind them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.data import unsupervised
from metagen_jax.data.augment import drop_pixels, random_affine
from metagen_jax.data.episodes import check_episodes
from metagen_jax.data.unsupervised import (
    cluster_classes,
    cluster_labels,
    partition_classes,
    sample_cluster_episode,
    umtra_episode,
    whiten,
)
from metagen_jax.errors import UserError

KEY = jax.random.key(0)


def numbered_pictures(count=7):
    """Pictures that are their own number."""
    return jnp.broadcast_to(
        jnp.arange(count, dtype=jnp.float32)[:, None, None, None], (count, 2, 2, 1)
    )


def add_noise(key, image):
    return image + jax.random.uniform(key, image.shape, maxval=0.5)


def blobs(num_blobs=4, size=30, spread=0.1, seed=0):
    """Points around corners far from one another, in random order, and the numbers of these."""
    rng = np.random.default_rng(seed)
    centres = 10.0 * np.eye(num_blobs, 6)
    labels = rng.permutation(np.repeat(np.arange(num_blobs), size))
    points = centres[labels] + spread * rng.normal(size=(len(labels), 6))
    return points.astype(np.float32), labels


def k_means_in_numpy(points, centres, num_iterations):
    """Lloyd's iterations, a point at a time."""

    def nearest(point):
        return int(np.argmin([((point - centre) ** 2).sum() for centre in centres]))

    centres = np.array(centres, np.float64)
    for _ in range(num_iterations):
        labels = np.array([nearest(point) for point in points])
        for k in range(len(centres)):
            if (labels == k).any():
                centres[k] = points[labels == k].mean(0)
    return np.array([nearest(point) for point in points])


def same_partition(a, b):
    pairs = set(zip(np.asarray(a).tolist(), np.asarray(b).tolist(), strict=True))
    return len(pairs) == len(set(np.asarray(a).tolist())) == len(set(np.asarray(b).tolist()))


def test_umtra_asks_about_changed_copies_of_distinct_pictures():
    sample = functools.partial(umtra_episode, num_ways=4, num_queries=3, augment=add_noise)
    episode = jax.device_get(jax.jit(sample)(KEY, numbered_pictures()))
    (support, support_labels), (query, query_labels) = episode
    np.testing.assert_array_equal(support_labels, range(4))
    np.testing.assert_array_equal(query_labels, np.repeat(range(4), 3))
    assert support_labels.dtype == query_labels.dtype == jnp.int32
    chosen = support[:, 0, 0, 0]
    np.testing.assert_array_equal(support, numbered_pictures()[chosen.astype(int)])
    assert len(set(chosen.tolist())) == 4
    noise = query - support[query_labels]
    assert 0 < noise.min() < noise.max() < 0.5
    assert len(np.unique(noise)) > 40  # every copy and every pixel has a draw of its own


def test_umtra_changes_support_pictures_only_if_asked_to():
    options = {"num_ways": 3, "augment": add_noise}
    plain = umtra_episode(KEY, numbered_pictures(), **options)
    changed = umtra_episode(KEY, numbered_pictures(), augment_support=add_noise, **options)
    noise = changed.support[0] - plain.support[0]
    assert 0 < noise.min() < noise.max() < 0.5
    np.testing.assert_array_equal(changed.query[0], plain.query[0])
    assert not np.allclose(changed.query[0] - plain.support[0], noise)


def test_umtra_draws_every_ordered_choice_of_pictures_equally_often():
    def draw(key):
        episode = umtra_episode(key, numbered_pictures(4), num_ways=2, augment=add_noise)
        return episode.support[0][:, 0, 0, 0]

    draws = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(KEY, 12_000))).astype(int)
    choices, counts = np.unique(draws, axis=0, return_counts=True)
    assert {tuple(c) for c in choices.tolist()} == {*itertools.permutations(range(4), 2)}
    assert ((counts - 1000) ** 2 / 1000).sum() < 31.3  # 11 degrees of freedom, 0.001


@pytest.mark.slow
def test_umtra_under_jit_and_vmap_equals_a_loop_and_keeps_bytes():
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1)).astype(np.uint8)

    def augment(key, image):
        drop_key, affine_key = jax.random.split(key)
        dropped = drop_pixels(drop_key, image, rate=0.5, background=255.0)
        return random_affine(affine_key, dropped, max_shift=2.0, background=255.0)

    sample = functools.partial(umtra_episode, num_ways=3, num_queries=2, augment=augment)
    keys = jax.random.split(KEY, 3)
    together = jax.jit(jax.vmap(sample, in_axes=(0, None)))(keys, images)
    for i, key in enumerate(keys):
        alone = sample(key, jnp.asarray(images))
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            assert a.dtype == b.dtype
            # Rounding may fall to either side.
            np.testing.assert_allclose(a[i].astype(int), b.astype(int), atol=1)
    assert together.query[0].dtype == jnp.uint8


def test_umtra_needs_as_many_pictures_as_ways():
    with pytest.raises(UserError, match="5-way episodes need 5 pictures and there are 4"):
        umtra_episode(KEY, numbered_pictures(4), num_ways=5, augment=add_noise)


def test_k_means_equals_lloyd_s_iterations_in_numpy(monkeypatch):
    """From the same start, with blocks that don't divide the points and centres that go empty."""
    points = np.random.default_rng(0).normal(size=(53, 3)).astype(np.float32)
    start = np.concatenate([points[:4], np.full((1, 3), 50, np.float32)])
    monkeypatch.setattr(unsupervised, "_BLOCK", 10)
    monkeypatch.setattr(unsupervised, "_plus_plus", lambda key, x, k: jnp.asarray(start))
    for num_iterations in (0, 1, 3):
        # Compiled anew, for the start and the blocks above.
        k_means = functools.partial(cluster_labels.__wrapped__, num_clusters=5)
        labels = k_means(KEY, jnp.asarray(points), num_iterations=num_iterations)
        np.testing.assert_array_equal(labels, k_means_in_numpy(points, start, num_iterations))
        assert labels.max() == 3


def test_k_means_finds_well_separated_clusters_from_every_key():
    points, labels = blobs()
    for seed in range(5):
        found = cluster_labels(jax.random.key(seed), jnp.asarray(points), num_clusters=4)
        assert same_partition(found, labels)


def test_a_centre_is_drawn_by_squared_distance():
    """From 0, the point at 1 is drawn one time in ten and that at 3 nine times."""
    points = jnp.array([[0.0], [1.0], [3.0]])
    keys = jax.random.split(KEY, 3000)
    draw = jax.jit(jax.vmap(lambda key: unsupervised._plus_plus(key, points, 2)))
    centres = np.asarray(draw(keys))[..., 0]
    after_zero = centres[centres[:, 0] == 0, 1]
    assert len(after_zero) > 800
    assert set(np.unique(after_zero).tolist()) == {1.0, 3.0}
    assert abs(float((after_zero == 3).mean()) - 0.9) < 0.04


def test_k_means_of_equal_points_is_finite_and_of_as_many_points_as_clusters_exact():
    assert not np.asarray(cluster_labels(KEY, jnp.ones((6, 2)), num_clusters=3)).any()
    labels = cluster_labels(KEY, jnp.asarray(blobs(6, 1)[0]), num_clusters=6)
    assert sorted(labels.tolist()) == [*range(6)]
    with pytest.raises(UserError, match="num_clusters is 7 for 6 embeddings; give 1 to 6"):
        cluster_labels(KEY, jnp.ones((6, 2)), num_clusters=7)


def test_whitened_embeddings_have_mean_zero_and_covariance_one():
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(200, 4)) @ rng.normal(size=(4, 4)) * [1, 10, 100, 1] + 5
    constant = np.concatenate([mixed, np.full((200, 1), 3.0)], axis=1)
    with jax.enable_x64(True):
        white = whiten(jnp.asarray(mixed), epsilon=1e-9)
        np.testing.assert_allclose(white.mean(0), 0, atol=1e-9)
        np.testing.assert_allclose(white.T @ white / 200, np.eye(4), atol=1e-6)
        assert np.isfinite(whiten(jnp.asarray(constant))).all()


@pytest.fixture(scope="module")
def clusters():
    """Four blobs of 30, 30, 30 and 6 points with pictures that tell number and blob."""
    points, labels = blobs()
    keep = np.concatenate([np.flatnonzero(labels < 3), np.flatnonzero(labels == 3)[:6]])
    points, labels = points[keep], labels[keep]
    images = np.stack([np.arange(len(labels)), labels], 1).astype(np.int32)
    data = cluster_classes(
        KEY, images, points, num_partitions=3, num_clusters=4, min_size=10, num_iterations=20
    )
    return data, labels


def test_partitions_keep_whole_clusters_and_drop_small_ones(clusters):
    data, labels = clusters
    assert data.sizes.shape == data.starts.shape == (3, 3)
    np.testing.assert_array_equal(data.sizes, 30)
    for partition in range(3):
        classes = partition_classes(data, partition)
        check_episodes(classes, num_ways=3, num_shots=5, num_queries=25)
        kept = []
        for start, size in zip(classes.starts, classes.sizes, strict=True):
            members = np.asarray(classes.examples[start : start + size])
            assert len(set(labels[members])) == 1
            kept.extend(members.tolist())
        assert sorted(kept) == np.flatnonzero(labels < 3).tolist()


@pytest.mark.slow
def test_cluster_episodes_have_disjoint_pictures_of_distinct_clusters(clusters):
    data, _ = clusters
    sample = functools.partial(sample_cluster_episode, num_ways=3, num_shots=2, num_queries=4)
    keys = jax.random.split(KEY, 20)
    together = jax.device_get(jax.jit(jax.vmap(sample, in_axes=(0, None)))(keys, data))
    alone = sample(keys[7], data)
    np.testing.assert_array_equal(alone.support[0], together.support[0][7])
    for i in range(20):
        (support, support_labels), (query, query_labels) = jax.tree.map(lambda x: x[i], together)  # noqa: B023
        np.testing.assert_array_equal(support_labels, np.repeat(range(3), 2))
        np.testing.assert_array_equal(query_labels, np.repeat(range(3), 4))
        numbers = np.concatenate([support[:, 0], query[:, 0]])
        assert len(set(numbers.tolist())) == 18
        blobs_of_classes = [set(support[support_labels == k, 1].tolist()) for k in range(3)]
        assert blobs_of_classes == [set(query[query_labels == k, 1].tolist()) for k in range(3)]
        assert sorted(next(iter(blob)) for blob in blobs_of_classes) == [0, 1, 2]


def test_a_turned_cluster_is_one_cluster_more_of_pictures_turned_alike():
    images = jnp.arange(6 * 9).reshape(6, 3, 3, 1)
    data = unsupervised.ClusterData(
        images,
        members=jnp.array([4, 0, 2, 1, 3, 5]),
        starts=jnp.array([[0, 3]]),
        sizes=jnp.array([[3, 2]]),
    )
    turned = unsupervised.turned_clusters(data, 4)
    np.testing.assert_array_equal(turned.sizes, [[3, 2] * 4])
    classes = partition_classes(turned, 0)
    for number, (start, size) in enumerate(zip(classes.starts, classes.sizes, strict=True)):
        turns, cluster = divmod(number, 2)
        expected = np.rot90(images[np.array([[4, 0, 2], [1, 3]][cluster])], turns, (1, 2))
        members = np.asarray(classes.examples[start : start + size])
        np.testing.assert_array_equal(np.asarray(turned.images)[members], expected)


def test_all_partitions_are_drawn_from_and_none_mixed():
    """Two partitions of the same 12 numbers, into columns or rows: no episode has parts of both."""
    grid = jnp.arange(12).reshape(3, 4)
    data = unsupervised.ClusterData(
        images=jnp.arange(12),
        members=jnp.concatenate([grid.T.ravel(), grid.ravel()[:12]]),
        starts=jnp.array([[0, 3, 6], [12, 16, 20]]),
        sizes=jnp.array([[3, 3, 3], [4, 4, 4]]),
    )
    sample = functools.partial(sample_cluster_episode, num_ways=2, num_shots=1, num_queries=2)
    keys = jax.random.split(KEY, 30)
    episodes = jax.device_get(jax.jit(jax.vmap(sample, in_axes=(0, None)))(keys, data))
    kinds = []
    for i in range(30):
        episode = jax.tree.map(lambda x: x[i], episodes)  # noqa: B023
        columns, rows = [], []
        for label in range(2):
            numbers = np.concatenate([x[y == label] for x, y in episode])
            columns.append(len(set((numbers % 4).tolist())) == 1)
            rows.append(len(set((numbers // 4).tolist())) == 1)
        assert all(columns) or all(rows)
        kinds.append(all(columns))
    assert 0 < sum(kinds) < 30


def test_scaled_partitions_differ_and_the_first_is_of_the_embeddings_as_they_are():
    points = np.random.default_rng(0).normal(size=(80, 5)).astype(np.float32)
    data = cluster_classes(KEY, np.arange(80), points, num_partitions=3, num_clusters=3, min_size=1)
    labels = np.zeros((3, 80), int)
    data = jax.device_get(data)
    for partition, (starts, sizes) in enumerate(zip(data.starts, data.sizes, strict=True)):
        for cluster, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            labels[partition, data.members[start : start + size]] = cluster
    _, cluster_key = jax.random.split(jax.random.fold_in(KEY, 0))
    first = cluster_labels(cluster_key, jnp.asarray(points), num_clusters=3)
    assert same_partition(labels[0], first)
    assert not same_partition(labels[0], labels[1])
    assert not same_partition(labels[1], labels[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_size": 31}, r"a partition has 0 clusters of 31 pictures or more out of 4"),
        ({"num_partitions": 0}, r"num_partitions is 0; give one embedding"),
        ({"images": np.zeros(3)}, r"3 pictures, 120 embeddings"),
        ({"num_clusters": 121}, r"num_clusters is 121 for 120"),
    ],
)
def test_impossible_partitions_are_refused(changes, message):
    points, _ = blobs()
    options = {
        "images": np.zeros(120),
        "embeddings": points,
        "num_partitions": 1,
        "num_clusters": 4,
        "min_size": 5,
    }
    with pytest.raises(UserError, match=message):
        cluster_classes(KEY, **(options | changes))
