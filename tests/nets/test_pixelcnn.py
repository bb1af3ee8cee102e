"""The gated PixelCNN against NumPy loops; which pixels it sees; it adds up to one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pixel_models import all_images, dependence, pixels_before, random_params

from metagen_jax.errors import UserError
from metagen_jax.generative.likelihoods import bernoulli_log_prob, categorical_log_prob
from metagen_jax.nets.pixelcnn import PixelCNN

KEY = jax.random.key(0)
CONDITION = np.array([0.3, -1.2, 0.7])
OF_PIXELS = np.random.default_rng(1).normal(size=(4, 5, 3))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gate(x):
    a, b = np.split(x, 2)
    return np.tanh(a) * sigmoid(b)


def gated_layer(params, vertical, horizontal, condition, size, first):
    """One layer of both stacks, pixel by pixel, from whole kernels of which a mask leaves half."""
    height, width, _ = vertical.shape
    reach = size // 2
    features = params["residual"]["kernel"].shape[1]
    ups, lefts, skips = (np.zeros((height, width, features)) for _ in range(3))
    for y, x in np.ndindex(height, width):
        given = condition[y, x]
        up = params["vertical"]["bias"] + given @ params["vertical_condition"]["kernel"]
        for i in range(-reach, 0 if first else 1):
            for j in range(-reach, reach + 1):
                if y + i >= 0 and 0 <= x + j < width:
                    up = (
                        up
                        + vertical[y + i, x + j]
                        @ params["vertical"]["kernel"][i + reach, j + reach]
                    )
        left = params["horizontal"]["bias"] + given @ params["horizontal_condition"]["kernel"]
        left = left + up @ params["link"]["kernel"]
        for j in range(-reach, 0 if first else 1):
            if x + j >= 0:
                left = left + horizontal[y, x + j] @ params["horizontal"]["kernel"][0, j + reach]
        ups[y, x] = gate(up)
        lefts[y, x] = gate(left) @ params["residual"]["kernel"] + params["residual"]["bias"]
        if not first:
            lefts[y, x] += horizontal[y, x]
        skips[y, x] = lefts[y, x] @ params["skip"]["kernel"] + params["skip"]["bias"]
    return ups, lefts, skips


@pytest.mark.parametrize("condition", [CONDITION, OF_PIXELS], ids=["vector", "of each pixel"])
def test_equals_the_published_equations_pixel_by_pixel(condition):
    net = PixelCNN(2, features=3, num_layers=3, num_levels=4, first_kernel_size=5)
    image = np.random.default_rng(0).integers(0, 4, size=(4, 5, 2))
    params = random_params(net, image, condition)
    actual = jax.jit(net.apply)(params, image, condition)

    params = jax.tree.map(np.asarray, params["params"])
    vertical = horizontal = 2 * image / 3 - 1
    condition = np.broadcast_to(condition, (4, 5, 3))
    total = 0
    for i, size in enumerate((5, 3, 3)):
        layer = params[f"layers_{i}"]
        vertical, horizontal, skips = gated_layer(
            layer, vertical, horizontal, condition, size, first=i == 0
        )
        total = total + skips
    hidden = np.maximum(total, 0) @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    expected = np.maximum(hidden, 0) @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_sees_exactly_all_pixels_before_once_it_has_enough_layers():
    """The farthest are 5 columns away: 2 from the first layer, one from each other."""
    shape = (4, 6, 2)
    net = PixelCNN(2, features=6, num_layers=4, first_kernel_size=5)
    params = random_params(net, np.zeros(shape))
    np.testing.assert_array_equal(dependence(net, params, shape), pixels_before(4, 6))


@pytest.mark.parametrize(("num_layers", "kernel_size", "reach"), [(1, 3, 1), (2, 3, 2), (2, 5, 3)])
def test_with_fewer_layers_it_sees_a_box_without_a_blind_spot(num_layers, kernel_size, reach):
    shape = (5, 6, 1)
    net = PixelCNN(
        1, features=6, num_layers=num_layers, first_kernel_size=3, kernel_size=kernel_size
    )
    params = random_params(net, np.zeros(shape))
    y, x, row, column = np.indices((5, 6, 5, 6))
    box = (np.abs(y - row) <= reach) & (np.abs(x - column) <= reach)
    np.testing.assert_array_equal(dependence(net, params, shape), pixels_before(5, 6) & box)


@pytest.mark.parametrize(
    ("shape", "condition"), [((2, 4), None), ((3, 3), CONDITION), ((3, 3), -CONDITION)]
)
def test_probabilities_of_all_binary_images_add_up_to_one(shape, condition):
    net = PixelCNN(1, features=3, num_layers=2, first_kernel_size=3)
    images = all_images(*shape)
    given = [] if condition is None else [condition]
    params = random_params(net, images[0], *given, scale=1.5)

    def log_prob(image):
        return bernoulli_log_prob(image, net.apply(params, image, *given)).sum()

    log_probs = jax.jit(jax.vmap(log_prob))(images)
    assert np.exp(log_probs).sum() == pytest.approx(1, rel=1e-12)
    assert np.ptp(log_probs) > 0.1


def test_probabilities_of_all_images_of_three_levels_add_up_to_one():
    net = PixelCNN(3, features=3, num_layers=2, num_levels=3, first_kernel_size=3)
    images = all_images(2, 3, num_levels=3)
    params = random_params(net, images[0])
    logits = jax.jit(net.apply)(params, images)
    log_probs = categorical_log_prob(images[..., 0], logits).sum((1, 2))
    assert np.exp(log_probs).sum() == pytest.approx(1, rel=1e-12)


def test_a_condition_moves_every_pixel():
    net = PixelCNN(1, features=3, num_layers=1, first_kernel_size=3)
    image = np.zeros((3, 4, 1))
    params = random_params(net, image, CONDITION)
    apply = jax.jit(net.apply)
    change = apply(params, image, CONDITION) - apply(params, image, -CONDITION)
    assert np.abs(change).min() > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("of_each", [(), (4, 4)], ids=["of the image", "of each pixel"])
def test_batch_axes_vmap_jit_and_one_image_at_a_time_are_the_same(of_each):
    net = PixelCNN(2, features=3, num_layers=2, first_kernel_size=3)
    images = np.random.default_rng(0).integers(0, 2, size=(2, 3, 4, 4, 1))
    conditions = np.random.default_rng(1).normal(size=(2, 3, *of_each, 3))
    params = random_params(net, images, conditions)
    apply = jax.jit(net.apply)
    together = apply(params, images, conditions)
    of_rows = jax.vmap(net.apply, (None, 0, 0))
    vmapped = jax.jit(jax.vmap(of_rows, (None, 0, 0)))(params, images, conditions)
    alone = [
        [apply(params, *x) for x in zip(*pair, strict=True)]
        for pair in zip(images, conditions, strict=True)
    ]
    eager = net.apply(params, images[0, 0], conditions[0, 0])
    np.testing.assert_allclose(eager, together[0, 0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(vmapped, together, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(np.array(alone), together, rtol=1e-12, atol=1e-13)


def test_every_parameter_counts():
    net = PixelCNN(1, features=4, num_layers=3, first_kernel_size=3)
    images = all_images(3, 3)[::50]
    conditions = np.tile(CONDITION, (len(images), 1))
    params = random_params(net, images, conditions)
    grads = jax.jit(jax.grad(lambda p: jnp.tanh(net.apply(p, images, conditions)).sum()))(params)
    for path, grad in jax.tree.leaves_with_path(grads):
        assert np.abs(grad).max() > 0, path


def test_is_finite_with_its_gradient_in_float32_at_extremes():
    net = PixelCNN(1, features=3, num_layers=2)
    image = np.float32(np.random.default_rng(0).normal(size=(5, 5, 1)))
    params = jax.tree.map(jnp.float32, random_params(net, image))

    @jax.jit
    def evaluate(params, image):
        return jax.value_and_grad(lambda *x: jnp.square(net.apply(*x)).sum(), argnums=(0, 1))(
            params, image
        )

    for scale, size in ((0, 1), (1e4, 1), (1e4, 1e3)):
        large = jax.tree.map(lambda p, size=size: jnp.float32(size) * p, params)
        value, grads = evaluate(large, np.float32(scale) * image)
        assert value.dtype == jnp.float32
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, grads)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0; give 1 or more"),
        ({"first_kernel_size": 4}, "first_kernel_size is 4 and kernel_size 3; give odd numbers"),
        ({"kernel_size": 1}, "first_kernel_size is 7 and kernel_size 1; give odd numbers from 3"),
        ({"num_levels": 1}, "num_levels is 1; give 2 or more"),
    ],
)
def test_says_what_is_needed(options, message):
    with pytest.raises(UserError, match=message):
        PixelCNN(1, **options).init(KEY, np.zeros((3, 3, 1)))


def test_a_condition_of_another_batch_is_refused(ill_typed):
    net = PixelCNN(1, features=3, num_layers=1, first_kernel_size=3)
    with pytest.raises(UserError, match=r"condition has shape \(4, 5, 3\) for images of shape"):
        net.init(KEY, np.zeros((1, 4, 5, 1)), OF_PIXELS)
