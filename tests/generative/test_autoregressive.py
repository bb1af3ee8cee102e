"""All samplers draw the same, and from the model; its log-probability by hand, to second order."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from pixel_models import all_images, random_params

from metagen_jax.errors import UserError
from metagen_jax.generative.autoregressive import (
    autoregressive_log_prob,
    sample_fixed_point,
    sample_in_order,
    sample_pixelcnn,
)
from metagen_jax.generative.likelihoods import (
    bernoulli_log_prob,
    sample_bernoulli,
    sample_discretized_logistic_mixture_rgb,
    sample_gaussian,
)
from metagen_jax.generative.maximum_likelihood import negative_log_likelihood_loss
from metagen_jax.meta.maml import maml_loss
from metagen_jax.nets.pixelcnn import PixelCNN
from metagen_jax.nets.pixelrnn import PixelRNN
from metagen_jax.types import Episode

KEY = jax.random.key(0)
CONDITION = np.array([0.3, -1.2])
OF_PIXELS = np.random.default_rng(1).normal(size=(4, 5, 2))
SMALL = PixelCNN(1, features=3, num_layers=2, first_kernel_size=3)
NETS = {
    "pixelcnn": SMALL,
    "row": PixelRNN(1, "row", features=2, num_layers=2),
    "diagonal": PixelRNN(1, "diagonal", features=2, num_layers=2),
}
ONE_FAST = [
    "pixelcnn",
    *(pytest.param(name, marks=pytest.mark.slow) for name in NETS if name != "pixelcnn"),
]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def nothing_given(*shape):
    return jnp.zeros(shape, jnp.int32), jnp.zeros(shape[:2], bool)


def half_given(*shape, num_levels=2):
    rng = np.random.default_rng(0)
    return rng.integers(0, num_levels, shape), rng.random(shape[:2]) < 0.5


def chain(x):
    """Logits of a vector: the first is 0, each other follows from the number before."""
    return jnp.concatenate([jnp.zeros(1), 4.0 * x[:-1] - 2])


def test_log_probability_by_hand():
    """`P(0) = 1/2`, `P(1 | 0) = sigma(-2)`, `P(1 | 1) = sigma(2)`; the scale is the parameter."""
    log_prob = autoregressive_log_prob(lambda scale, x: scale * chain(x), bernoulli_log_prob)
    expected = np.log(0.5 / (1 + np.exp(2)) / (1 + np.exp(-2)))
    np.testing.assert_allclose(log_prob(1.0, jnp.array([0, 1, 1]), KEY), expected, rtol=1e-12)
    np.testing.assert_allclose(log_prob(0.0, jnp.array([0, 1, 1]), KEY), 3 * np.log(0.5))


def test_log_probability_of_a_pair_is_conditional():
    log_prob = autoregressive_log_prob(lambda scale, x, c: scale * c, bernoulli_log_prob)
    expected = np.log(1 / (1 + np.exp(-2)) / (1 + np.exp(-6)))
    example = (jnp.array([1, 0]), jnp.array([1.0, -3.0]))
    np.testing.assert_allclose(log_prob(2.0, example, KEY), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "given"), [*((name, CONDITION) for name in NETS), ("pixelcnn", OF_PIXELS)]
)
def test_all_samplers_draw_the_same_for_the_same_key(name, given):
    """Of conditional nets, half of whose pixels are given."""
    net, (start, keep) = NETS[name], half_given(4, 5, 1)
    params = random_params(net, start, given, scale=0.8)

    @jax.jit
    def samples(key, condition):
        def predict(x):
            return net.apply(params, x, condition)

        drawn = [
            sample_in_order(key, predict, sample_bernoulli, start, keep),
            sample_fixed_point(key, predict, sample_bernoulli, start, keep).sample,
        ]
        if name == "pixelcnn":
            options = {"condition": condition}
            drawn.append(
                sample_pixelcnn(key, net, params, sample_bernoulli, start, keep, **options)
            )
        return drawn

    drawn = []
    for key in jax.random.split(KEY, 4):
        for condition in (given, -given):
            expected, *others = samples(key, condition)
            for other in others:
                np.testing.assert_array_equal(other, expected)
            np.testing.assert_array_equal(expected[keep], start[keep])
            drawn.append(np.asarray(expected).tobytes())
    assert len(set(drawn)) > 4, "both the key and the condition count"


def rgb_pixel(key, outputs):
    """One pixel of a mixture of two components."""
    of_channels = outputs[2:].reshape(3, 3, 2)
    return sample_discretized_logistic_mixture_rgb(key, outputs[:2], *of_channels)


def test_cached_samples_of_colours_equal_those_in_order():
    net = PixelCNN(20, 3, num_layers=3, num_levels=256, first_kernel_size=5)
    start, keep = half_given(3, 4, 3, num_levels=256)
    start = start.astype(np.uint8)
    params = random_params(net, start)

    @jax.jit
    def samples(key):
        cached = sample_pixelcnn(key, net, params, rgb_pixel, start, keep)
        predict = functools.partial(net.apply, params)
        return cached, sample_in_order(key, predict, rgb_pixel, start, keep)

    for key in jax.random.split(KEY, 3):
        cached, expected = samples(key)
        assert cached.dtype == jnp.uint8
        np.testing.assert_array_equal(cached, expected)
    assert len(np.unique(expected)) > 5


def test_samples_are_distributed_as_the_model_says_and_completions_as_it_says_given_the_rest():
    images = all_images(2, 2)
    params = random_params(SMALL, images[0], scale=1.2)
    log_prob = autoregressive_log_prob(SMALL.apply, bernoulli_log_prob)
    probabilities = np.exp(jax.jit(jax.vmap(lambda x: log_prob(params, x, KEY)))(images))
    start = np.array([[1, 0], [0, 0]])[..., None]

    @jax.jit
    def samples(keep):
        def sample(key):
            return sample_pixelcnn(key, SMALL, params, sample_bernoulli, start, keep)

        return jax.vmap(sample)(jax.random.split(KEY, 20_000))

    first_row = np.array([[True, True], [False, False]])
    given_first_row = np.where((images == start)[:, 0].all((1, 2)), probabilities, 0)
    for keep, expected in (
        (np.zeros((2, 2), bool), probabilities),
        (first_row, given_first_row / given_first_row.sum()),
    ):
        number = np.asarray(samples(keep)).reshape(-1, 4) @ [8, 4, 2, 1]
        frequencies = np.bincount(number, minlength=16) / len(number)
        errors = np.sqrt(expected * (1 - expected) / len(number))
        assert (np.abs(frequencies - expected) <= 5 * errors).all()
        assert expected.max() < 0.9


def test_fixed_points_need_no_order():
    """A chain backwards: its sample in the other order, with the noise turned round as well."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(6))
    uniforms = np.asarray(jax.vmap(lambda key: jax.random.uniform(key))(keys))
    expected = np.zeros(6)
    for i in range(5, -1, -1):
        logit = 0 if i == 5 else 4 * expected[i + 1] - 2
        expected[i] = uniforms[i] < 1 / (1 + np.exp(-logit))

    def predict(x):
        return chain(x[::-1])[::-1]

    start, keep = jnp.zeros(6, jnp.int32), jnp.zeros(6, bool)
    sample, num_passes = sample_fixed_point(KEY, predict, sample_bernoulli, start, keep)
    np.testing.assert_array_equal(sample, expected)
    assert num_passes <= 6


