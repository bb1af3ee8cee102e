"""Contrastive losses against loops over pairs, values worked by hand, and each other."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references

from metagen_jax.errors import UserError
from metagen_jax.gradients import gradients
from metagen_jax.meta.maml import maml_loss
from metagen_jax.self_supervised.contrastive import (
    info_nce,
    nt_xent,
    sigmoid_pairs,
    supervised_contrastive,
)
from metagen_jax.similarity import unit_rows
from metagen_jax.types import Episode

LABELS = np.array([3, 1, 3, 7, 1, 3])
LOSSES = {
    "nt_xent": functools.partial(nt_xent, temperature=0.3),
    "info_nce": functools.partial(info_nce, temperature=0.3),
    "supervised_contrastive": lambda a, b, **options: supervised_contrastive(
        jnp.concatenate([a, b]), jnp.asarray(np.tile(LABELS, 2)), temperature=0.3, **options
    ),
    "sigmoid_pairs": functools.partial(sigmoid_pairs, temperature=0.3, bias=-1.0),
}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def pairs(seed=0, shape=(6, 4), dtype=np.float64):
    return np.random.default_rng(seed).normal(size=(2, *shape)).astype(dtype)


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (5, 4)])
@pytest.mark.parametrize("temperature", [0.05, 1.7])
def test_nt_xent_equals_a_loop_over_pairs(float64, shape, temperature):
    z_a, z_b = pairs(shape=shape)
    expected = references.supervised_contrastive(
        np.concatenate([z_a, z_b]), np.tile(np.arange(len(z_a)), 2), temperature
    )
    actual = nt_xent(z_a, z_b, temperature=temperature)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_nt_xent_equals_optaxs(float64):
    z_a, z_b = pairs(shape=(7, 5))
    expected = optax.losses.ntxent(
        jnp.concatenate([z_a, z_b]), jnp.tile(jnp.arange(7), 2), temperature=0.2
    )
    np.testing.assert_allclose(nt_xent(z_a, z_b, temperature=0.2).mean(), expected, rtol=1e-10)


def test_nt_xent_by_hand():
    """Two examples along two axes: each view has a cosine of 1 with its like, of 0 with two."""
    z = jnp.array([[2.0, 0.0], [0.0, 0.5]])
    expected = np.log(np.e**2 + 2) - 2
    np.testing.assert_allclose(nt_xent(z, 3 * z, temperature=0.5), np.full(4, expected), rtol=1e-6)


@pytest.mark.parametrize(
    ("temperature", "value"), [(0.01, 1.0), (0.5, 0.0), (0.5, 1e-30), (10.0, 1e30)]
)
def test_views_that_are_all_alike_lose_the_logarithm_of_the_others(temperature, value):
    z = jnp.full((8, 4), value)
    losses = nt_xent(z, z, temperature=temperature)
    np.testing.assert_allclose(losses, np.full(16, np.log(15)), rtol=1e-5)


@pytest.mark.slow
def test_supervised_contrastive_equals_a_loop_over_positives(float64):
    z, _ = pairs()
    expected = references.supervised_contrastive(z, LABELS, 0.3)
    actual = supervised_contrastive(z, LABELS, temperature=0.3)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)
    assert actual[3] == 0, "the only one of class 7"
    z_a, z_b = pairs()
    np.testing.assert_allclose(
        supervised_contrastive(
            np.concatenate([z_a, z_b]), np.tile(np.arange(6), 2), temperature=0.3
        ),
        nt_xent(z_a, z_b, temperature=0.3),
        rtol=1e-10,
    )


def test_info_nce_equals_a_loop_and_takes_further_candidates(float64):
    queries, own = pairs()
    candidates = np.concatenate([own, pairs(1)[0]])
    for count in (6, 12):
        scores = np.array([[q @ c / 0.7 for c in candidates[:count]] for q in queries])
        expected = [np.logaddexp.reduce(row) - row[i] for i, row in enumerate(scores)]
        actual = info_nce(queries, candidates[:count], temperature=0.7)
        np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_the_bound_of_info_nce_is_below_the_mutual_information(float64):
    """Of Gaussians whose correlation is r it is `-ln(1 - r^2) / 2`; the best score is the log of
    the density ratio, and no score gives more than `ln m`."""
    num_candidates, r = 64, 0.9
    information = -np.log(1 - r**2) / 2

    def bound(key, scale):
        x, noise = jax.random.normal(key, (2, num_candidates))
        y = r * x + np.sqrt(1 - r**2) * noise
        # -(y - r x)^2 / (2 (1 - r^2)) + y^2 / 2, as a product.
        rows = jnp.stack([r * x, -jnp.square(r * x) / 2, -jnp.ones_like(x) * r**2 / 2], 1)
        columns = jnp.stack([y, jnp.ones_like(y), jnp.square(y)], 1) / (1 - r**2)
        return np.log(num_candidates) - info_nce(scale * rows, columns).mean()

    bounds = jax.jit(jax.vmap(bound, in_axes=(0, None)))
    keys = jax.random.split(jax.random.key(0), 300)
    best = bounds(keys, 1.0)
    assert best.mean() < information + 2 * best.std() / np.sqrt(300)
    assert best.mean() > 0.9 * information
    for scale in (0.3, 3.0, 100.0):
        others = bounds(keys, scale)
        assert others.mean() < best.mean()
        assert others.max() <= np.log(num_candidates)


def test_sigmoid_pairs_equals_a_loop(float64):
    z_a, z_b = pairs()
    scores = references.cosines(np.concatenate([z_a, z_b]))[:6, 6:] / 0.2 - 3
    signs = 2 * np.eye(6) - 1
    expected = np.logaddexp(0, -signs * scores).sum(1)
    actual = sigmoid_pairs(z_a, z_b, temperature=0.2, bias=-3.0)
    np.testing.assert_allclose(actual, expected, rtol=1e-10)
    # At the published start, where nothing belongs: 10 + ln(1 + e^-10) for each own one.
    orthogonal = sigmoid_pairs(np.eye(4)[:2], np.eye(4)[2:], temperature=0.1, bias=-10.0)
    np.testing.assert_allclose(orthogonal, 10 + 2 * np.log1p(np.exp(-10)), rtol=1e-10)


def test_swapping_the_views_swaps_the_values(float64):
    z_a, z_b = pairs()
    values, swapped = (nt_xent(*views, temperature=0.3) for views in ((z_a, z_b), (z_b, z_a)))
    np.testing.assert_allclose(swapped, jnp.roll(values, 6), rtol=1e-12)
    means = [sigmoid_pairs(*v, temperature=0.3, bias=-1.0).mean() for v in ((z_a, z_b), (z_b, z_a))]
    np.testing.assert_allclose(*means, rtol=1e-12)


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "sigmoid_pairs"])
def test_examples_may_come_in_any_order(float64, name):
    z_a, z_b = pairs()
    order = np.random.default_rng(1).permutation(6)
    values, others = LOSSES[name](z_a, z_b), LOSSES[name](z_a[order], z_b[order])
    np.testing.assert_allclose(others, values.reshape(-1, 6)[:, order].ravel(), rtol=1e-10)
    assert abs(LOSSES[name](z_a, z_b[order]).mean() - values.mean()) > 0.1


@functools.cache
def differentiated(name, block_size):
    """Value and gradient of a weighted sum of a loss's values, compiled."""

    def total(z_a, z_b):
        values = LOSSES[name](z_a, z_b, block_size=block_size)
        return (values * jnp.arange(1, len(values) + 1)).sum()

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_differences_and_the_same_for_blocks_and_tasks(float64, name):
    views = tuple(pairs())
    value, grads = differentiated(name, None)(*views)
    expected = references.finite_differences(lambda v: differentiated(name, None)(*v)[0], views)
    chex.assert_trees_all_close(grads, expected, rtol=1e-7, atol=1e-8)
    for block_size in (1, 5):  # Of 6 or 12 rows.
        blocks = differentiated(name, block_size)(*views)
        chex.assert_trees_all_close(blocks, (value, grads), rtol=1e-12, atol=1e-12)
    others = pairs(1)
    both = jax.vmap(differentiated(name, 5))(*np.stack([views, others], 1))
    for i, z in enumerate((views, others)):
        one = differentiated(name, None)(*z)
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], both), one, rtol=1e-11)


