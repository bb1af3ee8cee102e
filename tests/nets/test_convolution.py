"""The convolution equals flax's and a loop's to second order; max-pooling is exact with ties."""

import functools
import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from flax import linen as nn

from metagen_jax.errors import UserError
from metagen_jax.nets.convolution import Conv, convolve, max_pool_2x2


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def assert_close(actual, expected, rtol=1e-11, atol=1e-11):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def to_second_order(module):
    """Value, gradient and a product with the Hessian of a smooth loss of a module's outputs."""

    def loss(params, images):
        return jnp.sum(jnp.tanh(module.apply({"params": params}, images)) ** 2)

    def function(params, images, direction):
        def slope(params, images):
            grads = jax.grad(loss, argnums=(0, 1))(params, images)
            return sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), grads, direction)))

        first = jax.value_and_grad(loss, argnums=(0, 1))(params, images)
        return module.apply({"params": params}, images), first, jax.grad(slope)(params, images)

    return jax.jit(function)


# Images of odd height and even width: both parities of "SAME" padding in one.
@pytest.mark.parametrize(
    ("kernel_size", "strides"),
    [
        *itertools.product([(1, 1), (3, 3), (5, 5)], [(1, 1), (2, 2)]),
        ((2, 3), (2, 1)),
        ((4, 1), (1, 3)),
    ],
)
def test_equals_flax_in_outputs_gradients_and_second_order_gradients(kernel_size, strides):
    images = random(2, 7, 8, 3)
    flax = nn.Conv(4, kernel_size, strides, padding="SAME", param_dtype=jnp.float64)
    params = {"kernel": random(*kernel_size, 3, 4, seed=1) / 3, "bias": random(4, seed=2)}
    direction = (jax.tree.map(lambda x: x + 0.5, params), random(2, 7, 8, 3, seed=3))
    ours = to_second_order(Conv(4, kernel_size, strides))(params, images, direction)
    assert_close(ours, to_second_order(flax)(params, images, direction))
    plain = references.convolve_same(images, params["kernel"], strides) + params["bias"]
    assert_close(ours[0], plain)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_equals_a_loop_on_images_smaller_than_the_kernel(size):
    images, kernel = random(1, size, 5 - size, 2), random(5, 5, 2, 3, seed=1)
    for strides in ((1, 1), (2, 2)):
        convolution = jax.jit(functools.partial(convolve, strides=strides))
        plain = references.convolve_same(images, kernel, strides)
        assert_close(convolution(images, kernel), plain)


@pytest.mark.parametrize(("kernel_size", "strides"), [((2, 3), (1, 1)), ((4, 1), (2, 3))])
def test_without_padding_it_equals_flax_to_second_order(kernel_size, strides):
    images = random(2, 7, 8, 3)
    flax = nn.Conv(4, kernel_size, strides, padding="VALID", param_dtype=jnp.float64)
    params = {"kernel": random(*kernel_size, 3, 4, seed=1) / 3, "bias": random(4, seed=2)}
    direction = (jax.tree.map(lambda x: x + 0.5, params), random(2, 7, 8, 3, seed=3))
    ours = Conv(4, kernel_size, strides, padding="VALID")
    expected = to_second_order(flax)(params, images, direction)
    assert_close(to_second_order(ours)(params, images, direction), expected)


def test_without_padding_it_refuses_images_smaller_than_the_kernel():
    with pytest.raises(UserError, match="images have 2x4 pixels; a 3x3 kernel needs at least as"):
        convolve(random(1, 2, 4, 1), random(3, 3, 1, 1), padding="VALID")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "same"}, 'padding is \'same\'; give "SAME" or "VALID"'),
        ({"strides": (0, 1)}, r"strides are \(0, 1\); give 1 or more"),
        ({"matmul_dtype": "bf16"}, "matmul_dtype is 'bf16'; give a floating-point type"),
        ({"matmul_dtype": jnp.int8}, "matmul_dtype is .*int8.*; give a floating-point type"),
    ],
)
def test_it_refuses_settings_that_mean_nothing(options, message):
    unchecked = inspect.unwrap(convolve)  # As users call it, without the tests' check of types.
    with pytest.raises(UserError, match=message):
        unchecked(random(1, 4, 4, 1), random(3, 3, 1, 1), **options)


def test_any_batch_axes_are_those_of_the_images():
    images, params = random(2, 3, 4, 5, 1), {"kernel": random(3, 3, 1, 2), "bias": random(2)}
    together = Conv(2).apply({"params": params}, images)
    one_by_one = [[Conv(2).apply({"params": params}, x) for x in row] for row in images]
    assert_close(together, jnp.asarray(one_by_one))


@pytest.mark.parametrize("use_bias", [True, False])
def test_initial_parameters_are_flax_s(use_bias):
    images = jnp.zeros((1, 5, 5, 3))
    nets = (Conv(6, (3, 2), use_bias=use_bias), nn.Conv(6, (3, 2), use_bias=use_bias))
    ours, flax = (jax.jit(net.init)(jax.random.key(3), images) for net in nets)
    chex.assert_trees_all_equal(ours, flax)
    assert ours["params"]["kernel"].shape == (3, 2, 3, 6)


