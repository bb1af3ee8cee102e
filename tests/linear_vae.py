"""A variational autoencoder whose posterior and marginal likelihood are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.generative.likelihoods import gaussian_log_prob

NOISE = 0.3
"""Standard deviation of x given z in the linear model."""


def linear_model(rng, error=0.0):
    """`z ~ N(0, 1)`, `x = W z + b + noise`: parameters, those of the exact posterior with an error.

    The columns of W are orthogonal, so that the posterior is diagonal.
    """
    scales = np.array([0.8, 1.5])
    weights = np.linalg.qr(rng.normal(size=(4, 2)))[0] * scales
    offset = rng.normal(size=4)
    precision = 1 + scales**2 / NOISE**2
    encoder = {
        "weights": weights.T / NOISE**2 / precision[:, None],
        "offset": -weights.T @ offset / NOISE**2 / precision,
        "log_std": -0.5 * np.log(precision),
    }
    encoder = jax.tree.map(lambda x: x + error * rng.normal(size=x.shape), encoder)
    params = {"encoder": encoder, "decoder": {"weights": weights, "offset": offset}}
    return jax.tree.map(jnp.asarray, params)


def encode(params, x):
    encoder = params["encoder"]
    return encoder["weights"] @ x + encoder["offset"], encoder["log_std"]


def decode(params, z):
    return params["decoder"]["weights"] @ z + params["decoder"]["offset"]


def log_likelihood(x, mean):
    return gaussian_log_prob(x, mean, jnp.log(NOISE)).sum()
