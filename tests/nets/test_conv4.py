"""Conv4's shapes, its norms against flax and NumPy, and its second-order step with max-pooling."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from flax import linen as nn

import metagen_jax.nets.conv4
from metagen_jax.gradients import gradients
from metagen_jax.meta.maml import maml_loss
from metagen_jax.nets.conv4 import BatchNorm, Conv4
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.types import Episode

KEY = jax.random.key(0)


def random(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def parameter_shapes(net, image_shape):
    params = jax.eval_shape(net.init, KEY, jnp.zeros((1, *image_shape)))["params"]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


@pytest.mark.parametrize(
    ("strided", "image_shape", "features"),
    [(True, (28, 28, 1), 64), (False, (28, 28, 1), 64), (False, (84, 84, 3), 1600)],
)
def test_has_flax_shaped_parameters_under_names_that_trainable_can_choose(
    strided, image_shape, features
):
    shapes = parameter_shapes(Conv4(5, strided=strided), image_shape)
    expected = {"head/kernel": (features, 5), "head/bias": (5,)}
    for block in range(4):
        expected[f"conv{block}/kernel"] = (3, 3, 64 if block else image_shape[-1], 64)
        for name in (f"conv{block}/bias", f"norm{block}/scale", f"norm{block}/bias"):
            expected[name] = (64,)
    assert shapes == expected


def test_has_as_many_parameters_as_maml_s_omniglot_net():
    """`640 + 3 * 36928` of convolutions, `4 * 128` of norms, `65 * 5` of the head."""
    assert sum(map(np.prod, parameter_shapes(Conv4(5), (28, 28, 1)).values())) == 112_261


def test_without_outputs_gives_the_features_that_the_head_sees():
    images = random(3, 16, 16, 1)
    for strided in (True, False):
        net = Conv4(2, num_filters=8, strided=strided)
        variables = jax.jit(net.init)(KEY, images)
        body = Conv4(None, num_filters=8, strided=strided)
        head = variables["params"]["head"]
        expected = jax.jit(body.apply)(variables, images) @ head["kernel"] + head["bias"]
        actual = jax.jit(net.apply)(variables, images)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strided", [True, False])
@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
def test_equals_the_same_net_written_with_flax(norm, strided):
    images = random(3, 17, 16, 2)
    net = Conv4(5, num_filters=8, strided=strided, norm=norm)
    variables = jax.jit(net.init)(KEY, images)
    # Scales and biases away from one and zero, so that leaving one out shows.
    params = jax.tree.map(lambda p: p + 0.1 * random(*p.shape, seed=1), variables["params"])
    averages = {"mean": jnp.zeros(8), "var": jnp.ones(8)}
    flax_norm = {
        "batch": lambda p, x: nn.BatchNorm(use_running_average=False, epsilon=1e-3).apply(
            {"params": p, "batch_stats": averages}, x, mutable=["batch_stats"]
        )[0],
        "group": lambda p, x: nn.GroupNorm(num_groups=8).apply({"params": p}, x),
        "layer": lambda p, x: nn.LayerNorm(reduction_axes=(1, 2, 3)).apply({"params": p}, x),
        "none": lambda p, x: x,
    }[norm]

    @jax.jit
    def expected(params, x):
        for block in range(4):
            conv = nn.Conv(8, (3, 3), 2 if strided else 1)
            x = conv.apply({"params": params[f"conv{block}"]}, x)
            x = jnp.maximum(flax_norm(params.get(f"norm{block}"), x), 0)
            x = x if strided else nn.max_pool(x, (2, 2), (2, 2))
        x = x.mean((1, 2)) if strided else x.reshape(3, -1)
        return x @ params["head"]["kernel"] + params["head"]["bias"]

    actual = jax.jit(net.apply)({"params": params}, images)
    np.testing.assert_allclose(actual, expected(params, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_reference", [None, 4])
def test_batch_norm_equals_numpy_in_value_and_gradient(num_reference):
    with jax.enable_x64(True):
        x = random(6, 3, 2, 5, dtype=np.float64) * 3 + 1
        params = {"scale": random(5, seed=1, dtype=np.float64), "bias": np.arange(5.0)}
        weights = random(6, 3, 2, 5, seed=2, dtype=np.float64)

        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def value_and_grad(params, x):
            y = BatchNorm().apply({"params": params}, x, num_reference)
            return jnp.sum(weights * y), y

        def in_numpy(params, x):
            y = references.batch_norm(x, **params, epsilon=1e-3, num_reference=num_reference)
            return np.sum(weights * y)

        (total, y), grads = value_and_grad(params, x)
        expected = references.batch_norm(x, **params, epsilon=1e-3, num_reference=num_reference)
        np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(total, in_numpy(params, x), rtol=1e-10)
        numerical = references.finite_differences(lambda a: in_numpy(*a), (params, x))
        chex.assert_trees_all_close(grads, numerical, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_batch_norm_of_devices_is_that_of_their_whole_batch():
    with jax.enable_x64(True):
        x, weights = (random(8, 3, 5, seed=seed, dtype=np.float64) for seed in (0, 1))
        one, many = BatchNorm(), BatchNorm(axis_name="i")
        variables = many.init(KEY, x)
        chex.assert_trees_all_equal(variables, one.init(KEY, x))

        def of_one(variables, x):
            return (weights * one.apply(variables, x)).sum()

        def of_many(variables, x):
            parts = x.reshape(4, 2, *x.shape[1:])
            y = jax.vmap(lambda part: many.apply(variables, part), axis_name="i")(parts)
            return (weights * y.reshape(x.shape)).sum()

        expected = jax.value_and_grad(of_one, argnums=(0, 1))(variables, x)
        actual = jax.value_and_grad(of_many, argnums=(0, 1))(variables, x)
        chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-10)
        # Statistics of a reference are a device's own.
        own = many.apply(variables, x, num_reference=2)
        np.testing.assert_array_equal(own, one.apply(variables, x, num_reference=2))


def test_batch_norm_is_finite_for_a_constant_batch():
    x = jnp.full((4, 5), 3.0)
    variables = BatchNorm().init(KEY, x)
    y, grads = jax.jit(jax.value_and_grad(lambda x: BatchNorm().apply(variables, x).sum()))(x)
    assert y == 0
    assert jnp.isfinite(grads).all()


@pytest.mark.slow
def test_images_after_the_reference_are_answered_one_by_one():
    """Inductive prediction: an answer depends on the support images and its own, on no other."""
    net = Conv4(3, num_filters=8)
    support, queries = random(5, 16, 16, 1), random(4, 16, 16, 1, seed=1)
    variables = jax.jit(net.init)(KEY, support)

    def answer(queries, num_reference):
        both = jnp.concatenate([support, queries])
        return net.apply(variables, both, num_reference=num_reference)[5:]

    alone = np.concatenate([answer(query[None], 5) for query in queries])
    np.testing.assert_allclose(answer(queries, 5), alone, rtol=1e-4, atol=1e-5)
    transductive = np.concatenate([answer(query[None], None) for query in queries])
    assert np.abs(answer(queries, None) - transductive).max() > 1e-2


@pytest.mark.slow
def test_second_order_step_with_max_pooling_is_exact_under_jit(monkeypatch):
    """In float64, where a pooling that XLA fuses wrongly gives NaN: the same with and without jit,
    and with `reduce_window`. Zeros after ReLU make ties in many blocks."""
    with jax.enable_x64(True):
        net = Conv4(2, num_filters=4, strided=False, norm="batch")
        images = random(2, 4, 16, 16, 1, dtype=np.float64)
        labels = np.array([0, 0, 1, 1])
        params = jax.jit(net.init)(KEY, images[0])
        params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
        episode = Episode((images[0], labels), (images[1], labels))

        def meta_gradient(jit):
            # New functions each time: compiled ones would keep the pooling they were traced with.
            loss_fn = cross_entropy_loss(lambda p, x: net.apply(p, x))
            grad_fn = gradients(maml_loss(loss_fn, inner_optimizer=optax.sgd(0.4), num_steps=1))
            return (jax.jit(grad_fn) if jit else grad_fn)(params, episode, KEY)

        compiled, eager = meta_gradient(jit=True), meta_gradient(jit=False)
        monkeypatch.setattr(
            metagen_jax.nets.conv4, "max_pool_2x2", lambda x: nn.max_pool(x, (2, 2), (2, 2))
        )
        reduce_window = meta_gradient(jit=True)
        chex.assert_tree_all_finite(compiled)
        chex.assert_trees_all_close(compiled, eager, rtol=1e-9, atol=1e-11)
        chex.assert_trees_all_close(compiled, reduce_window, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        (
            {"norm": "btach"},
            16,
            r"norm is 'btach'; give \"batch\", \"group\", \"layer\" or \"none\"",
        ),
        ({"strided": False}, 15, "15x16 pixels; four max-pools need at least 16 a side"),
        ({"norm": "group", "num_filters": 12}, 16, "12 filters .* 8 groups"),
    ],
)
@pytest.mark.usefixtures("ill_typed")
def test_refuses_in_one_line(options, size, message):
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(Conv4(5, **options).init, KEY, jnp.zeros((1, size, 16, 1)))
    assert "\n" not in str(error.value)
