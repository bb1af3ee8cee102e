"""Flow matching: a velocity field that carries noise to data, its samples and likelihood.

    loss_fn = flow_matching_loss(net.apply)                     # batches (examples, conditions)
    x = flow_matching_sample(key, net.apply, params, condition, shape=(28, 28, 1), num_steps=50)
    log_prob = flow_matching_log_prob(net.apply, num_steps=50)  # params, (x, condition), key

Time runs from 0, where x is standard normal noise, to 1, where it is data. All but the loss take
ONE example.

Lipman, Chen, Ben-Hamu, Nickel, Le: Flow Matching for Generative Modeling, 2023.
Chen, Rubanova, Bettencourt, Duvenaud: Neural Ordinary Differential Equations, 2018.
Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud: FFJORD, 2019.
Pokle, Muckley, Chen, Karrer: Training-free Linear Image Inverses via Flows, 2024.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from metagen_jax.errors import UserError
from metagen_jax.generative.likelihoods import gaussian_log_prob
from metagen_jax.generative.maximum_likelihood import LogProb
from metagen_jax.gradients import count_tasks, task_keys
from metagen_jax.types import Batch, LossFn, Metrics, Params, PRNGKey

Velocity = Callable[[Params, Array, Array, Any], Array]
"""`velocity(params, x, t, condition) -> dx/dt`, of the shape of x, for ONE example at time t in
[0, 1]. The condition is any pytree of arrays, or None."""


def flow_matching_loss(velocity: Velocity, *, sigma_min: float = 0.0) -> LossFn:
    """The squared error, an element, of the velocity along straight paths from noise to data.

    `1/N sum_n mean (v(psi_t, t) - (x_n - (1 - sigma_min) eps))^2`, equation 23 of Lipman et al.
    2023, at `psi_t = (1 - (1 - sigma_min) t) eps + t x_n`, equation 22, with noise eps and t
    uniform in [0, 1).

    Args:
      velocity: `(params, x, t, condition) -> dx/dt` of one example.
      sigma_min: standard deviation of the noise that is left at t = 1; 0 for straight paths that
        end in the data.

    Returns:
      A loss over batches `(examples (N, ...), conditions)`, conditions any pytree with leading axis
      `N`, or None. Its key may be one key, of which example `n` gets `fold_in(key, n)`, or `N`
      keys, as `data_parallel` gives them. It raises a UserError for a velocity of another shape
      than x.

    Raises:
      UserError: if `sigma_min` is not in [0, 1).
    """
    if not 0 <= sigma_min < 1:
        raise UserError(f"sigma_min is {sigma_min}; give 0, or a small number below 1")

    def of_one(params: Params, example: Array, condition: Any, key: PRNGKey) -> Array:
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, example.shape, example.dtype)
        t = jax.random.uniform(time_key, (), example.dtype)
        x = (1 - (1 - sigma_min) * t) * noise + t * example
        predicted = _at(velocity, params, condition)(x, t)
        return jnp.square(predicted - (example - (1 - sigma_min) * noise)).mean()

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        examples, conditions = batch
        keys = task_keys(key, count_tasks(batch)) if key.ndim == 0 else key
        in_axes = (None, 0, 0, 0)
        return jax.vmap(of_one, in_axes)(params, examples, conditions, keys).mean(), {}

    return loss_fn


def dequantized_matching_loss(
    velocity: Velocity, *, num_levels: int = 256, sigma_min: float = 0.0
) -> LossFn:
    """`flow_matching_loss` of discrete data, between -1 and 1 by uniform noise `u`.

    Of levels `k` it takes `2 (k + u) / num_levels - 1`; so `dequantized_log_prob` of
    `flow_matching_log_prob` is a bound on their log-probability.

    Args:
      velocity, sigma_min: as in `flow_matching_loss`.
      num_levels: levels 0..num_levels-1.

    Returns:
      As `flow_matching_loss`; the key of an example is split, for `u` and for that.
    """
    of_reals = flow_matching_loss(velocity, sigma_min=sigma_min)

    def to_reals(key: PRNGKey, levels: Array) -> Array:
        return 2 * (levels + jax.random.uniform(key, levels.shape)) / num_levels - 1

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        examples, conditions = batch
        keys = task_keys(key, count_tasks(examples)) if key.ndim == 0 else key
        noise_keys, loss_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        reals = jax.vmap(to_reals)(noise_keys, examples)
        return of_reals(params, (reals, conditions), loss_keys)

    return loss_fn


def flow_matching_sample(
    key: PRNGKey,
    velocity: Velocity,
    params: Params,
    condition: Any = None,
    *,
    shape: tuple[int, ...],
    num_steps: int,
) -> Float[Array, "*shape"]:
    """ONE sample: noise carried from time 0 to 1 by `integrate`.

    Args:
      key: of the noise.
      velocity: `(params, x, t, condition) -> dx/dt`.
      params: of the velocity.
      condition: any pytree of arrays, or None.
      shape: of the sample.
      num_steps: of the integration.

    Raises:
      UserError: for fewer than one step, or a velocity of another shape.
    """
    noise = jax.random.normal(key, shape)
    return integrate(_at(velocity, params, condition), noise, num_steps=num_steps)


def flow_matching_log_prob(
    velocity: Velocity, *, num_steps: int, num_probes: int | None = None
) -> LogProb:
    """The log-density of the flow by the instantaneous change of variables.

    `log p(x_1) = log N(x_0; 0, I) - int_0^1 tr(dv/dx) dt` along the path that ends in x_1, which is
    followed back to the noise: equation 8 of Chen et al. 2018.

    Args:
      velocity: `(params, x, t, condition) -> dx/dt`.
      num_steps: of the integration, whose error is of second order: halve the steps to see it.
      num_probes: None for the exact trace, of as many products with the Jacobian as x has numbers.
        Otherwise the mean of `e^T (dv/dx) e` over so many vectors e of random signs, the same all
        along the path (Hutchinson's estimate, as in section 3.1 of Grathwohl et al. 2019), which is
        right on average in the logarithm.

    Returns:
      `log_prob(params, (x, condition), key)` of ONE example, in nats per unit of x, summed; ready
      for `negative_log_likelihood_loss`. The key gives the probes, and is not used without them.

    Raises:
      UserError: for fewer than one step or probe.
    """
    _check_positive(num_steps=num_steps)
    if num_probes is not None:
        _check_positive(num_probes=num_probes)

    def log_prob(params: Params, example: Any, key: PRNGKey) -> Float[Array, ""]:
        x, condition = example
        field = _at(velocity, params, condition)
        if num_probes is None:
            probes = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
            weight = 1.0
        else:
            probes = jax.random.rademacher(key, (num_probes, *x.shape), x.dtype)
            weight = 1 / num_probes

        def with_trace(state: tuple[Array, Array], t: Array) -> tuple[Array, Array]:
            x, _ = state
            velocity, jacobian = jax.linearize(lambda x: field(x, t), x)
            return velocity, weight * jnp.sum(probes * jax.vmap(jacobian)(probes))

        start = (x, jnp.zeros((), x.dtype))
        noise, minus_trace = integrate(with_trace, start, num_steps=num_steps, interval=(1.0, 0.0))
        return gaussian_log_prob(noise, 0.0, 0.0).sum() + minus_trace

    return log_prob


def integrate(
    field: Callable[[PyTree, Array], PyTree],
    state: PyTree,
    *,
    num_steps: int,
    interval: tuple[float, float] = (0.0, 1.0),
) -> PyTree:
    """The end of `dx/dt = field(x, t)` by Heun's method: `num_steps` equal steps of second order.

    `x' = x + h/2 (k_1 + k_2)`, `k_1 = field(x, t)`, `k_2 = field(x + h k_1, t + h)`. Each step
    evaluates the field twice, the last at the end of the interval. Differentiable to any order.

    Args:
      field: `(state, t) -> d state/dt`.
      state: at the start, any pytree of floating-point arrays.
      num_steps: how many steps; the error falls with its square.
      interval: start and end in time; an end before the start goes backwards.

    Raises:
      UserError: for fewer than one step.
    """
    _check_positive(num_steps=num_steps)
    start, end = interval
    size = (end - start) / num_steps

    def step(state: PyTree, i: Array) -> tuple[PyTree, None]:
        first = field(state, start + i * size)
        ahead = jax.tree.map(lambda x, k: x + size * k, state, first)
        second = field(ahead, start + (i + 1) * size)
        return jax.tree.map(lambda x, a, b: x + size / 2 * (a + b), state, first, second), None

    dtype = jnp.result_type(*jax.tree.leaves(state))
    return jax.lax.scan(step, state, jnp.arange(num_steps, dtype=dtype))[0]


def inpaint(
    key: PRNGKey,
    velocity: Velocity,
    params: Params,
    example: Float[Array, "*shape"],
    known: Bool[Array, "*shape"],
    condition: Any = None,
    *,
    num_steps: int,
    guidance: float = 1.0,
) -> Float[Array, "*shape"]:
    """A sample that agrees with what is known of ONE example, without further training.

    Known elements y go straight from their noise to what they are, `x_t = (1 - t) eps + t y`; the
    others follow the velocity and a pull that makes the data which the flow expects,
    `x + (1 - t) v(x, t)`, agree with y: for these elements

        dx/dt = v + guidance (1 - t) (t^2 + (1 - t)^2) / t  (dv/dx)^T known (y - eps - v),

    the gradient correction of Pokle et al. 2024 for straight paths and exact observations. It takes
    the variance of the data given x_t for that of independent standard normals,
    `(1 - t)^2 / (t^2 + (1 - t)^2)`, and so samples the conditional distribution approximately.

    Args:
      key: of the noise.
      velocity: `(params, x, t, condition) -> dx/dt`.
      params: of the velocity.
      example: what is not known of it is not used, and may be anything finite.
      known: which elements are, True or False.
      condition: any pytree of arrays, or None.
      num_steps: of the integration.
      guidance: the weight of the pull; 0 leaves the known elements to act through the velocity
        alone.

    Raises:
      UserError: for fewer than one step, or shapes that differ.
    """
    if known.shape != example.shape:
        raise UserError(
            f"known has shape {known.shape} for an example of shape {example.shape}; say of each "
            "element whether it is known"
        )
    field = _at(velocity, params, condition)
    noise = jax.random.normal(key, example.shape, example.dtype)
    straight = example - noise

    def guided(x: Array, t: Array) -> Array:
        expected, pull_back = jax.vjp(lambda x: field(x, t), x)
        (pull,) = pull_back(jnp.where(known, straight - expected, 0))
        # At t = 0 data and noise are independent: the pull of an exact velocity is zero there.
        weight = (1 - t) * (t**2 + (1 - t) ** 2) * jnp.where(t > 0, 1 / jnp.where(t > 0, t, 1), 0)
        return jnp.where(known, straight, expected + guidance * weight * pull)

    sample = integrate(guided, noise, num_steps=num_steps)
    return jnp.where(known, example, sample)


def _at(velocity: Velocity, params: Params, condition: Any) -> Callable[[Array, Array], Array]:
    """The field `(x, t) -> dx/dt` of one condition."""

    def field(x: Array, t: Array) -> Array:
        change = velocity(params, x, t, condition)
        if jnp.shape(change) != x.shape:
            raise UserError(
                f"the velocity has shape {jnp.shape(change)} for x of shape {x.shape}; give one "
                "number for each"
            )
        return change

    return field


def _check_positive(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise UserError(f"{name} is {value}; give 1 or more")