def test_in_float32_it_equals_flax_to_rounding():
    images = random(4, 9, 9, 8).astype(np.float32)
    variables = jax.jit(nn.Conv(16, (3, 3)).init)(jax.random.key(0), images)
    expected = jax.jit(nn.Conv(16, (3, 3)).apply)(variables, images)
    actual = jax.jit(Conv(16).apply)(variables, images)
    assert actual.dtype == jnp.float32
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "window", "strides", "padding", "num_by_xla"),
    [
        ((3, 7, 8, 16), (3, 3), (1, 1), "SAME", 3),
        ((3, 7, 8, 16), (4, 1), (1, 1), "SAME", 3),
        ((3, 7, 8, 16), (2, 3), (1, 1), "VALID", 3),
        ((3, 7, 8, 8), (3, 3), (1, 1), "SAME", 0),
        ((3, 5, 8, 16), (3, 3), (1, 1), "SAME", 0),
        ((3, 7, 8, 16), (3, 3), (2, 2), "SAME", 0),
        # Large enough that patches leave the caches.
        pytest.param((7, 90, 91, 32), (3, 3), (2, 2), "SAME", 2, marks=pytest.mark.slow),
        pytest.param((8, 90, 91, 32), (3, 4), (3, 2), "VALID", 2, marks=pytest.mark.slow),
    ],
)
def test_in_float32_xla_s_convolution_gives_the_numbers_of_patches(
    shape, window, strides, padding, num_by_xla
):
    options = {"strides": strides, "padding": padding}
    images, kernel = random(*shape), random(*window, shape[-1], 16, seed=1)
    expected, pull = jax.vjp(functools.partial(convolve, **options), images, kernel)
    cotangent = random(*expected.shape, seed=2)

    @jax.jit
    def actual(images, kernel, cotangent):
        outputs, pull = jax.vjp(functools.partial(convolve, **options), images, kernel)
        return outputs, *pull(cotangent)

    single = [x.astype(np.float32) for x in (images, kernel, cotangent)]
    lowered = actual.lower(*single)
    assert lowered.as_text().count("stablehlo.convolution") == num_by_xla
    results = lowered.compile()(*single)
    for result, exact in zip(results, (expected, *pull(cotangent)), strict=True):
        assert result.dtype == jnp.float32
        assert_close(result, exact, rtol=0, atol=2e-6 * jnp.abs(exact).max())


def test_vmap_over_kernels_equals_a_loop_and_needs_no_grouped_convolution():
    images, kernels = random(3, 2, 5, 6, 2), random(3, 3, 3, 2, 4, seed=1)

    def gradient(images, kernel):
        return jax.grad(lambda k: jnp.sum(convolve(images, k, strides=(2, 2)) ** 3))(kernel)

    vmapped = jax.jit(jax.vmap(gradient))
    one = jax.jit(gradient)
    loop = jnp.stack([one(x, k) for x, k in zip(images, kernels, strict=True)])
    assert_close(vmapped(images, kernels), loop)
    assert "feature_group_count" not in vmapped.lower(images, kernels).as_text()


def test_by_xla_is_what_has_one_kernel_for_all_and_never_what_has_one_for_each():
    images = random(3, 2, 7, 8, 16).astype(np.float32)
    kernels = random(3, 3, 3, 16, 16, seed=1).astype(np.float32)

    def gradients(images, kernel):
        return jax.grad(lambda x, k: jnp.sum(convolve(x, k) ** 3), (0, 1))(images, kernel)

    each = jax.jit(jax.vmap(gradients)).lower(images, kernels).as_text()
    assert "stablehlo.convolution" not in each
    forward = jax.jit(jax.vmap(convolve, (0, None))).lower(images, kernels[0]).as_text()
    assert "stablehlo.convolution" in forward
    assert "feature_group_count = 1" in forward


def product_with_hessian(convolution, mode):
    """`H v` of a smooth loss, over images and kernel, in three orders of differentiation."""

    def loss(operands):
        return jnp.sum(jnp.tanh(convolution(*operands)) ** 2)

    def forward_over_reverse(operands, direction):
        return jax.jvp(jax.grad(loss), (operands,), (direction,))[1]

    def reverse_over_forward(operands, direction):
        return jax.grad(lambda x: jax.jvp(loss, (x,), (direction,))[1])(operands)

    def reverse_over_vmapped_reverse(operands, direction):
        def slope(x):
            grads = jax.vmap(jax.grad(loss))(jax.tree.map(lambda leaf: leaf[None], x))
            return sum(jnp.vdot(g, d) for g, d in zip(grads, direction, strict=True))

        return jax.grad(slope)(operands)

    return jax.jit(locals()[mode])


