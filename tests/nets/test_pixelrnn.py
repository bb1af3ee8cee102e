"""PixelRNN's LSTMs against NumPy loops; which pixels they see; both models add up to one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pixel_models import all_images, dependence, pixels_before, random_params

from metagen_jax.errors import UserError
from metagen_jax.generative.likelihoods import bernoulli_log_prob
from metagen_jax.nets.pixelrnn import DiagonalBiLSTM, PixelRNN, RowLSTM, skew, unskew

KEY = jax.random.key(0)
CONDITION = np.array([0.3, -1.2, 0.7])
LAYERS = {"row": RowLSTM(3), "diagonal": DiagonalBiLSTM(3)}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm_step(gates, cell):
    output, forget, let_in, content = np.split(gates, 4)
    cell = sigmoid(forget) * cell + sigmoid(let_in) * np.tanh(content)
    return sigmoid(output) * np.tanh(cell), cell


def row_lstm(params, x, condition):
    """State by state, from those of the row above within a kernel."""
    height, width, _ = x.shape
    kernel, to_gates = params["state_to_state"], params["input_to_state"]
    hidden, cell = np.zeros((2, height + 1, width, 3))  # The first row stands above the image.
    for y, j in np.ndindex(height, width):
        gates = to_gates["bias"] + condition @ params["condition"]["kernel"]
        gates = gates + x[y, j] @ to_gates["kernel"][0, 1]
        if j > 0:
            gates = gates + x[y, j - 1] @ to_gates["kernel"][0, 0]
        for k in (-1, 0, 1):
            if 0 <= j + k < width:
                gates = gates + hidden[y, j + k] @ kernel[k + 1]
        hidden[y + 1, j], cell[y + 1, j] = lstm_step(gates, cell[y, j])
    return hidden[1:]


def diagonal_bilstm(params, x, condition):
    """State by state, from those of the pixels above and to the left; the same mirrored."""
    height, width, _ = x.shape
    total = np.zeros((height, width, 3))
    for direction in (0, 1):
        half = slice(12 * direction, 12 * (direction + 1))
        above, beside = np.split(params["state_to_state"][direction], 2)
        image = x[:, ::-1] if direction else x
        # A row and a column of zeros stand before the image.
        hidden, cell = np.zeros((2, height + 1, width + 1, 3))
        for y, j in np.ndindex(height, width):
            inputs = image[y, j] @ params["input_to_state"]["kernel"]
            inputs = inputs + params["input_to_state"]["bias"]
            inputs = inputs + condition @ params["condition"]["kernel"]
            gates = inputs[half] + hidden[y, j + 1] @ above + hidden[y + 1, j] @ beside
            hidden[y + 1, j + 1], cell[y + 1, j + 1] = lstm_step(gates, cell[y + 1, j])
        states = hidden[1:, 1:]
        if direction:
            total[1:] += states[:-1, ::-1]
        else:
            total += states
    return total


@pytest.mark.parametrize("recurrence", LAYERS)
@pytest.mark.parametrize("shape", [(4, 5, 2), (3, 1, 2), (1, 4, 2)])
def test_a_layer_equals_the_published_equations_state_by_state(recurrence, shape):
    x, layer = np.random.default_rng(0).normal(size=shape), LAYERS[recurrence]
    params = random_params(layer, x, CONDITION)
    actual = jax.jit(layer.apply)(params, x, CONDITION)
    reference = row_lstm if recurrence == "row" else diagonal_bilstm
    expected = reference(jax.tree.map(np.asarray, params["params"]), x, CONDITION)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-13)


def test_skew_moves_each_row_one_further_and_unskew_undoes_it():
    x = jnp.arange(1.0, 7).reshape(2, 3, 1)
    np.testing.assert_array_equal(skew(x)[..., 0], [[1, 2, 3, 0], [0, 4, 5, 6]])
    for shape in ((2, 3, 4, 5), (1, 6, 1), (6, 1, 2)):
        x = jnp.asarray(np.random.default_rng(0).normal(size=shape))
        np.testing.assert_array_equal(unskew(skew(x)), x)


def test_diagonal_bilstms_see_exactly_all_pixels_before():
    """Also the last of the row above from the first of a row, too far for the convolution."""
    shape = (4, 7, 2)
    for num_layers in (1, 2):
        net = PixelRNN(2, "diagonal", features=3, num_layers=num_layers, first_kernel_size=3)
        params = random_params(net, np.zeros(shape))
        np.testing.assert_array_equal(dependence(net, params, shape), pixels_before(4, 7))


@pytest.mark.parametrize("num_layers", [1, 2])
def test_row_lstms_see_the_published_triangle(num_layers):
    """Each row above one column more to both sides; to the left also one for each layer."""
    shape = (4, 8, 1)
    net = PixelRNN(1, "row", features=4, num_layers=num_layers, first_kernel_size=3)
    y, x, row, column = np.indices((4, 8, 4, 8))
    triangle = (column <= x + y - row) & (column >= x - (y - row) - num_layers - 1)
    seen = dependence(net, random_params(net, np.zeros(shape)), shape)
    np.testing.assert_array_equal(seen, pixels_before(4, 8) & triangle)


@pytest.mark.parametrize("recurrence", LAYERS)
@pytest.mark.parametrize(("shape", "condition"), [((2, 4), None), ((3, 3), CONDITION)])
def test_probabilities_of_all_binary_images_add_up_to_one(recurrence, shape, condition):
    net = PixelRNN(1, recurrence, features=2, num_layers=2)
    images = all_images(*shape)
    given = [] if condition is None else [condition]
    params = random_params(net, images[0], *given, scale=1.5)

    def log_prob(image):
        return bernoulli_log_prob(image, net.apply(params, image, *given)).sum()

    log_probs = jax.jit(jax.vmap(log_prob))(images)
    assert np.exp(log_probs).sum() == pytest.approx(1, rel=1e-12)
    assert np.ptp(log_probs) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("recurrence", LAYERS)
def test_batch_axes_vmap_jit_and_one_image_at_a_time_are_the_same(recurrence):
    net = PixelRNN(2, recurrence, features=2, num_layers=2)
    images = np.random.default_rng(0).integers(0, 2, size=(2, 4, 5, 1))
    conditions = np.random.default_rng(1).normal(size=(2, 3))
    params = random_params(net, images, conditions)
    apply = jax.jit(net.apply)
    together = apply(params, images, conditions)
    vmapped = jax.jit(jax.vmap(net.apply, (None, 0, 0)))(params, images, conditions)
    alone = [apply(params, *x) for x in zip(images, conditions, strict=True)]
    np.testing.assert_allclose(net.apply(params, images[0], conditions[0]), alone[0], rtol=1e-12)
    np.testing.assert_allclose(vmapped, together, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(np.array(alone), together, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("recurrence", LAYERS)
def test_every_parameter_counts(recurrence):
    net = PixelRNN(1, recurrence, features=3, num_layers=2)
    images = jnp.asarray(all_images(3, 3)[::50])
    conditions = np.tile(CONDITION, (len(images), 1))
    params = random_params(net, images, conditions)
    grads = jax.jit(jax.grad(lambda p: jnp.tanh(net.apply(p, images, conditions)).sum()))(params)
    for path, grad in jax.tree.leaves_with_path(grads):
        assert np.abs(grad).max() > 0, path


@pytest.mark.parametrize("recurrence", LAYERS)
@pytest.mark.slow
def test_is_finite_with_its_gradient_in_float32_at_extremes(recurrence):
    net = PixelRNN(1, recurrence, features=2, num_layers=2)
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
        ({"recurrence": "column"}, 'recurrence is \'column\'; give "row" or "diagonal"'),
        ({"num_layers": 0}, "num_layers is 0; give 1 or more"),
        ({"first_kernel_size": 6}, "first_kernel_size is 6; give an odd number from 3"),
    ],
)
@pytest.mark.usefixtures("ill_typed")
def test_says_what_is_needed(options, message):
    with pytest.raises(UserError, match=message):
        PixelRNN(1, **{"recurrence": "row", **options}).init(KEY, np.zeros((3, 3, 1)))
