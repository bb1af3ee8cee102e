"""Log-probabilities against 60 digits and loops, sums over all outcomes, samples and extremes."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from metagen_jax.errors import UserError
from metagen_jax.generative.likelihoods import (
    bernoulli_log_prob,
    bits_per_dim,
    categorical_log_prob,
    discretized_logistic_log_prob,
    discretized_logistic_mixture_log_prob,
    discretized_logistic_mixture_rgb_log_prob,
    gaussian_log_prob,
    sample_bernoulli,
    sample_categorical,
    sample_discretized_logistic,
    sample_discretized_logistic_mixture,
    sample_discretized_logistic_mixture_rgb,
    sample_gaussian,
)

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
LEVELS = 4
LN3 = np.log(3)


def normal(*shape):
    # Spread over the last axis, so that components differ.
    return 0.5 * RNG.normal(size=shape) + np.linspace(-0.5, 0.5, shape[-1])


def few_levels(function):
    return jax.jit(functools.partial(function, num_levels=LEVELS))


# Of each a value of some elements and parameters of these shapes.
CASES = {
    name: (log_prob, np.array(value), tuple(normal(*shape) for shape in shapes))
    for name, log_prob, value, shapes in (
        ("bernoulli", jax.jit(bernoulli_log_prob), [0, 1, 1], [(3,)]),
        ("categorical", jax.jit(categorical_log_prob), [2, 0], [(2, 3)]),
        ("gaussian", jax.jit(gaussian_log_prob), [0.4, -1.3, 0.0], 2 * [(3,)]),
        ("logistic", few_levels(discretized_logistic_log_prob), [0, 1, 3], 2 * [(3,)]),
        ("mixture", few_levels(discretized_logistic_mixture_log_prob), [0, 2, 3], 3 * [(3, 2)]),
        (
            "rgb",
            few_levels(discretized_logistic_mixture_rgb_log_prob),
            [[0, 2, 3], [3, 1, 0]],
            [(2, 2), *3 * [(2, 3, 2)]],
        ),
    )
}
logistic = jax.jit(discretized_logistic_log_prob)


def grid(*axes):
    """Every combination, float32, flat."""
    return (np.float32(x).ravel() for x in np.meshgrid(*axes, indexing="ij"))


def test_discretized_logistic_equals_the_difference_of_its_distribution_function_in_60_digits():
    value, mean, log_scale = grid(
        [0, 1, 77, 128, 254, 255],
        [-1e4, -1.3, -1, -0.2, 0.003, 0.5, 1.001, 1e4],
        [-20, -12, -7, -2, 0, 10],
    )
    expected = [
        references.discretized_logistic(*x, 256) for x in zip(value, mean, log_scale, strict=True)
    ]
    # What a last digit makes of the mean, and of an edge, whose place is of size 1.
    grain = (np.abs(mean) + 1) * np.exp(-np.float64(log_scale))
    for dtype, digit in ((np.float32, 1e-7), (np.float64, 2e-16)):
        with jax.enable_x64(dtype is np.float64):
            actual = logistic(*(x.astype(dtype) for x in (value, mean, log_scale)))
            assert actual.dtype == dtype
        error = np.abs(np.asarray(actual, np.float64) - expected)
        assert (error <= digit * (grain + 5 + 5 * np.abs(expected))).all()


def test_256_levels_sum_to_one_wherever_the_mean_and_however_wide_or_narrow_the_scale():
    """Also with the mean on an edge, where a bin that starts elsewhere than its neighbour ends
    loses mass or counts it twice, and beside gradients, where compilers round otherwise."""
    edges = ((2 * np.arange(0, 255, 12) - 254) / 255).astype(np.float32)
    means = np.concatenate(
        [edges, np.nextafter(edges, 2), np.nextafter(edges, -2), [0, -1, 1, 1.01, -37, 1e4, -1e4]]
    )
    value, mean, log_scale = grid(np.arange(256), means, [-20, -15, -10, -7, -5, -3, 0, 4, 10])
    beside_gradients = jax.jit(jax.vmap(jax.value_and_grad(logistic, argnums=(1, 2))))
    alone = logistic(value, mean, log_scale)
    for log_masses in (alone, beside_gradients(value, mean, log_scale)[0]):
        masses = np.exp(np.asarray(log_masses, np.float64)).reshape(256, -1)
        np.testing.assert_allclose(masses.sum(0), 1, rtol=0, atol=1e-6)


def test_all_mass_is_in_the_last_level_for_a_mean_far_beyond_it_and_half_below_an_edge_on_it():
    for mean, levels in ((1e4, [255]), (-1, [0]), (5 / 255, [130]), (0, [127, 128])):
        mean, log_scale = np.float32(mean), np.float32(-20)
        masses = np.exp(logistic(np.arange(256), mean, log_scale))
        assert (masses[levels] == 1 / len(levels)).all()
        assert masses.sum() == 1


def test_values_worked_by_hand():
    def probabilities(function, value, *parameters, **options):
        value, parameters = np.asarray(value), (np.asarray(x, np.float32) for x in parameters)
        return np.exp(jax.jit(functools.partial(function, **options))(value, *parameters))

    coin = probabilities(bernoulli_log_prob, [1, 0], [LN3, LN3])
    np.testing.assert_allclose(coin, [3 / 4, 1 / 4], rtol=1e-6)
    eighths = np.tile(np.log([1.0, 2.0, 5.0]), (3, 1))
    dice = probabilities(categorical_log_prob, [0, 1, 2], eighths)
    np.testing.assert_allclose(dice, [1 / 8, 1 / 4, 5 / 8], rtol=1e-6)
    density = probabilities(gaussian_log_prob, 3.0, 1.0, np.log(2.0))
    np.testing.assert_allclose(density, np.exp(-0.5) / np.sqrt(8 * np.pi), rtol=1e-6)
    # Levels at -1, 0 and 1 with edges at -1/2 and 1/2, where sigma is 1/4 and 3/4.
    three = {"num_levels": 3}
    log_scale = -np.log(2 * LN3)
    quarters = probabilities(
        discretized_logistic_log_prob, [0, 1, 2], np.zeros(3), np.full(3, log_scale), **three
    )
    np.testing.assert_allclose(quarters, [1 / 4, 1 / 2, 1 / 4], rtol=1e-6)
    # A quarter of that, and three quarters that are all in the last level.
    mixture = probabilities(
        discretized_logistic_mixture_log_prob,
        [0, 1, 2],
        np.tile([0, LN3], (3, 1)),
        np.tile([0.0, 1.0], (3, 1)),
        np.tile([log_scale, -20], (3, 1)),
        **three,
    )
    np.testing.assert_allclose(mixture, [1 / 16, 1 / 8, 13 / 16], rtol=1e-6)


@pytest.mark.parametrize(
    ("slopes", "possible"),
    [
        ((1, 0, -1), [(0, 0, 1), (1, 1, 0)]),  # green is red, blue is not green
        ((-1, 1, 0), [(0, 1, 0), (1, 0, 1)]),  # green is not red, blue is red
    ],
)
def test_colours_that_follow_one_another_worked_by_hand(slopes, possible):
    """Two levels, at -1 and 1: red is a fair coin, the others have scales of next to nothing."""
    outcomes = np.array(list(itertools.product((0, 1), repeat=3)))
    log_scales, slopes = (
        np.tile(np.float32(x)[:, None], (8, 1, 1)) for x in ((0, -20, -20), slopes)
    )
    logits, means = np.zeros((8, 1), np.float32), np.zeros((8, 3, 1), np.float32)
    log_prob = functools.partial(discretized_logistic_mixture_rgb_log_prob, num_levels=2)
    log_probs = jax.jit(log_prob)(outcomes, logits, means, log_scales, slopes)
    expected = [0.5 if tuple(outcome) in possible else 0 for outcome in outcomes.tolist()]
    np.testing.assert_allclose(np.exp(log_probs), expected, rtol=1e-6)


def test_mixtures_equal_a_loop_over_components_and_channels():
    with jax.enable_x64(True):
        for name in ("mixture", "rgb"):
            log_prob, value, (logits, means, log_scales, *slopes) = CASES[name]
            expected = []
            for i, of_element in enumerate(value):
                weights = np.exp(logits[i]) / np.exp(logits[i]).sum()
                total = 0.0
                for k, mass in enumerate(weights):
                    if name == "mixture":
                        channels = [(of_element, means[i, k], log_scales[i, k])]
                    else:
                        r, g, _ = 2 * of_element / (LEVELS - 1) - 1
                        alpha, beta, gamma = slopes[0][i, :, k]
                        shifts = (0, alpha * r, beta * r + gamma * g)
                        channels = zip(
                            of_element, means[i, :, k] + shifts, log_scales[i, :, k], strict=True
                        )
                    for level, mean, log_scale in channels:
                        mass *= np.exp(
                            references.discretized_logistic(level, mean, log_scale, LEVELS)
                        )
                    total += mass
                expected.append(np.log(total))
            actual = log_prob(value, *CASES[name][2])
            np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 1e4])
def test_all_colours_sum_to_one_at_ordinary_and_extreme_parameters(size):
    outcomes = np.array(list(itertools.product(range(LEVELS), repeat=3)))
    logits, means, slopes = (
        np.float32(size * np.broadcast_to(normal(*shape), (len(outcomes), *shape)))
        for shape in ((3,), (3, 3), (3, 3))
    )
    log_scales = np.broadcast_to(np.float32([-20, -1, 10]), means.shape)
    log_prob, _, _ = CASES["rgb"]
    masses = np.exp(np.float64(log_prob(outcomes, logits, means, log_scales, slopes)))
    np.testing.assert_allclose(masses.sum(), 1, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_gradient_equals_finite_differences_under_jit_and_vmap(name):
    log_prob, value, parameters = CASES[name]

    def total(parameters, value):
        return log_prob(value, *parameters).sum()

    with jax.enable_x64(True):
        grad_fn = jax.value_and_grad(total)
        tasks = [
            (tuple(jnp.asarray(scale * x) for x in parameters), jnp.asarray(value[::order]))
            for scale, order in ((1.0, 1), (-0.6, -1))
        ]
        loop = [jax.jit(grad_fn)(*task) for task in tasks]
        with jax.disable_jit():
            np.testing.assert_allclose(total(*tasks[0]), loop[0][0], rtol=1e-13)
        jitted = jax.jit(total)
        numerical = references.finite_differences(
            lambda x: jitted(x, tasks[0][1]), tasks[0][0], step=1e-3
        )
        chex.assert_trees_all_close(loop[0][1], numerical, rtol=1e-8, atol=1e-9)
        together = jax.jit(jax.vmap(grad_fn))(*jax.tree.map(lambda *x: jnp.stack(x), *tasks))
        alone = jax.tree.map(lambda *x: jnp.stack(x), *loop)
        chex.assert_trees_all_close(together, alone, rtol=1e-12, atol=1e-14)


def extremes(name):
    """Values and parameters in float32, as far out as the module says that it is finite."""
    huge = [-1e4, -1.0, 0.0, 1.0, 1e4]
    scales = [-20, -9, 0, 10]
    if name == "bernoulli":
        return grid([0, 1], huge)
    if name == "categorical":
        value, first, second = grid([0, 1], huge, huge)
        return value, np.stack([first, second, np.full_like(first, -np.inf)], -1)
    if name == "gaussian":
        return grid([-3.0, 1e4], huge, scales)
    value, mean, log_scale = grid([0, 1, 2, 3], huge, scales)
    if name == "logistic":
        return value, mean, log_scale
    # Beside each of these components a second, in the opposite extreme of all.
    pairs = [np.stack([x, -x], -1) for x in (np.resize(huge, len(mean)), mean, log_scale)]
    if name == "mixture":
        return value, *pairs
    logits, means, log_scales = pairs
    pixels = np.stack([value, value[::-1], np.roll(value, 1)], -1)
    means, log_scales = (np.stack([x, x[::-1], -x], 1) for x in (means, log_scales))
    return pixels, logits, means, np.clip(log_scales, -20, 10), means[::-1]


@pytest.mark.parametrize("name", CASES)
def test_finite_value_gradient_and_second_derivative_at_extremes(name):
    log_prob, _, _ = CASES[name]
    value, *parameters = extremes(name)

    @jax.jit
    def derivatives(at):
        slope = jax.grad(lambda x: log_prob(value, *x).sum())
        return log_prob(value, *at), jax.jvp(slope, (at,), (jax.tree.map(jnp.ones_like, at),))

    for leaf in jax.tree.leaves(derivatives(parameters)):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()


def test_gradient_in_float32_is_that_in_float64_at_extremes():
    value, mean, log_scale = extremes("logistic")
    # Away from edges, of which the place is rounded; their slope is that of a step.
    mean = np.where(np.abs(mean) < 2, np.float32(0.75) * mean, mean)
    slopes = jax.jit(jax.grad(lambda x: CASES["logistic"][0](value, *x).sum()))
    single = slopes((jnp.asarray(mean), jnp.asarray(log_scale)))
    with jax.enable_x64(True):
        double = jax.tree.map(np.asarray, slopes((jnp.float64(mean), jnp.float64(log_scale))))
    for actual, expected, unit in zip(single, double, (np.exp(-log_scale), 1), strict=True):
        np.testing.assert_allclose(actual / unit, expected / unit, rtol=1e-5, atol=1e-6)


def test_a_component_that_underflows_spoils_nothing():
    """Its log-mass is -5e12, that of the other one -0.6."""
    zero, level = np.zeros(1, np.float32), np.array([2])
    logits, means, log_scales = (np.float32([x]) for x in ((0, 0), (1e4, 0), (-20, 0)))

    def log_prob(means):
        return CASES["mixture"][0](level, logits, means, log_scales)[0]

    value, slope = jax.jit(jax.value_and_grad(log_prob))(means)
    alone = CASES["logistic"][0](level, zero, zero)[0]
    np.testing.assert_allclose(value, alone - np.log(2), rtol=1e-6)
    assert slope[0, 0] == 0
    assert 0 < abs(slope[0, 1]) < 1


def test_what_is_no_value_has_probability_zero_and_passes_no_gradient():
    outside = {
        "bernoulli": [0.5, 2.0, -1.0],
        "categorical": [3.0, 1.5],
        "logistic": [-1.0, 4.0, np.nan],
        "mixture": [0.25, -1.0, np.inf],
        "rgb": [[0.0, 1.0, 1.5], [4.0, 0.0, 0.0]],
    }
    for name, value in outside.items():
        log_prob, _, parameters = CASES[name]
        parameters = tuple(np.float32(x) for x in parameters)
        for_value = functools.partial(log_prob, np.array(value))
        slopes = jax.jit(jax.grad(lambda x, f=for_value: f(*x).sum()))(parameters)
        assert (np.asarray(for_value(*parameters)) == -np.inf).all(), name
        assert not np.concatenate([np.ravel(x) for x in slopes]).any(), name


def test_the_dtype_of_values_does_not_matter():
    levels = np.array([0, 1, 127, 128, 255])
    mean, log_scale = jnp.linspace(-1, 1, 5), jnp.full(5, -2.0)
    expected = logistic(np.float32(levels), mean, log_scale)
    for dtype in (np.uint8, np.int32, np.float64):
        np.testing.assert_array_equal(logistic(levels.astype(dtype), mean, log_scale), expected)
    logits = jnp.array([0.3, -2.0])
    expected = bernoulli_log_prob(np.array([1.0, 0.0]), logits)
    for value in (np.array([True, False]), np.array([1, 0], np.uint8)):
        np.testing.assert_array_equal(bernoulli_log_prob(value, logits), expected)


SAMPLERS = {
    "bernoulli": (jax.jit(sample_bernoulli), np.arange(2)),
    "categorical": (jax.jit(sample_categorical), np.arange(3)),
    "logistic": (few_levels(sample_discretized_logistic), np.arange(LEVELS)),
    "mixture": (few_levels(sample_discretized_logistic_mixture), np.arange(LEVELS)),
    "rgb": (
        few_levels(sample_discretized_logistic_mixture_rgb),
        np.array(list(itertools.product(range(LEVELS), repeat=3))),
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_as_frequent_as_they_are_probable(name):
    """Within 5 standard deviations of the binomial."""
    log_prob, value, parameters = CASES[name]
    parameters = tuple(np.float32(x) for x in parameters)
    sample, outcomes = SAMPLERS[name]
    num_samples = 40_000
    keys = jax.random.split(KEY, num_samples)
    draw = jax.jit(jax.vmap(lambda key: sample(key, *parameters)))
    samples = np.asarray(draw(keys))
    assert samples.dtype == np.int32
    np.testing.assert_array_equal(draw(keys), samples)
    assert (samples[0] != samples).any()
    of_all = jax.vmap(lambda outcome: log_prob(jnp.broadcast_to(outcome, value.shape), *parameters))
    expected = num_samples * np.exp(np.asarray(of_all(outcomes), np.float64))
    equal = samples[:, None] == outcomes[:, None]
    counts = (equal.all(-1) if name == "rgb" else equal).sum(0)
    assert (counts.sum(0) == num_samples).all()
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected)).all()
    assert (expected > 9).all()


def test_gaussian_samples_have_its_mean_and_deviation_and_follow_its_parameters():
    mean, log_std = jnp.full(40_000, 2.0), jnp.log(3.0)
    samples = jax.jit(sample_gaussian)(KEY, mean, log_std)
    assert abs(samples.mean() - 2) < 5 * 3 / 200
    assert abs(jnp.square(samples - 2).mean() / 9 - 1) < 5 * np.sqrt(2) / 200
    slopes = jax.grad(lambda m, s: sample_gaussian(KEY, m, s).sum(), (0, 1))(mean[:1], log_std)
    np.testing.assert_allclose(slopes[0], [1])
    np.testing.assert_allclose(slopes[1], sample_gaussian(KEY, mean[:1], log_std)[0] - 2, rtol=1e-5)


def test_bits_per_dim_worked_by_hand():
    uniform = jax.jit(categorical_log_prob)(np.arange(12), np.zeros((12, 256), np.float32))
    assert bits_per_dim(uniform.sum(), num_dims=12) == pytest.approx(8, rel=1e-6)
    coins = CASES["bernoulli"][0](np.array([0, 1, 1]), np.zeros(3, np.float32))
    assert bits_per_dim(coins.sum(), num_dims=3) == pytest.approx(1, rel=1e-6)
    # Half of the numbers are known, for the others there are 16 possibilities: 4 / 2 bits.
    assert bits_per_dim(-6 * np.log(16), num_dims=12) == pytest.approx(2)
    bits = bits_per_dim(jnp.array([-80.0, 0.0]), num_dims=784)
    np.testing.assert_allclose(bits, [80 / 543.4273, 0], rtol=1e-6)
    with pytest.raises(UserError, match="num_dims is 0; give how many numbers"):
        bits_per_dim(0.0, num_dims=0)


@pytest.mark.usefixtures("ill_typed")
def test_refuses_shapes_that_would_broadcast_the_values():
    x, row, image = jnp.zeros((4, 4)), jnp.zeros((1, 4)), jnp.zeros((4, 4, 1))
    assert gaussian_log_prob(x, row, 0.0).shape == (4, 4)
    for wrong in (image, jnp.zeros((4, 3)), jnp.zeros((3, 1))):
        with pytest.raises(UserError, match=r"log_std has shape .* for values of shape \(4, 4\)"):
            gaussian_log_prob(x, x, wrong)
    with pytest.raises(UserError, match=r"logits has shape \(4, 4, 1\) for values of shape"):
        bernoulli_log_prob(x, image)
    with pytest.raises(UserError, match=r"logits has shape \(4, 4\) .* give \(4, 4, 4\)"):
        categorical_log_prob(x, x)
    with pytest.raises(UserError, match=r"means has shape \(4, 4\) .* give \(4, 4, 1\)"):
        discretized_logistic_mixture_log_prob(x, image, x, image)
    of_channels = 3 * (jnp.zeros((4, 3, 2)),)
    for value, logits, name in ((x, x[:, :2], "value"), (x[:, :3], x[:3, :2], "logits")):
        with pytest.raises(UserError, match=f"{name} has shape"):
            discretized_logistic_mixture_rgb_log_prob(value, logits, *of_channels)
    with pytest.raises(UserError, match="num_levels is 1; give 2 or more"):
        discretized_logistic_log_prob(x, x, x, num_levels=1)