@pytest.mark.parametrize(
    "mode", ["forward_over_reverse", "reverse_over_forward", "reverse_over_vmapped_reverse"]
)
@pytest.mark.parametrize(
    ("dtype", "sizes", "channels", "strides", "tolerance"),
    [("float64", (5, 6), (3, 4), (2, 1), 1e-11), ("float32", (6, 7), (16, 17), (1, 1), 1e-5)],
    ids=["patches", "by XLA"],
)
def test_every_order_of_differentiation_equals_flax_s(
    mode, dtype, sizes, channels, strides, tolerance
):
    shapes = (2, *sizes, channels[0]), (3, 3, *channels)
    operands, direction = (
        tuple(0.3 * random(*shape, seed=seed + i).astype(dtype) for i, shape in enumerate(shapes))
        for seed in (0, 2)
    )

    def flax(images, kernel):
        net = nn.Conv(channels[1], (3, 3), strides, use_bias=False, param_dtype=dtype)
        return net.apply({"params": {"kernel": kernel}}, images)

    def ours(images, kernel):
        return convolve(images, kernel, strides=strides)

    exact = jax.tree.map(lambda x: x.astype(jnp.float64), (operands, direction))
    actual = product_with_hessian(ours, mode)(operands, direction)
    for result, expected in zip(actual, product_with_hessian(flax, mode)(*exact), strict=True):
        assert result.dtype == dtype
        assert_close(result, expected, rtol=tolerance, atol=tolerance)


def blocks_with_ties():
    """Images of -1, 0 and 1, so that nearly all blocks have ties; one image is constant."""
    images = np.random.default_rng(0).integers(-1, 2, size=(3, 7, 10, 2)).astype(np.float64)
    images[0] = 0.0
    return images


POOLED = {
    "ties": blocks_with_ties,
    "relu": lambda: np.maximum(random(3, 7, 10, 2), 0),
    "generic": lambda: random(2, 8, 8, 3),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_of_rounded_operands_are_summed_unrounded_in_the_derivatives_too(dtype):
    images, kernel = random(2, 5, 4, 3), random(3, 3, 3, 2, seed=1)
    cotangent = random(2, 3, 2, 2, seed=2)

    def rounded(x):
        return x.astype(dtype).astype(jnp.float64)

    def both(images, kernel, cotangent, **options):
        convolved, transpose = jax.vjp(
            functools.partial(convolve, strides=(2, 2), **options), images, kernel
        )
        return convolved, transpose(cotangent)

    actual = jax.jit(functools.partial(both, matmul_dtype=dtype))(images, kernel, cotangent)
    exact = both(rounded(images), rounded(kernel), rounded(cotangent))
    # What is transposed and added up outside of products keeps its type, and is float64 here.
    chex.assert_trees_all_equal_dtypes(actual, exact)
    assert_close(actual, exact, rtol=1e-6, atol=1e-6)
    assert float(jnp.abs(actual[0] - both(images, kernel, cotangent)[0]).max()) > 1e-4


@pytest.mark.parametrize("kind", POOLED)
def test_max_pool_sends_value_and_gradient_where_reduce_window_does(kind):
    images = POOLED[kind]()
    values, first = references.max_pool_2x2(images)
    weights = random(*values.shape, seed=1)
    expected = np.zeros_like(images)
    for b, y, x, c in np.ndindex(values.shape):
        row, column = first[b, y, x, c]
        expected[b, row, column, c] = weights[b, y, x, c]

    def flax(images):
        return nn.max_pool(images, (2, 2), (2, 2))

    for pool in (max_pool_2x2, flax):
        assert_close(pool(images), values, rtol=0, atol=0)
        grad = jax.jit(jax.grad(lambda x, pool=pool: jnp.sum(pool(x) * weights)))
        assert_close(grad(images), expected, rtol=0, atol=0)


def test_max_pool_shows_a_nan_in_any_corner():
    for corner in np.ndindex(2, 2):
        images = np.zeros((1, 2, 2, 1))
        images[0, *corner, 0] = np.nan
        assert np.isnan(max_pool_2x2(images)).all()


def test_max_pool_under_vmap_is_a_loop():
    images = np.stack([blocks_with_ties(), -blocks_with_ties()])
    loop = [references.max_pool_2x2(x)[0] for x in images]
    assert_close(jax.jit(jax.vmap(max_pool_2x2))(images), np.stack(loop), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "channels", "tolerance"), [("float64", 2, 1e-11), ("float32", 16, 1e-4)]
)
def test_images_split_over_devices_give_the_kernel_the_sum_of_their_gradients(
    dtype, channels, tolerance
):
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:4]), ("devices",))
    split, whole = jax.sharding.PartitionSpec("devices"), jax.sharding.PartitionSpec()
    images = random(8, 6, 6, channels).astype(dtype)
    kernel = random(3, 3, channels, channels).astype(dtype)

    def gradient(kernel, images):
        return jax.grad(lambda k: jnp.tanh(convolve(images, k)).sum())(kernel)

    on_all = jax.shard_map(gradient, mesh=mesh, in_specs=(whole, split), out_specs=whole)
    actual, expected = jax.jit(on_all)(kernel, images), gradient(kernel, images)
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)
