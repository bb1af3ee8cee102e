"""The attention PixelCNN against NumPy loops; what it sees; it adds up to one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pixel_models import all_images, pixels_before

from metagen_jax.errors import UserError
from metagen_jax.generative.likelihoods import bernoulli_log_prob
from metagen_jax.nets.attention_pixelcnn import AttentionPixelCNN
from metagen_jax.nets.causal import before
from metagen_jax.nets.pixelcnn import PixelCNN

KEY = jax.random.key(0)
SHAPE = (4, 5, 1)
NET = AttentionPixelCNN(
    SHAPE,
    features=3,
    num_layers=3,
    attention_layers=(1, 2),
    num_keys=2,
    stride=2,
    first_kernel_size=3,
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 2, size=(count, *SHAPE))


def both(module, image, given, present):
    return module(image, module.encode(given), present)


def random_params(net, image, given, *, scale=0.5):
    present = np.ones(len(given), bool)
    shapes = jax.eval_shape(lambda key: net.init(key, image, given, present, method=both), KEY)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape)), shapes)


PARAMS_OF = {"image": images(1)[0], "given": images(2, seed=1)}


def params(**options):
    with jax.enable_x64(True):
        return random_params(NET, **PARAMS_OF, **options)


@jax.jit
def apply(params, image, given, present):
    return NET.apply(params, image, given, present, method=both)


def convolve(x, layer, stride=1):
    """A convolution with zeros around, pixel by pixel."""
    kernel = layer["kernel"]
    size, (height, width) = kernel.shape[0], x.shape[:2]
    rows, columns = -(-height // stride), -(-width // stride)
    before = [
        max((n - 1) * stride + size - length, 0) // 2
        for n, length in ((rows, height), (columns, width))
    ]
    out = np.tile(layer["bias"], (rows, columns, 1))
    for y, x_, i, j in np.ndindex(rows, columns, size, size):
        row, column = y * stride + i - before[0], x_ * stride + j - before[1]
        if 0 <= row < height and 0 <= column < width:
            out[y, x_] += x[row, column] @ kernel[i, j]
    return out


def dense(x, layer):
    return x @ layer["kernel"] + layer.get("bias", 0)


def elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def told_by_the_set(params, given, horizontal, layer):
    """What the set adds to what the horizontal stack is told, in loops."""
    maps, keys, values = [], [], []
    for image in 2 * given - 1.0:
        stem = elu(convolve(elu(convolve(image, params["stem_0"])), params["stem_1"]))
        cells = elu(convolve(stem, params["cells"], stride=2)).reshape(-1, 3)
        maps.append(stem)
        keys += list(dense(cells, params["key"]) + params["cell_places"])
        values += list(dense(cells, params["value"]))
    mean = (params["pseudo"] + sum(maps)) / (1 + len(maps))
    told = dense(elu(convolve(mean, params["align"])), params[f"aligned_{layer}"])
    if layer > 0:
        places = params["pixel_places"].reshape(*SHAPE[:2], -1)
        for y, x in np.ndindex(SHAPE[:2]):
            query = dense(horizontal[y, x], params[f"queries_{layer - 1}"]) + places[y, x]
            logits = np.array([query @ key for key in [*keys, params["nothing"]]]) / np.sqrt(2)
            weights = np.exp(logits) / np.exp(logits).sum()
            read = sum(
                (w * v for w, v in zip(weights[:-1], values, strict=True)), start=np.zeros(3)
            )
            told[y, x] += dense(read, params[f"read_{layer - 1}"])
    return told


@pytest.mark.parametrize("num_given", [0, 2])
@pytest.mark.slow
def test_the_set_adds_to_every_layer_what_the_docstring_says(num_given):
    """The net is a PixelCNN whose layers are told more: its own layers, one by one, and a loop."""
    given, image = images(num_given, seed=1), images(1)[0]
    variables = params()
    actual = apply(variables, image, given, np.ones(num_given, bool))

    weights = jax.tree.map(np.asarray, variables["params"])
    plain = PixelCNN(1, features=3, num_layers=3, first_kernel_size=3)
    layers = {"params": {k: v for k, v in weights.items() if k.startswith(("layers", "h"))}}

    def layer_of(module, vertical, horizontal, more, index):
        layer = module.layers[index]
        seen = {"reach": 1, "current": not layer.first}
        vertical, told = layer.look_up(before(vertical, axis=-3, **seen), None)
        return vertical, *layer.look_left(before(horizontal, axis=-2, **seen), told + more)

    vertical = horizontal = jnp.asarray(2 * image - 1.0)
    skips = []
    for i in range(3):
        more = told_by_the_set(weights, given, np.asarray(horizontal), i)
        vertical, horizontal, skip = plain.apply(
            layers, vertical, horizontal, more, i, method=layer_of
        )
        skips.append(skip)
    expected = plain.apply(layers, skips, method="outputs")
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


def test_a_pixel_sees_exactly_those_before_it_however_far_through_attention():
    """The last pixel is farther from the first than layers reach, but not than what it asks for."""

    @jax.jit
    def jacobian(image):
        given = PARAMS_OF["given"]
        return jax.jacobian(lambda x: apply(params(), x, given, np.ones(2, bool)))(image)

    values = np.random.default_rng(1).normal(size=(3, *SHAPE))
    seen = np.any([np.abs(jacobian(x)).max((2, 5)) > 0 for x in values], axis=0)
    assert not np.any(seen & ~pixels_before(*SHAPE[:2]))
    y, x, row, column = np.indices(seen.shape)
    near = (np.abs(y - row) <= 3) & (np.abs(x - column) <= 3)
    np.testing.assert_array_equal(seen, pixels_before(*SHAPE[:2]) & near)


@pytest.mark.parametrize("present", [[], [True, True], [False, True]])
def test_probabilities_of_all_images_add_up_to_one(present):
    net = AttentionPixelCNN(
        (2, 4, 1), features=3, num_layers=2, attention_layers=(1,), stride=2, first_kernel_size=3
    )
    every = all_images(2, 4)
    given = every[[200, 101]][: len(present)]
    weights = random_params(net, every[0], every[:2], scale=1.0)

    def log_prob(image):
        outputs = net.apply(weights, image, given, np.array(present, bool), method=both)
        return bernoulli_log_prob(image, outputs).sum()

    log_probs = jax.jit(jax.vmap(log_prob))(every)
    assert np.exp(log_probs).sum() == pytest.approx(1, rel=1e-12)


@pytest.mark.slow
def test_order_does_not_matter_and_absent_images_are_not_there():
    given, image, weights = images(3, seed=1), images(1)[0], params()
    there = apply(weights, image, given, np.ones(3, bool))
    back = apply(weights, image, given[::-1], np.ones(3, bool))
    np.testing.assert_allclose(there, back, rtol=1e-12, atol=1e-12)
    masked = apply(weights, image, given, np.array([True, False, True]))
    alone = apply(weights, image, given[[0, 2]], np.ones(2, bool))
    np.testing.assert_allclose(masked, alone, rtol=1e-12, atol=1e-12)
    none = apply(weights, image, given, np.zeros(3, bool))
    empty = apply(weights, image, given[:0], np.zeros(0, bool))
    np.testing.assert_allclose(none, empty, rtol=1e-12, atol=1e-12)
    assert np.abs(there - empty).min() > 1e-6  # Every pixel is told of the set.


@pytest.mark.slow
def test_vmap_jit_and_one_at_a_time_are_the_same_and_every_parameter_counts():
    given, queries, weights = images(2, seed=1), images(3), params()
    present = np.tri(3, 2, -1, dtype=bool)
    together = jax.jit(jax.vmap(apply, (None, 0, None, 0)))(weights, queries, given, present)
    eager = NET.apply(weights, queries[2], given, present[2], method=both)
    np.testing.assert_allclose(together[2], eager, rtol=1e-12, atol=1e-12)

    @jax.jit
    def grads(weights):
        def total(weights):
            of_all = jax.vmap(apply, (None, 0, None, 0))(weights, queries, given, present)
            return jnp.tanh(of_all).sum()

        return jax.grad(total)(weights)

    for path, grad in jax.tree.leaves_with_path(grads(weights)):
        assert np.abs(grad).max() > 0, path


@pytest.mark.slow
def test_it_is_finite_with_its_gradient_in_float32_at_extremes():
    given, image = np.float32(images(2, seed=1)), np.float32(images(1)[0])

    @jax.jit
    def value_and_grad(weights, present):
        return jax.value_and_grad(lambda w: jnp.square(apply(w, image, given, present)).sum())(
            weights
        )

    for size in (1, 1e3):
        weights = jax.tree.map(lambda p, size=size: jnp.float32(size * p), params())
        for present in (np.zeros(2, bool), np.ones(2, bool)):
            assert all(
                np.isfinite(x).all() for x in jax.tree.leaves(value_and_grad(weights, present))
            )


@pytest.mark.parametrize("layers", [(0,), (2,)])
def test_layers_that_cannot_attend_are_refused(layers):
    net = AttentionPixelCNN(SHAPE, num_layers=2, attention_layers=layers)
    with pytest.raises(UserError, match=r"attention_layers is .* give numbers from 1 to 1"):
        net.init(KEY, images(1)[0], images(1), np.ones(1, bool), method=both)
