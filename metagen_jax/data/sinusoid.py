"""The sinusoid regression tasks of MAML, drawn on the device from a key.

Finn, Abbeel, Levine: Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, 2017,
section 5.1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metagen_jax.errors import UserError
from metagen_jax.types import Episode, PRNGKey

AMPLITUDES = (0.1, 5.0)
PHASES = (0.0, jnp.pi)
INPUTS = (-5.0, 5.0)


class SinusoidTask(NamedTuple):
    """One sinusoid.

    Attributes:
      episode: support and query, each `(x (n, 1), y (n, 1))`.
      amplitude: of `y`.
      phase: in radians.
    """

    episode: Episode
    amplitude: Float[Array, ""]
    phase: Float[Array, ""]


def sinusoid(
    x: Float[Array, "*n"], amplitude: Float[Array, ""], phase: Float[Array, ""]
) -> Float[Array, "*n"]:
    """`amplitude sin(x - phase)`, the sign of the phase as in the program of MAML's authors."""
    return amplitude * jnp.sin(x - phase)


def sample_sinusoid_task(
    key: PRNGKey, *, num_shots: int, num_queries: int, even_queries: bool = False
) -> SinusoidTask:
    """One task; a pure function of the key.

    `amplitude ~ U[0.1, 5]`, `phase ~ U[0, pi]`, `x ~ U[-5, 5]`, `y = amplitude sin(x - phase)`
    without noise.

    Args:
      key: a typed key. The sinusoid and its support don't depend on the queries asked for.
      num_shots: points of the support.
      num_queries: points of the query.
      even_queries: spread the queries evenly from -5 to 5, both included, in place of drawing them.

    Raises:
      UserError: if there are fewer than 1 shot or query.
    """
    if num_shots < 1 or num_queries < 1:
        raise UserError(
            f"num_shots is {num_shots} and num_queries {num_queries}; give 1 or more of each"
        )
    amplitude_key, phase_key, support_key, query_key = jax.random.split(key, 4)
    amplitude = jax.random.uniform(amplitude_key, minval=AMPLITUDES[0], maxval=AMPLITUDES[1])
    phase = jax.random.uniform(phase_key, minval=PHASES[0], maxval=PHASES[1])
    low, high = INPUTS
    support = jax.random.uniform(support_key, (num_shots, 1), minval=low, maxval=high)
    if even_queries:
        query = jnp.linspace(low, high, num_queries)[:, None]
    else:
        query = jax.random.uniform(query_key, (num_queries, 1), minval=low, maxval=high)
    episode = Episode(
        support=(support, sinusoid(support, amplitude, phase)),
        query=(query, sinusoid(query, amplitude, phase)),
    )
    return SinusoidTask(episode, amplitude, phase)


def oracle_episode(task: SinusoidTask) -> Episode:
    """The task's episode with amplitude and phase given: inputs are `(n, 3)`, `[x, a, phase]`."""

    def reveal(batch):
        x, y = batch
        given = jnp.broadcast_to(jnp.stack([task.amplitude, task.phase]), (len(x), 2))
        return jnp.concatenate([x, given], axis=-1), y

    return Episode(reveal(task.episode.support), reveal(task.episode.query))