def extremes():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(4, 6, 3)).astype(np.float32)
    zero_row = normal[0].copy()
    zero_row[2] = 0
    return {
        "zeros": (np.zeros_like(normal[0]),) * 2,
        "a row of zeros": (zero_row, normal[1]),
        "opposite": (normal[0], -normal[0]),
        "the same": (normal[0], normal[0]),
        "huge": (1e18 * normal[0], 1e18 * normal[1]),
        "tiny": (1e-30 * normal[0], 1e-30 * normal[1]),
    }


COLD = {
    "nt_xent": functools.partial(nt_xent, temperature=0.01),
    "info_nce": functools.partial(info_nce, temperature=0.01),
    "supervised_contrastive": lambda a, b, **options: supervised_contrastive(
        jnp.concatenate([a, b]), jnp.asarray(np.tile(LABELS, 2)), temperature=0.01, **options
    ),
    "sigmoid_pairs": functools.partial(sigmoid_pairs, temperature=0.01, bias=-10.0),
}


@pytest.mark.parametrize("name", COLD)
@pytest.mark.parametrize(
    ("dtype", "block_size"), [(jnp.float32, None), (jnp.float32, 5), (jnp.bfloat16, None)]
)
def test_values_and_gradients_are_finite_at_the_extremes(name, dtype, block_size):
    differentiate = jax.jit(
        jax.value_and_grad(
            lambda a, b: COLD[name](a, b, block_size=block_size).mean(), argnums=(0, 1)
        )
    )
    for case, views in extremes().items():
        if name == "info_nce" and case == "huge":
            continue  # Its products are taken as they are.
        value, grads = differentiate(*(jnp.asarray(z, dtype) for z in views))
        assert value.dtype == jnp.float32
        assert grads[0].dtype == dtype
        chex.assert_tree_all_finite((value, grads))