@pytest.mark.parametrize("name", ["independent", "counter"])
def test_passes_are_as_many_as_the_dependence_is_deep(name):
    """Where nothing depends on anything, one pass to draw and one to see that nothing changes; a
    number that is always one more than the one before needs them all."""

    def predict(x):
        first = jnp.zeros(1)
        return jnp.zeros(7) if name == "independent" else jnp.concatenate([first, x[:-1] + 1])

    def sample_element(key, outputs):
        noise = jax.random.bernoulli(key) if name == "independent" else 1
        return (outputs + noise).astype(jnp.int32)

    start, keep = jnp.full(7, -1), jnp.zeros(7, bool)
    sample, num_passes = sample_fixed_point(KEY, predict, sample_element, start, keep)
    assert num_passes == {"independent": 2, "counter": 7}[name]
    np.testing.assert_array_equal(
        sample, sample_in_order(KEY, predict, sample_element, start, keep)
    )
    if name == "counter":
        np.testing.assert_array_equal(sample, np.arange(1, 14, 2))


def test_numbers_that_are_not_whole_are_drawn_too():
    def predict(x):
        return jnp.concatenate([jnp.zeros(1), jnp.cumsum(jnp.tanh(x))[:-1]])

    def sample_element(key, mean):
        return sample_gaussian(key, mean, -1.0)

    start, keep = jnp.zeros(5), jnp.array([False, True, False, False, False])
    sample, _ = sample_fixed_point(KEY, predict, sample_element, start, keep)
    expected = sample_in_order(KEY, predict, sample_element, start, keep)
    np.testing.assert_allclose(sample, expected, rtol=1e-12)
    assert sample[1] == 0
    assert (sample[2:] != 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_FAST)
