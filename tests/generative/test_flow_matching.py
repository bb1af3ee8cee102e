"""Flow matching against the closed form of a Gaussian, to the order of the integrator."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references

from metagen_jax.errors import UserError
from metagen_jax.generative.flow_matching import (
    dequantized_matching_loss,
    flow_matching_log_prob,
    flow_matching_loss,
    flow_matching_sample,
    inpaint,
    integrate,
)
from metagen_jax.generative.maximum_likelihood import negative_log_likelihood_loss
from metagen_jax.gradients import gradients, task_keys
from metagen_jax.meta.maml import maml_loss
from metagen_jax.parallel import data_parallel
from metagen_jax.types import Episode

KEY = jax.random.key(0)
MEAN = np.array([0.5, -1.0])
COVARIANCE = np.array([[1.2, 0.5], [0.5, 0.4]])


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values)) @ vectors.T


def gaussian_velocity(params, x, t, condition):
    """`E[x_1 - x_0 | x_t]`, linear in x, of a Gaussian with these moments, shifted by a condition.

    All matrices commute, so that its path is `x_t = t m + ((1 - t)^2 + t^2 C)^(1/2) x_0`.
    """
    mean = params["mean"] + (0 if condition is None else condition)
    covariance, eye = params["covariance"], jnp.eye(len(mean))
    at_t = (1 - t) ** 2 * eye + t**2 * covariance
    return mean + (t * covariance - (1 - t) * eye) @ jnp.linalg.solve(at_t, x - t * mean)


def gaussian():
    return {"mean": jnp.asarray(MEAN), "covariance": jnp.asarray(COVARIANCE)}


def tanh_velocity(params, x, t, condition):
    """A small net: smooth, with a Jacobian that is neither diagonal nor symmetric."""
    hidden = jnp.tanh(params["w"] @ x + params["time"] * t + params["bias"])
    shift = 0.0 if condition is None else condition
    return params["v"] @ hidden + shift


def net(seed=0, num_dims=2):
    rng = np.random.default_rng(seed)
    shapes = {"w": (5, num_dims), "time": (5,), "bias": (5,), "v": (num_dims, 5)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return jax.tree.map(jnp.asarray, {**params, "v": 0.6 * params["v"]})


def data(seed=0, num=4, num_dims=2):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(num, num_dims))), jnp.asarray(rng.normal(size=(num, 1)))


def assert_order_two(errors):
    """Errors of so many, twice and four times as many steps."""
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    assert ((ratios > 3.5) & (ratios < 4.5)).all(), ratios


def test_samples_of_a_gaussian_are_exact_to_second_order(float64):
    noise = jax.random.normal(KEY, (2,))
    expected = MEAN + root(COVARIANCE) @ noise
    errors = []
    for num_steps in (20, 40, 80):
        sample = jax.jit(
            functools.partial(
                flow_matching_sample, velocity=gaussian_velocity, shape=(2,), num_steps=num_steps
            )
        )(KEY, params=gaussian())
        errors.append(np.abs(sample - expected).max())
    assert_order_two(errors)
    assert errors[-1] < 1e-4


def test_moments_of_samples_are_those_of_the_data(float64):
    keys = jax.random.split(KEY, 4000)
    sample = functools.partial(
        flow_matching_sample, velocity=gaussian_velocity, shape=(2,), num_steps=30
    )
    condition = jnp.array([1.0, 2.0])
    samples = jax.jit(jax.vmap(lambda key: sample(key, params=gaussian(), condition=condition)))(
        keys
    )
    error = np.sqrt(np.diag(COVARIANCE) / len(keys))
    assert (np.abs(samples.mean(0) - MEAN - condition) < 4 * error).all()
    np.testing.assert_allclose(np.cov(samples, rowvar=False), COVARIANCE, atol=0.08)


def test_log_density_of_a_gaussian_is_exact_to_second_order(float64):
    x = jnp.array([1.5, -0.2])
    deviation = x - MEAN
    _, log_det = np.linalg.slogdet(2 * np.pi * COVARIANCE)
    expected = -0.5 * (deviation @ np.linalg.solve(COVARIANCE, deviation) + log_det)
    errors = []
    for num_steps in (100, 200, 400):
        log_prob = jax.jit(flow_matching_log_prob(gaussian_velocity, num_steps=num_steps))
        errors.append(abs(log_prob(gaussian(), (x, None), KEY) - expected))
    assert_order_two(errors)
    assert errors[-1] < 1e-5
    shifted = jax.jit(flow_matching_log_prob(gaussian_velocity, num_steps=80))
    shift = jnp.array([1.0, -2.0])
    np.testing.assert_allclose(shifted(gaussian(), (x + shift, shift), KEY), expected, rtol=1e-3)


def test_integrate_by_hand_and_back(float64):
    """One step of Heun for `x' = x + t` from 1 over [0, 1/2]: k_1 = 1, k_2 = 3/2 + 1/2."""

    def field(state, t):
        return {"x": state["x"] + t}

    end = integrate(field, {"x": jnp.array(1.0)}, num_steps=1, interval=(0.0, 0.5))
    np.testing.assert_allclose(end["x"], 1 + 0.5 * (1 + 2) / 2, rtol=1e-15)
    there = integrate(field, {"x": jnp.array(1.0)}, num_steps=200)
    np.testing.assert_allclose(there["x"], 2 * np.e - 2, rtol=1e-5)
    back = integrate(field, there, num_steps=200, interval=(1.0, 0.0))
    np.testing.assert_allclose(back["x"], 1, rtol=1e-5)


def test_estimate_of_the_trace_is_unbiased_and_exact_for_all_signs(float64):
    """Of two dimensions there are two estimates, for signs alike and unlike, equally likely."""
    x = data()[0][0]
    keys = jax.random.split(KEY, 64)
    exact = flow_matching_log_prob(tanh_velocity, num_steps=10)(net(), (x, None), KEY)
    one = flow_matching_log_prob(tanh_velocity, num_steps=10, num_probes=1)
    each = np.asarray(jax.jit(jax.vmap(lambda key: one(net(), (x, None), key)))(keys))
    values, counts = np.unique(each.round(10), return_counts=True)
    assert len(values) == 2
    assert values[1] - values[0] > 0.1
    assert counts.min() > 16
    np.testing.assert_allclose(values.mean(), exact, rtol=1e-9)
    both = flow_matching_log_prob(tanh_velocity, num_steps=10, num_probes=500)
    spread = (values[1] - values[0]) / 2 / np.sqrt(500)
    assert abs(jax.jit(both)(net(), (x, None), KEY) - exact) < 5 * spread


@pytest.mark.parametrize("condition", [None, 0.7])
def test_density_of_a_net_integrates_to_one(condition):
    """In two dimensions on a grid; conditional on either value too."""
    side = jnp.linspace(-8, 8, 65)
    grid = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(-1, 2)
    params = jax.tree.map(jnp.float32, net())
    shift = None if condition is None else jnp.full(1, condition)
    log_prob = flow_matching_log_prob(tanh_velocity, num_steps=40)
    log_probs = jax.jit(jax.vmap(lambda x: log_prob(params, (x, shift), KEY)))(grid)
    mass = np.exp(np.float64(log_probs)).sum() * (16 / 64) ** 2
    assert abs(mass - 1) < 1e-3


@pytest.mark.parametrize("sigma_min", [0.0, 0.1])
@pytest.mark.slow
def test_loss_equals_a_loop_over_examples(float64, sigma_min):
    params, (examples, conditions) = net(), data()
    loss_fn = flow_matching_loss(tanh_velocity, sigma_min=sigma_min)
    total = 0.0
    for n in range(4):
        noise_key, time_key = jax.random.split(jax.random.fold_in(KEY, n))
        noise, t = jax.random.normal(noise_key, (2,)), jax.random.uniform(time_key)
        x = (1 - t + sigma_min * t) * noise + t * examples[n]
        target = examples[n] - (1 - sigma_min) * noise
        error = tanh_velocity(params, x, t, conditions[n]) - target
        total += np.mean(np.square(error)) / 4
    for function in (loss_fn, jax.jit(loss_fn)):
        loss, metrics = function(params, (examples, conditions), KEY)
        np.testing.assert_allclose(loss, total, rtol=1e-12)
        assert metrics == {}


@pytest.mark.slow
def test_velocity_of_the_closed_form_is_the_best(float64):
    """The gradient of the expected loss by its moments is zero, within five standard errors."""
    root_covariance = jnp.asarray(root(COVARIANCE))
    examples = MEAN + jax.random.normal(KEY, (20_000, 2)) @ root_covariance
    loss_fn = flow_matching_loss(gaussian_velocity)

    def one(params, example, key):
        return loss_fn(params, (example[None], None), key)[0]

    keys = jax.random.split(jax.random.key(1), len(examples))
    each = jax.jit(jax.vmap(jax.grad(one), in_axes=(None, 0, 0)))(gaussian(), examples, keys)
    for grads in jax.tree.leaves(each):
        error = grads.std(0) / np.sqrt(len(examples))
        assert (np.abs(grads.mean(0)) < 5 * error + 1e-12).all()
    grads = gradients(loss_fn)({**gaussian(), "mean": MEAN + 1.0}, (examples, None), KEY)[0]
    assert (np.abs(grads["mean"]) > 0.05).all()


@pytest.mark.slow
def test_second_order_through_maml_equals_finite_differences(float64):
    for loss_fn in (
        flow_matching_loss(tanh_velocity),
        negative_log_likelihood_loss(flow_matching_log_prob(tanh_velocity, num_steps=3)),
    ):
        meta_loss = maml_loss(loss_fn, inner_optimizer=optax.sgd(0.1), num_steps=2)
        episode = Episode(data(num=2), data(1, num=2))
        value = jax.jit(lambda params: meta_loss(params, episode, KEY)[0])  # noqa: B023
        numerical = references.finite_differences(value, net(), step=1e-3)
        actual = jax.jit(jax.grad(value))(net())
        chex.assert_trees_all_close(actual, numerical, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_vmap_over_tasks_of_parameters_equals_a_loop(float64):
    """Loss, sample, log-density and the gradients of each."""
    log_prob = flow_matching_log_prob(tanh_velocity, num_steps=4)

    def everything(params, batch, key):
        def sample(params):
            x = flow_matching_sample(
                key, tanh_velocity, params, batch[1][0], shape=(2,), num_steps=4
            )
            return x.sum(), x

        example = jax.tree.map(lambda x: x[0], batch)
        return (
            gradients(flow_matching_loss(tanh_velocity))(params, batch, key),
            jax.value_and_grad(sample, has_aux=True)(params),
            jax.value_and_grad(log_prob)(params, example, key),
        )

    tasks = [(net(seed), data(seed)) for seed in range(3)]
    keys = jax.random.split(KEY, 3)
    together = jax.jit(jax.vmap(everything))(*jax.tree.map(lambda *x: jnp.stack(x), *tasks), keys)
    one = jax.jit(everything)
    alone = [one(*task, key) for task, key in zip(tasks, keys, strict=True)]
    chex.assert_trees_all_close(
        together, jax.tree.map(lambda *x: jnp.stack(x), *alone), rtol=1e-11, atol=1e-12
    )


@pytest.mark.slow
def test_loss_over_devices_is_the_same_as_on_one(float64):
    grad_fn = gradients(flow_matching_loss(tanh_velocity))
    batch = data(num=8)
    parallel = data_parallel(grad_fn, devices=jax.devices()[:4])(net(), batch, KEY)
    chex.assert_trees_all_close(parallel, grad_fn(net(), batch, KEY), rtol=1e-11, atol=1e-13)


@pytest.mark.slow
def test_finite_at_extreme_examples_in_float32():
    params = jax.tree.map(jnp.float32, net())
    log_prob = flow_matching_log_prob(tanh_velocity, num_steps=4)
    grad_fn = jax.jit(jax.value_and_grad(log_prob, argnums=(0, 1)))
    for size in (0.0, 1e4, -1e4):
        example = (jnp.full(2, size), jnp.zeros(1))
        results = [grad_fn(params, example, KEY)]
        batch = jax.tree.map(lambda x: x[None], example)
        results.append(gradients(flow_matching_loss(tanh_velocity))(params, batch, KEY))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(results))


def test_inpainting_keeps_what_is_known_and_samples_the_rest_given_it(float64):
    """Of a Gaussian: nearer to the conditional mean than without the pull."""
    known, example = jnp.array([True, False]), jnp.array([2.0, jnp.nan])
    example = jnp.where(known, example, 0.0)
    expected = MEAN[1] + COVARIANCE[1, 0] / COVARIANCE[0, 0] * (2.0 - MEAN[0])
    keys = jax.random.split(KEY, 1000)
    errors = []
    for guidance in (0.0, 1.0):
        fill = functools.partial(inpaint, num_steps=40, guidance=guidance)
        samples = jax.jit(
            jax.vmap(lambda key: fill(key, gaussian_velocity, gaussian(), example, known))  # noqa: B023
        )(keys)
        np.testing.assert_array_equal(samples[:, 0], 2.0)
        errors.append(abs(samples[:, 1].mean() - expected))
    assert errors[1] < 0.1
    assert errors[1] < 0.5 * errors[0]


def test_inpainting_of_nothing_is_a_sample_and_of_all_is_the_example(float64):
    example = jnp.array([2.0, -1.0])
    fill = jax.jit(functools.partial(inpaint, velocity=gaussian_velocity, num_steps=10))
    nothing = fill(KEY, params=gaussian(), example=example, known=jnp.zeros(2, bool))
    sample = flow_matching_sample(KEY, gaussian_velocity, gaussian(), shape=(2,), num_steps=10)
    np.testing.assert_allclose(nothing, sample, rtol=1e-12)
    everything = fill(KEY, params=gaussian(), example=example, known=jnp.ones(2, bool))
    np.testing.assert_array_equal(everything, example)


@pytest.mark.usefixtures("ill_typed")
def test_says_what_is_needed():
    def wrong(params, x, t, condition):
        return x.sum()

    batch = (jnp.zeros((3, 2)), None)
    with pytest.raises(UserError, match=r"velocity has shape \(\) for x of shape \(2,\); give one"):
        flow_matching_loss(wrong)({}, batch, KEY)
    with pytest.raises(UserError, match="sigma_min is 1; give 0, or a small number below 1"):
        flow_matching_loss(wrong, sigma_min=1)
    for name, options in (("num_steps", {"num_steps": 0}), ("num_probes", {"num_steps": 1})):
        with pytest.raises(UserError, match=f"{name} is 0; give 1 or more"):
            flow_matching_log_prob(wrong, **{**options, name: 0})
    with pytest.raises(UserError, match=r"known has shape \(2,\) for an example of shape \(3,\)"):
        inpaint(KEY, wrong, {}, jnp.zeros(3), jnp.ones(2, bool), num_steps=1)


@pytest.mark.parametrize("num_levels", [2, 256])
def test_levels_are_matched_as_numbers_between_minus_one_and_one(num_levels):
    def velocity(params, x, t, condition):
        del t
        return params * x + condition

    keys = jax.random.split(KEY, 3)
    levels = jnp.array([[0, 1], [1, 1], [num_levels - 1, 0]], jnp.uint8)
    conditions = jnp.array([0.0, 1.0, 2.0])
    loss_fn = dequantized_matching_loss(velocity, num_levels=num_levels)
    loss, metrics = jax.jit(loss_fn)(0.3, (levels, conditions), keys)
    halves = [jax.random.split(key) for key in keys]
    noise = np.stack([jax.random.uniform(key, (2,)) for key, _ in halves])
    reals = (np.asarray(levels, np.float32) + noise) / num_levels * 2 - 1
    loss_keys = jnp.stack([key for _, key in halves])
    expected, _ = flow_matching_loss(velocity)(0.3, (jnp.asarray(reals), conditions), loss_keys)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics == {}
    # One key is one for each example.
    together, _ = loss_fn(0.3, (levels, conditions), KEY)
    alone, _ = loss_fn(0.3, (levels, conditions), task_keys(KEY, 3))
    assert together == alone
