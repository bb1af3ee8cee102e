"""WaveNet against a loop in NumPy; what it sees by its Jacobian; one sample at a time."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pixel_models import random_params

from metagen_jax.errors import UserError
from metagen_jax.nets.wavenet import WaveNet

CONDITION = np.array([0.4, -0.7, 1.1])
SMALL = WaveNet(
    3, features=3, skip_features=9, dilations=(1, 3, 2), first_kernel_size=2, num_levels=8
)
WIDE = WaveNet(2, features=2, skip_features=9, dilations=(2, 1), kernel_size=3, first_kernel_size=1)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def codes_of(net, *shape):
    return np.random.default_rng(0).integers(0, net.num_levels, shape)


def by_loop(net, params, codes, condition):
    """One product of a matrix and a vector at a time."""
    params = jax.tree.map(np.asarray, params["params"])

    def dense(name, x, inside=params):
        return x @ inside[name]["kernel"] + inside[name].get("bias", 0)

    values = 2 * codes / (net.num_levels - 1) - 1
    past = np.concatenate([np.zeros(net.first_kernel_size), values])
    x = [dense("first", past[t : t + net.first_kernel_size]) for t in range(len(codes))]
    total = np.zeros((len(codes), net.skip_features))
    for i, dilation in enumerate(net.dilations):
        layer, after = params[f"layers_{i}"], []
        for t in range(len(codes)):
            times = [t - j * dilation for j in reversed(range(net.kernel_size))]
            seen = np.concatenate([x[s] if s >= 0 else np.zeros(net.features) for s in times])
            inner = dense("taps", seen, layer)
            if condition is not None:
                inner = inner + dense("condition", condition, layer)
            a, b = np.split(inner, 2)
            hidden = np.tanh(a) / (1 + np.exp(-b))
            after.append(x[t] + dense("residual", hidden, layer))
            total[t] += dense("skip", hidden, layer)
        x = after
    hidden = np.maximum(dense("hidden", np.maximum(total, 0)), 0)
    return dense("head", hidden)


@pytest.mark.parametrize("net", [SMALL, WIDE])
@pytest.mark.parametrize("condition", [None, CONDITION])
def test_outputs_are_those_of_a_loop(net, condition):
    codes = codes_of(net, 11)
    inputs = (codes,) if condition is None else (codes, condition)
    params = random_params(net, *inputs)
    expected = by_loop(net, params, codes, condition)
    np.testing.assert_allclose(jax.jit(net.apply)(params, *inputs), expected, rtol=1e-10)
    batch = [np.stack([x, x[::-1]]) for x in inputs]
    np.testing.assert_allclose(net.apply(params, *batch)[0], expected, rtol=1e-10)


@pytest.mark.parametrize("net", [SMALL, WIDE])
def test_an_output_depends_on_the_samples_before_it_within_the_receptive_field(net):
    """`SMALL`: 2 + 1 + 3 + 2 samples, `WIDE`: 1 + 2 (2 + 1), with no hole where dilations leave
    none."""
    length = 14
    params = random_params(net, codes_of(net, length))
    assert net.receptive_field == {SMALL: 8, WIDE: 7}[net]
    jacobian = jax.jit(jax.jacobian(lambda x: net.apply(params, x)))
    depends = np.zeros((length, length), bool)
    for x in np.random.default_rng(1).uniform(0, 7, (6, length)):
        depends |= np.abs(jacobian(x)).max(1) > 0
    distance = np.arange(length)[:, None] - np.arange(length)
    np.testing.assert_array_equal(depends, (distance >= 1) & (distance <= net.receptive_field))


@pytest.mark.parametrize("net", [SMALL, WIDE])
@pytest.mark.parametrize("condition", [None, CONDITION])
@pytest.mark.slow
def test_one_sample_at_a_time_gives_the_outputs_of_a_call(net, condition):
    """Longer than the receptive field, so that every row of the cache is used again."""
    codes = codes_of(net, 30)
    inputs = (codes,) if condition is None else (codes, condition)
    params = random_params(net, *inputs)
    step = jax.jit(functools.partial(net.apply, method="next_sample"))
    cache, outputs = net.blank_cache(jnp.dtype(jnp.float64)), []
    for index in range(len(codes)):
        # Before the first there is none; it must not matter what stands there.
        previous = jnp.asarray(codes[index - 1] if index else 5)
        cache, output = step(params, cache, jnp.asarray(index), previous, *inputs[1:])
        outputs.append(output)
    np.testing.assert_allclose(outputs, net.apply(params, *inputs), rtol=1e-10)


def test_values_and_gradients_of_tasks_with_parameters_of_their_own_are_those_of_a_loop():
    codes = codes_of(SMALL, 9)
    tasks = [random_params(SMALL, codes, CONDITION, seed=s) for s in (0, 1)]

    def energy(params):
        return jnp.square(SMALL.apply(params, codes, CONDITION)).sum()

    evaluate = jax.value_and_grad(energy)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *tasks)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *map(jax.jit(evaluate), tasks))
    vmapped = jax.jit(jax.vmap(evaluate))(stacked)
    chex.assert_trees_all_close(vmapped, expected, rtol=1e-9, atol=1e-12)


def test_silence_has_finite_outputs_and_gradients_in_float32():
    with jax.enable_x64(False):
        net = WaveNet(4, dilations=(1, 2))
        codes = np.full(40, 128)
        params = jax.jit(net.init)(jax.random.key(0), codes)

        def loss(params):
            return net.apply(params, codes).sum()

        for x in jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params)):
            assert np.isfinite(x).all()


def test_says_what_is_needed():
    codes = np.zeros(4, int)
    for settings, message in (
        ({"dilations": ()}, r"dilations is \(\); give 1 or more for each layer"),
        ({"dilations": (1, 0)}, r"dilations is \(1, 0\); give 1 or more"),
        ({"kernel_size": 1}, "kernel_size is 1 and first_kernel_size 16; give at least 2 and 1"),
        ({"first_kernel_size": 0}, "first_kernel_size 0; give at least 2 and 1"),
        ({"num_levels": 1}, "num_levels is 1; give 2 or more"),
    ):
        with pytest.raises(UserError, match=message):
            WaveNet(1, **settings).init(jax.random.key(0), codes)