def test_tasks_with_parameters_of_their_own_under_vmap_are_a_loop(name):
    """Log-probability, gradient and samples."""
    net, image = NETS[name], all_images(3, 3)[200]
    start, keep = nothing_given(3, 3, 1)
    log_prob = autoregressive_log_prob(net.apply, bernoulli_log_prob)
    tasks = [random_params(net, image, seed=s) for s in (0, 1)]

    def evaluate(params, key):
        predict = functools.partial(net.apply, params)
        drawn = sample_fixed_point(key, predict, sample_bernoulli, start, keep)
        if name == "pixelcnn":
            drawn = drawn, sample_pixelcnn(key, net, params, sample_bernoulli, start, keep)
        return jax.value_and_grad(log_prob)(params, image, key), drawn

    keys = jax.random.split(KEY)
    one = jax.jit(evaluate)
    loop = [one(*task) for task in zip(tasks, keys, strict=True)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *tasks)
    vmapped = jax.jit(jax.vmap(evaluate))(stacked, keys)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *loop)
    chex.assert_trees_all_close(vmapped, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_FAST)
def test_maml_over_a_model_equals_finite_differences(name):
    net = {
        "pixelcnn": PixelCNN(1, features=1, num_layers=2, first_kernel_size=3),
        "row": PixelRNN(1, "row", features=1, num_layers=1, first_kernel_size=3),
        "diagonal": PixelRNN(1, "diagonal", features=1, num_layers=1, first_kernel_size=3),
    }[name]
    images = jnp.asarray(all_images(2, 3)[[5, 18, 44, 61]])
    params = random_params(net, images[0], seed=3)
    log_prob = autoregressive_log_prob(net.apply, bernoulli_log_prob)
    loss_fn = maml_loss(
        negative_log_likelihood_loss(log_prob), inner_optimizer=optax.sgd(0.2), num_steps=2
    )

    def loss(params):
        return loss_fn(params, Episode(images[:2], images[2:]), KEY)[0]

    grads = jax.jit(jax.grad(loss))(params)
    numerical = references.finite_differences(jax.jit(loss), params, step=1e-4)
    chex.assert_trees_all_close(grads, numerical, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("ill_typed")
def test_says_what_is_needed():
    start, keep = nothing_given(3, 4, 1)
    params = random_params(SMALL, start)
    predict = functools.partial(SMALL.apply, params)
    for sample in (sample_in_order, sample_fixed_point):
        with pytest.raises(UserError, match=r"keep has shape \(4, 3\) for values of shape \(3, 4"):
            sample(KEY, predict, sample_bernoulli, start, keep.T)
        with pytest.raises(UserError, match=r"a drawn element has shape \(\) and one of the value"):
            sample(KEY, predict, lambda key, x: sample_bernoulli(key, x[0]), start, keep)
    with pytest.raises(UserError, match=r"keep has shape \(4, 3\) for an image of shape \(3, 4, 1"):
        sample_pixelcnn(KEY, SMALL, params, sample_bernoulli, start, keep.T)
    with pytest.raises(UserError, match=r"a drawn element has shape \(\) and one of the values"):
        sample_pixelcnn(KEY, SMALL, params, lambda key, x: sample_bernoulli(key, x[0]), start, keep)
