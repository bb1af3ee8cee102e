"""Densities of two numbers whose logarithm is known, to draw and to compare models with.

All lie within [-5, 5] x [-5, 5] but for less than 1e-6 of their mass.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import logsumexp
from jaxtyping import Array, Float

from metagen_jax.generative.likelihoods import gaussian_log_prob
from metagen_jax.types import PRNGKey


class ToyDensity(NamedTuple):
    """A density of two numbers."""

    sample: Callable[[PRNGKey], Float[Array, "2"]]
    """`sample(key) -> x (2,)`, ONE draw."""

    log_prob: Callable[[Float[Array, "2"]], Float[Array, ""]]
    """`log_prob(x) -> nats per unit of area`, exact."""


_RADIUS, _STD = 3.0, 0.25
_ANGLES = np.arange(8) * np.pi / 4
_CENTRES = _RADIUS * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


def _sample_gaussians(key: PRNGKey) -> Float[Array, "2"]:
    choice_key, noise_key = jax.random.split(key)
    centre = jnp.asarray(_CENTRES)[jax.random.randint(choice_key, (), 0, len(_CENTRES))]
    return centre + _STD * jax.random.normal(noise_key, (2,))


def _log_prob_gaussians(x: Float[Array, "2"]) -> Float[Array, ""]:
    each = gaussian_log_prob(jnp.asarray(_CENTRES), x, math.log(_STD)).sum(-1)
    return logsumexp(each) - math.log(len(_CENTRES))


EIGHT_GAUSSIANS = ToyDensity(_sample_gaussians, _log_prob_gaussians)
"""Eight Gaussians of standard deviation 1/4 on a circle of radius 3, equally likely."""


_NOISE, _SCALE = 0.2, 2.0
# Gauss and Legendre's rule for the mean over the angles from 0 to pi.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(100)
_NODE_ANGLES = np.pi * (_NODES + 1) / 2


def _moons(angle: Float[Array, "*angles"]) -> Float[Array, "2 *angles 2"]:
    """The points of both arcs at an angle."""
    upper = jnp.stack([jnp.cos(angle) - 0.5, jnp.sin(angle) - 0.25], axis=-1)
    return _SCALE * jnp.stack([upper, -upper])


def _sample_moons(key: PRNGKey) -> Float[Array, "2"]:
    choice_key, angle_key, noise_key = jax.random.split(key, 3)
    points = _moons(jax.random.uniform(angle_key, maxval=jnp.pi))
    point = points[jax.random.randint(choice_key, (), 0, 2)]
    return point + _NOISE * jax.random.normal(noise_key, (2,))


def _log_prob_moons(x: Float[Array, "2"]) -> Float[Array, ""]:
    points = _moons(jnp.asarray(_NODE_ANGLES))
    each = gaussian_log_prob(points, x, math.log(_NOISE)).sum(-1)
    return logsumexp(each, b=jnp.asarray(_WEIGHTS / 4))


TWO_MOONS = ToyDensity(_sample_moons, _log_prob_moons)
"""Two half circles of radius 2 that reach into one another, with Gaussian noise of 0.2."""


def _sample_checkerboard(key: PRNGKey) -> Float[Array, "2"]:
    square_key, place_key = jax.random.split(key)
    square = jax.random.randint(square_key, (), 0, 8)
    row, column = square // 2, 2 * (square % 2) + square // 2 % 2
    corner = 2.0 * jnp.stack([column, row]) - 4
    return corner + jax.random.uniform(place_key, (2,), maxval=2)


def _log_prob_checkerboard(x: Float[Array, "2"]) -> Float[Array, ""]:
    square = jnp.floor(x / 2)
    inside = (jnp.abs(x) < 4).all() & (square.sum() % 2 == 0)
    return jnp.where(inside, -math.log(32), -jnp.inf)


CHECKERBOARD = ToyDensity(_sample_checkerboard, _log_prob_checkerboard)
"""Uniform over every second square of side 2 in [-4, 4] x [-4, 4]; -inf elsewhere."""
