"""Distances of samples from data against SciPy, closed forms and loops over all pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from metagen_jax.errors import UserError
from metagen_jax.evaluation.sample_quality import (
    frechet_distance,
    frechet_distance_of_gaussians,
    kernel_distance,
    nearest_neighbours,
    precision_recall,
)

KEY = jax.random.key(0)


def features(n, d, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + shift).astype(np.float32)


def test_frechet_distance_equals_the_square_root_of_scipy():
    real, fake = features(50, 6), features(40, 6, seed=1, shift=0.5)
    means = [x.astype(np.float64).mean(0) for x in (real, fake)]
    a, b = (np.cov(x.astype(np.float64), rowvar=False) for x in (real, fake))
    root = scipy.linalg.sqrtm(a @ b)
    expected = np.square(means[0] - means[1]).sum() + np.trace(a + b - 2 * root.real)
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(fake, real) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(jnp.asarray(real), fake) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_gaussians_in_closed_form():
    """Covariances that commute have commuting roots: `|mu|^2 + sum (sqrt(a) - sqrt(b))^2`."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    a, b = rng.uniform(0.1, 4, size=(2, 5))
    b[2] = 0
    mean_a, mean_b = rng.normal(size=(2, 5))
    actual = frechet_distance_of_gaussians(
        mean_a, (basis * a) @ basis.T, mean_b, (basis * b) @ basis.T
    )
    expected = np.square(mean_a - mean_b).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert actual == pytest.approx(expected, rel=1e-7)
    # One dimension by hand: means 1 and 3, deviations 2 and 5.
    one = frechet_distance_of_gaussians(np.ones(1), 4 * np.eye(1), 3 * np.ones(1), 25 * np.eye(1))
    assert one == pytest.approx(4 + 9)


def test_frechet_distance_of_features_of_low_rank():
    """Fewer examples than features, and features that never change."""
    real = features(4, 20)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(real, real + 1) == pytest.approx(20, rel=1e-5)
    assert frechet_distance(np.ones((3, 2)), np.ones((5, 2))) == 0
    constant = np.ones((5, 20), np.float32)
    expected = np.square(real.mean(0) - 1).sum() + real.var(0, ddof=1).sum()
    assert frechet_distance(real, constant) == pytest.approx(expected, rel=1e-5)


def test_kernel_distance_of_all_examples_equals_a_loop_over_pairs():
    real, fake = features(7, 3), features(7, 3, seed=1)

    def kernel(a, b):
        return np.float64(a) @ np.float64(b) / 3 + 1

    total = 0.0
    for i in range(7):
        for j in range(7):
            if i != j:
                total += kernel(real[i], real[j]) ** 3 / 42 + kernel(fake[i], fake[j]) ** 3 / 42
            total -= 2 * kernel(real[i], fake[j]) ** 3 / 49
    result = kernel_distance(KEY, real, fake, subset_size=7, num_subsets=3)
    np.testing.assert_allclose(result.per_task, total, rtol=1e-10)
    assert result.interval == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_not_biased_and_its_interval_covers():
    """Of one distribution it is zero on average, from small subsets as well."""
    rng = np.random.default_rng(0)
    means = []
    for trial in range(40):
        real, fake = rng.normal(size=(2, 200, 4))
        result = kernel_distance(jax.random.key(trial), real, fake, subset_size=20, num_subsets=10)
        means.append(float(result.mean))
    assert abs(np.mean(means)) < 4 * np.std(means) / np.sqrt(len(means))
    other = rng.normal(size=(200, 4)) + 1
    far = kernel_distance(KEY, real, other, subset_size=100, num_subsets=20)
    assert far.mean > 10 * far.interval
    again = kernel_distance(KEY, real, other, subset_size=100, num_subsets=20)
    np.testing.assert_array_equal(far.per_task, again.per_task)


def distances(a, b):
    return np.linalg.norm(np.float64(a)[:, None] - np.float64(b)[None], axis=-1)


@pytest.mark.parametrize("chunk", [7, 512])
@pytest.mark.slow
def test_precision_and_recall_equal_a_loop(chunk):
    real, fake = features(30, 3), features(25, 3, seed=1, shift=1.0)

    def share(queries, members, k):
        radii = np.sort(distances(members, members), axis=1)[:, k]
        return (distances(queries, members) <= radii).any(1).mean()

    for k in (1, 3):
        result = precision_recall(real, fake, num_neighbours=k, chunk=chunk)
        expected = share(fake, real, k), share(real, fake, k)
        np.testing.assert_allclose(result, expected, rtol=1e-6)
        assert min(expected) > 0
        assert max(expected) < 1


@pytest.mark.slow
def test_precision_without_recall_where_only_one_of_two_modes_is_generated():
    rng = np.random.default_rng(0)
    modes = rng.uniform(-1, 1, size=(2, 200, 2)) + np.array([[[0, 0]], [[10, 0]]])
    fake = rng.uniform(-0.8, 0.8, size=(400, 2))
    result = precision_recall(modes.reshape(-1, 2), fake)
    assert result.precision > 0.9
    assert 0.25 < result.recall < 0.55
    same = precision_recall(fake, fake)
    assert same == (1, 1)
    assert precision_recall(fake, fake + 100) == (0, 0)


@pytest.mark.parametrize("chunk", [1, 4, 512])
@pytest.mark.slow
def test_nearest_neighbours_equal_a_sort_of_all_distances(chunk):
    queries, references = features(9, 5, seed=1), features(20, 5)
    found, indices = nearest_neighbours(queries, references, num_neighbours=4, chunk=chunk)
    expected = distances(queries, references)
    order = np.argsort(expected, axis=1)[:, :4]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(found, np.take_along_axis(expected, order, 1), rtol=1e-5)


def test_a_copy_is_found_at_a_distance_of_zero():
    references = features(50, 784, shift=100.0)
    found, indices = nearest_neighbours(references[[3, 17]], references)
    np.testing.assert_array_equal(found, 0)
    np.testing.assert_array_equal(indices[:, 0], [3, 17])


@pytest.mark.usefixtures("ill_typed")
def test_says_what_is_needed():
    real, fake = features(5, 3), features(4, 3)
    for message, call in (
        (
            r"real of shape \(5, 3\) and fake of shape \(4, 2\); give both the same number",
            lambda: frechet_distance(real, fake[:, :2]),
        ),
        ("fake has 1 rows; give 2 or more", lambda: frechet_distance(real, fake[:1])),
        ("real has numbers that are not finite", lambda: frechet_distance(real / 0, fake)),
        (
            "subset_size is 5; give 2 or more, and at most the 4 examples",
            lambda: kernel_distance(KEY, real, fake, subset_size=5),
        ),
        (
            "num_subsets is 1; give 2 or more",
            lambda: kernel_distance(KEY, real, fake, subset_size=2, num_subsets=1),
        ),
        (
            "num_neighbours is 4; give 1 to 3",
            lambda: precision_recall(real, fake, num_neighbours=4),
        ),
        ("chunk is 0; give 1 or more", lambda: precision_recall(real, fake, chunk=0)),
        (
            "num_neighbours is 6; give 1 to 5",
            lambda: nearest_neighbours(fake, real, num_neighbours=6),
        ),
    ):
        with np.errstate(all="ignore"), pytest.raises(UserError, match=message):
            call()