@pytest.mark.parametrize("labels", [np.arange(6), np.zeros(1, int)])
def test_without_any_positive_there_is_nothing_to_lose(labels):
    z = pairs(dtype=np.float32)[0][: len(labels)]
    for block_size in (None, 1):
        value, grads = jax.jit(
            jax.value_and_grad(
                lambda z, s=block_size: supervised_contrastive(
                    z, labels, temperature=0.01, block_size=s
                ).sum()
            )
        )(z)
        assert value == 0
        np.testing.assert_array_equal(grads, 0)


def test_bfloat16_is_scored_in_float32():
    z_a, z_b = (jnp.asarray(z, jnp.bfloat16) for z in pairs(shape=(32, 16)))
    exact = nt_xent(z_a.astype(jnp.float32), z_b.astype(jnp.float32), temperature=0.05)
    np.testing.assert_array_equal(nt_xent(z_a, z_b, temperature=0.05), exact)


@pytest.mark.slow
def test_maml_over_nt_xent_to_second_order(float64):
    """The meta-gradient by the library's mixed mode equals plain reverse over reverse."""
    support, query = (jnp.asarray(pairs(seed)) for seed in (0, 1))
    params = {"w": jnp.asarray(np.random.default_rng(2).normal(size=(4, 3)))}

    def loss_fn(params, views, key):
        z_a, z_b = jnp.tanh(views @ params["w"])
        return nt_xent(z_a, z_b, temperature=0.3, block_size=5).mean(), {}

    outer = maml_loss(loss_fn, inner_optimizer=optax.sgd(0.5), num_steps=2)
    meta_gradient = jax.jit(gradients(outer))
    actual, _ = meta_gradient(params, Episode(support, query), jax.random.key(0))

    def plain(params):
        for _ in range(2):
            grads = jax.grad(lambda p: loss_fn(p, support, None)[0])(params)
            params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
        return loss_fn(params, query, None)[0]

    chex.assert_trees_all_close(actual, jax.jit(jax.grad(plain))(params), rtol=1e-9)


def test_temporaries_grow_with_the_block_and_not_with_the_square_of_the_batch():
    def temporaries(num_examples, block_size):
        shape = jax.ShapeDtypeStruct((num_examples, 16), jnp.float32)
        f = jax.value_and_grad(
            lambda a, b: nt_xent(a, b, temperature=0.5, block_size=block_size).mean()
        )
        compiled = jax.jit(f).lower(shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    square = 4 * (2 * 2048) ** 2
    assert temporaries(2048, None) >= square
    assert temporaries(2048, 64) < square / 8
    assert temporaries(4096, 64) < 2.2 * temporaries(2048, 64)


def test_what_can_not_be_compared_is_refused(ill_typed):
    z_a, z_b = pairs()
    with pytest.raises(UserError, match=r"z_a has shape \(6, 4\) and z_b \(5, 4\)"):
        nt_xent(z_a, z_b[:5], temperature=0.5)
    with pytest.raises(UserError, match="temperature is 0; give more than 0"):
        sigmoid_pairs(z_a, z_b, temperature=0, bias=0.0)
    with pytest.raises(UserError, match="block_size is 0"):
        nt_xent(z_a, z_b, temperature=0.5, block_size=0)
    with pytest.raises(UserError, match="6 queries and 4 candidates"):
        info_nce(z_a, z_b[:4])
    with pytest.raises(UserError, match="one integer for each"):
        supervised_contrastive(z_a, np.arange(5), temperature=0.5)
    with pytest.raises(UserError, match="one integer for each"):
        supervised_contrastive(z_a, np.ones(6), temperature=0.5)


def test_unit_rows_have_length_one():
    z = pairs()[0]
    np.testing.assert_allclose(jnp.linalg.norm(unit_rows(jnp.asarray(z, jnp.float32)), axis=1), 1)
