"""A learned optimiser: a small network that is asked for the step of each coordinate.

    rule_params = init_learned_optimizer(key)
    optimizer = learned_optimizer(rule_params)                 # an optax optimiser like any other

It is a rule as those of `metagen_jax.meta.update_rules`, for parameters of any shapes.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Int32

from metagen_jax.errors import UserError
from metagen_jax.types import Params, PRNGKey

# In steps. All have saturated after a hundred steps, so that time brings nothing new to an
# optimiser that goes on longer than it was trained for.
_TIMESCALES = (1.0, 3.0, 10.0, 30.0)
# Of a leaf's root mean square, so that biases, which begin at zero, can leave it.
_FLOOR = 0.1
# Of a gradient's size, so that its square is finite in float32.
_LARGEST = 1e15


class LearnedOptimizerParams(NamedTuple):
    """What a learned optimiser has learned.

    Attributes:
      decay_logits: `(decays,)`, the logits of the decays of its running averages.
      layers: kernels `(inputs, outputs)` and biases of the network that sees each coordinate.
    """

    decay_logits: Float[Array, " decays"]
    layers: tuple[tuple[Float[Array, "inputs outputs"], Float[Array, " outputs"]], ...]


class LearnedOptimizerState(NamedTuple):
    """What a learned optimiser remembers.

    Attributes:
      steps: taken so far.
      momentum: `(parameters, decays)`, running averages of the gradient.
      second_moment: `(parameters, decays)`, those of its square.
      length: `(parameters,)`, what steps are relative to: r of `learned_optimizer`.
    """

    steps: Int32[Array, ""]
    momentum: Float[Array, "parameters decays"]
    second_moment: Float[Array, "parameters decays"]
    length: Float[Array, " parameters"]


def init_learned_optimizer(
    key: PRNGKey,
    *,
    hidden: Sequence[int] = (32, 32),
    decays: Sequence[float] = (0.5, 0.9, 0.99),
) -> LearnedOptimizerParams:
    """An untrained optimiser, whose network has a last layer of zeros: it leaves all as it is.

    Args:
      key: a typed key.
      hidden: units of each hidden layer.
      decays: of the running averages, where their training begins; between 0 and 1.

    Raises:
      UserError: if a decay is not between 0 and 1, or there is none.
    """
    if not decays or not all(0 < decay < 1 for decay in decays):
        raise UserError(f"decays are {tuple(decays)}; give one or more between 0 and 1")
    num_features = 2 + (2 + len(decays)) + len(decays) + 2 + len(_TIMESCALES)
    sizes = (num_features, *hidden, 2)
    inits = [*(jax.nn.initializers.lecun_normal() for _ in hidden), jax.nn.initializers.zeros]
    layers = tuple(
        (init(layer_key, shape), jnp.zeros(shape[1]))
        for init, layer_key, *shape in zip(
            inits, jax.random.split(key, len(inits)), sizes[:-1], sizes[1:], strict=True
        )
    )
    return LearnedOptimizerParams(jax.scipy.special.logit(jnp.array(decays)), layers)


def learned_optimizer(
    rule_params: LearnedOptimizerParams,
    *,
    scale: float = 0.05,
    log_range: float = 3.0,
    epsilon: float = 1e-10,
) -> optax.GradientTransformation:
    """An optax optimiser whose step is a small network's answer, asked for each coordinate.

    `theta' = theta - scale * r * tanh(direction) * exp(log_range * tanh(magnitude))`, with
    `r = sqrt(mean(theta_0^2) + 0.1^2)` over the leaf at its start, so that wide layers, whose
    weights are small, take small steps. With `network(odd, even) = (d, m)` the direction is
    `(d(odd, even) - d(-odd, even)) / 2`, the magnitude `(m(odd, even) + m(-odd, even)) / 2`: turned
    signs turn the step, and where gradients are but noise it has no drift. The features of one
    coordinate, odd where they have its sign, are

    - log-magnitude and sign of its gradient: `log_and_sign` (Andrychowicz et al. 2016);
    - for each decay its momentum m, relative to the root mean square of the whole leaf's, and
      `m / sqrt(v)` with v its second moment, both free of their initial bias as in Adam;
    - gradient and parameter, each relative to the root mean square of its leaf, and the logarithms
      of these two roots;
    - the time, `tanh(steps / tau)` for tau of 1, 3, 10 and 30 steps

    (after Metz et al. 2020, Tasks, stability, architecture, and compute, where the step has neither
    r nor tanh nor symmetry). All features but the logarithms are bounded, and so is the step: by
    `scale * r * e^log_range`, whatever gradients a trained rule meets, infinite ones included, but
    not NaN. The cost is some thousand products for each parameter.

    Args:
      rule_params: see `init_learned_optimizer`.
      scale: the size of a step, relative to r, where the network says one and zero.
      log_range: the logarithm of the factor by which the magnitude may enlarge or reduce it.
      epsilon: added to mean squares and second moments below a root, so that gradients of zero have
        finite derivatives; gradients well below its root seem small to the network.

    Returns:
      A transformation for any pytree of floating-point arrays. Its `update` asks for `params` and
      raises a UserError without.
    """
    decays = jax.nn.sigmoid(rule_params.decay_logits)

    def init(params: Params) -> LearnedOptimizerState:
        flat, _ = ravel_pytree(params)
        zeros = jnp.zeros((flat.size, len(decays)), jnp.result_type(flat, decays))
        squares = _leaf_means(jnp.square(flat)[:, None], _sizes(params))[:, 0]
        length = jnp.sqrt(squares + _FLOOR**2)
        return LearnedOptimizerState(jnp.zeros((), jnp.int32), zeros, zeros, length)

    def update(updates: Params, state: Any, params: Params | None = None):
        if params is None:
            raise UserError("params is None; a learned optimiser's update needs the parameters")
        # All leaves at once: one by one, a step would compile and run several times as long.
        gradient, _ = ravel_pytree(updates)
        gradient = jnp.clip(gradient, -_LARGEST, _LARGEST)
        parameter, unravel = ravel_pytree(params)
        time = state.steps + 1
        momentum = decays * state.momentum + (1 - decays) * gradient[:, None]
        second_moment = decays * state.second_moment + (1 - decays) * jnp.square(gradient)[:, None]
        unbiased = 1 / (1 - decays**time)
        raw = jnp.column_stack([parameter, gradient, momentum * unbiased])
        mean_squares = _leaf_means(raw**2, _sizes(params))
        odd, even = _features(raw, mean_squares, second_moment * unbiased, time, epsilon)
        answers = (
            _network(rule_params.layers, jnp.concatenate([signed, even], axis=1))
            for signed in (odd, -odd)
        )
        (d, m), (d_turned, m_turned) = (answer.T for answer in answers)
        size = jnp.exp(log_range * jnp.tanh((m + m_turned) / 2))
        step = -scale * state.length * jnp.tanh((d - d_turned) / 2) * size
        state = LearnedOptimizerState(time, momentum, second_moment, state.length)
        return unravel(step.astype(parameter.dtype)), state

    return optax.GradientTransformation(init, update)


def log_and_sign(x: Float[Array, "*shape"], *, p: float = 10.0) -> Float[Array, "*shape 2"]:
    """Numbers of any size as two numbers between -1 and 1 or not far beyond.

    `(log|x| / p, sign(x))` where `|x| >= e^-p`, `(-1, e^p x)` elsewhere: appendix A of Andrychowicz
    et al. 2016, Learning to learn by gradient descent by gradient descent.

    Args:
      x: gradients.
      p: how many factors of e to tell apart below one.
    """
    large = jnp.abs(x) >= math.exp(-p)
    # The logarithm's derivative at zero would be NaN even where it isn't taken.
    log = jnp.log(jnp.abs(jnp.where(large, x, 1))) / p
    first = jnp.where(large, log, -1)
    second = jnp.where(large, jnp.sign(x), math.exp(p) * x)
    return jnp.stack([first, second], axis=-1)


def _sizes(params: Params) -> list[int]:
    return [x.size for x in jax.tree.leaves(params)]


def _leaf_means(x: Float[Array, "n k"], sizes: Sequence[int]) -> Float[Array, "n k"]:
    """In the place of each row the mean over the rows of its leaf; the leaves have these sizes."""
    ends = list(itertools.accumulate(sizes))[:-1]
    means = [jnp.broadcast_to(leaf.mean(0), leaf.shape) for leaf in jnp.split(x, ends)]
    return jnp.concatenate(means)


def _features(
    raw: Float[Array, "n k"],
    mean_squares: Float[Array, "n k"],
    second_moment: Float[Array, "n decays"],
    time: Int[Array, ""],
    epsilon: float,
) -> tuple[Float[Array, "n odd"], Float[Array, "n even"]]:
    """What the network sees of each coordinate: what has its sign, and what has not.

    `raw` holds parameter, gradient and momenta, `mean_squares` the means of their squares over the
    leaf.
    """
    _, gradient, momentum = jnp.split(raw, (1, 2), axis=1)
    log, sign = jnp.split(log_and_sign(gradient[:, 0]), 2, axis=1)
    times = jnp.tanh(time / jnp.array(_TIMESCALES))
    odd = [
        sign,
        raw * jax.lax.rsqrt(mean_squares + epsilon),
        momentum * jax.lax.rsqrt(second_moment + epsilon),
    ]
    even = [
        log,
        # Of parameter and gradient; scaled as `log_and_sign` scales, being squares.
        jnp.log(mean_squares[:, :2] + epsilon) / 20,
        jnp.broadcast_to(times, (len(raw), len(times))),
    ]
    return jnp.concatenate(odd, axis=1), jnp.concatenate(even, axis=1)


def _network(layers, x: Float[Array, "n features"]) -> Float[Array, "n 2"]:
    for kernel, bias in layers[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    kernel, bias = layers[-1]
    return x @ kernel + bias
