"""Editing with latents: completion of what is hidden, interpolation, change of an attribute.

Autoregressive models complete by sampling with pixels given, and flow matching by guidance, each
in its own file; here is what needs latents: an encoder and a decoder, or a normalizing flow.

Cannella, Soltani, Tarokh: Projected latent Markov chain Monte Carlo: conditional sampling of
normalizing flows, 2021.
Mattei, Frellsen: Leveraging the exact likelihood of deep latent variable models, 2018.
Roberts, Tweedie: Exponential convergence of Langevin distributions and their discrete
approximations, 1996.
White: Sampling generative networks, 2016.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float

from metagen_jax.errors import UserError
from metagen_jax.generative.bijectors import Bijector
from metagen_jax.generative.flows import flow_log_prob
from metagen_jax.generative.likelihoods import gaussian_log_prob, sample_gaussian
from metagen_jax.generative.vae import Decode, Encode, LogLikelihood
from metagen_jax.types import AnyArray, Params, PRNGKey

Complete = Callable[[Params, Array, Array, PRNGKey], Array]
"""`complete(params, x, known, key) -> x`, whose elements are kept where `known` is true."""

_ACCEPTED = 0.574
"""The share of Langevin proposals to accept that is best in many dimensions (Roberts, Rosenthal:
Optimal scaling of discrete approximations to Langevin diffusions, 1998)."""


def vae_complete(
    encode: Encode,
    decode: Decode,
    log_likelihood: LogLikelihood,
    draw: Callable[[PRNGKey, Any], Array],
    *,
    num_steps: int,
    num_warmup: int = 0,
) -> Complete:
    """Draws the hidden part of an example given the part that is known, by a variational model.

    Metropolis within Gibbs: `z' ~ q(z | x)` is accepted in place of `z` with the probability
    `min(1, W(z') / W(z))`, `W(z) = p(x | z) p(z) / q(z | x)`, and then the hidden part of x is
    drawn from `p(x | z)`. The chain's stationary distribution is `p(hidden, z | known)` exactly,
    whatever the encoder: algorithm 2 of Mattei and Frellsen 2018. Accepting always, as warm-up
    does, is the pseudo-Gibbs sampler of Rezende et al. 2014, which is exact for the exact posterior
    only but leaves a poor start sooner.

    Args:
      encode: `(params, x) -> (mean, log_std)`.
      decode: `(params, z) -> decoded`.
      log_likelihood: `(x, decoded) -> nats`, a product over the elements of x.
      draw: `(key, decoded) -> x`, from `p(x | z)`.
      num_steps: of the chain.
      num_warmup: steps before that accept always.

    Returns:
      `complete(params, x, known, key) -> x` for ONE example: `known` is boolean, of the shape of
      x, and what x has elsewhere is where the chain starts. A sample of the chain's last state.

    Raises:
      UserError: for fewer than one step, or a negative number of warm-up steps.
    """
    _check_steps(num_steps, num_warmup)

    def complete(params: Params, x: Array, known: Bool[AnyArray, "*shape"], key: PRNGKey) -> Array:
        def propose(x: Array, key: PRNGKey) -> Array:
            return sample_gaussian(key, *encode(params, x))

        def log_weight(x: Array, z: Array) -> Array:
            log_posterior = gaussian_log_prob(z, *encode(params, x)).sum()
            log_prior = gaussian_log_prob(z, 0.0, 0.0).sum()
            return log_likelihood(x, decode(params, z)) + log_prior - log_posterior

        def step(state: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
            x, z = state
            propose_key, accept_key, draw_key = jax.random.split(jax.random.fold_in(key, i), 3)
            proposal = propose(x, propose_key)
            log_ratio = log_weight(x, proposal) - log_weight(x, z)
            accepted = jnp.log(jax.random.uniform(accept_key)) < log_ratio
            z = jnp.where(accepted | (i < num_warmup), proposal, z)
            drawn = draw(draw_key, decode(params, z)).astype(x.dtype)
            return (jnp.where(known, x, drawn), z), None

        # Step 0 has no latents to keep: those before it are a proposal too.
        steps = jnp.arange(num_warmup + num_steps)
        start = propose(x, jax.random.fold_in(key, len(steps)))
        (x, _), _ = jax.lax.scan(step, (x, start), steps)
        return x

    return complete


def flow_complete(
    bijector: Bijector,
    *,
    noise: float,
    num_steps: int,
    num_warmup: int = 0,
    step_size: float = 0.1,
) -> Complete:
    """Draws the hidden part of an example given the part that is known, by a normalizing flow.

    A chain over the flow's latents z. With x the data that z stands for, and x* the same with what
    is known in place, its stationary density in terms of x is, but for a constant,

        p(x*) prod_(i known) N(x_i; given_i, noise^2)

    whose hidden part is distributed as `p(hidden | known)` exactly, whatever `noise`: what x has
    where all is known only guides the chain, and is thrown away (like the auxiliary variables of
    Cannella et al. 2021). Steps are Metropolis-adjusted Langevin (Roberts and Tweedie 1996),
    `z' = z + s^2/2 grad + s epsilon`, each of one pass of the flow in both directions with its
    gradient. A chain that is too short stays near where it starts.

    Args:
      bijector: data to noise, with an inverse that is not too slow: no masked autoregressive flow
        of many numbers.
      noise: in units of x, of the size of what known elements leave open about one another. Less
        makes small steps necessary, more lets x wander off from what is known.
      num_steps: of the chain.
      num_warmup: steps before that, which set the size of steps so that 0.574 of them are accepted.
      step_size: s, at first.

    Returns:
      `complete(params, x, known, key) -> x` for ONE example: `known` is boolean, of the shape of
      x, and what x has elsewhere is where the chain starts. A sample of the chain's last state.

    Raises:
      UserError: for fewer than one step, a negative number of warm-up steps, or a noise or step
        size that is not positive.
    """
    _check_steps(num_steps, num_warmup)
    for name, value in (("noise", noise), ("step_size", step_size)):
        if not value > 0:
            raise UserError(f"{name} is {value}; give a positive number")
    log_prob = flow_log_prob(bijector)

    def complete(params: Params, x: Array, known: Bool[AnyArray, "*shape"], key: PRNGKey) -> Array:
        def put_in_place(other: Array) -> Array:
            return jnp.where(known, x, other)

        start, unravel = ravel_pytree(bijector.forward(params, x)[0])

        def log_density(z: Array) -> Array:
            other, log_det = bijector.inverse(params, unravel(z))
            misses = gaussian_log_prob(other, x, math.log(noise))
            whole = log_prob(params, put_in_place(other), key)
            return whole + log_det + jnp.where(known, misses, 0).sum()

        at = jax.value_and_grad(log_density)

        def step(state: tuple, i: Array) -> tuple[tuple, None]:
            z, log_p, slope, size = state
            noise_key, accept_key = jax.random.split(jax.random.fold_in(key, i))
            epsilon = jax.random.normal(noise_key, z.shape, z.dtype)
            proposal = z + size**2 / 2 * slope + size * epsilon
            new_log_p, new_slope = at(proposal)
            back = (z - proposal - size**2 / 2 * new_slope) / size
            log_ratio = (
                new_log_p - log_p + 0.5 * (jnp.vdot(epsilon, epsilon) - jnp.vdot(back, back))
            )
            # A proposal without a number is refused.
            chance = jnp.where(jnp.isnan(log_ratio), 0, jnp.exp(jnp.minimum(log_ratio, 0)))
            accepted = jax.random.uniform(accept_key) < chance
            z, log_p, slope = jax.tree.map(
                lambda new, old: jnp.where(accepted, new, old),
                (proposal, new_log_p, new_slope),
                (z, log_p, slope),
            )
            adapted = size * jnp.exp((chance - _ACCEPTED) / jnp.sqrt(i + 1.0))
            return (z, log_p, slope, jnp.where(i < num_warmup, adapted, size)), None

        state = (start, *at(start), jnp.asarray(step_size, start.dtype))
        (z, *_), _ = jax.lax.scan(step, state, jnp.arange(num_warmup + num_steps))
        return put_in_place(bijector.inverse(params, unravel(z))[0])

    return complete


def spherical_interpolation(
    first: Float[Array, " latents"],
    last: Float[Array, " latents"],
    weight: Float[Array, ""] | float,
) -> Float[Array, " latents"]:
    """The point at a share `weight` of the way along the great arc between two latents.

    `sin((1 - t) a) / sin a first + sin(t a) / sin a last`, a the angle between them: section 2.1 of
    White 2016. Of latents drawn from a standard normal it keeps the length that such draws have,
    where a straight line passes through shorter ones. Where they point the same way, or one is
    zero, it is the straight line; where they are opposite no arc is marked out.
    """
    squares = jnp.vdot(first, first) * jnp.vdot(last, last)
    cosine = jnp.vdot(first, last) / jnp.sqrt(jnp.where(squares > 0, squares, 1))
    straight = (squares == 0) | (jnp.abs(cosine) > 1 - 1e-6)
    # Away from where the arc cosine has no derivative.
    angle = jnp.arccos(jnp.where(straight, 0.0, cosine))
    along = jnp.sin((1 - weight) * angle) * first + jnp.sin(weight * angle) * last
    return jnp.where(straight, (1 - weight) * first + weight * last, along / jnp.sin(angle))


def attribute_direction(
    latents: Float[Array, "n latents"], has_attribute: Bool[AnyArray, " n"]
) -> Float[Array, " latents"]:
    """Mean latents of the examples that have an attribute, less those of the examples that don't.

    Added to the latents of an example it gives the attribute, subtracted it takes it: section 3.1
    of White 2016. NaN if all have it or none.
    """
    weights = jnp.asarray(has_attribute, latents.dtype)[:, None]
    with_it = (weights * latents).sum(0) / weights.sum()
    return with_it - ((1 - weights) * latents).sum(0) / (1 - weights).sum()


def _check_steps(num_steps: int, num_warmup: int) -> None:
    if num_steps < 1:
        raise UserError(f"num_steps is {num_steps}; give 1 or more")
    if num_warmup < 0:
        raise UserError(f"num_warmup is {num_warmup}; give 0 or more")
