"""A variational autoencoder of an example given others of its class.

Edwards, Storkey: Towards a Neural Statistician, 2017.
Garnelo, Schwarz, Rosenbaum, Viola, Rezende, Eslami, Teh: Neural Processes, 2018.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from metagen_jax.nets.mlp import MLP
from metagen_jax.nets.vae import Gaussian, Level, mean_and_log_std
from metagen_jax.types import AnyArray, PRNGKey


class SetVAE(nn.Module):
    """`p(x | D) = int p(c | D) p(z | c) p(x | z, c) dz dc`: what the class is, what this one is.

    The context c is what is known of the class: `p(c | D)` is a Gaussian whose parameters a net
    gives of the mean of the examples' features, the statistic network of Edwards and Storkey 2017,
    and `q(c | x, D)` the same net of D with x in it, as in a neural process. Then `p(z | c)` and
    `q(z | x, c)`. A learned pseudo-example is always in the mean, so that D may be empty, and the
    net is told how many there are. The order of D does not matter.

    Attributes:
      shape: of an example.
      num_context: numbers of the context.
      num_latents: numbers of z.
      num_features: of each example, whose mean is taken.
      num_units: of each hidden layer.
      num_params: numbers that the decoder gives for each element of the example.
      embed: what is known of examples, `(n, *shape) -> (n, known)`, such as features learned
        without labels; the features are then of both and it stays as it is. None for nothing.
      activation: between layers.
    """

    shape: tuple[int, ...]
    num_context: int = 64
    num_latents: int = 32
    num_features: int = 128
    num_units: int = 256
    num_params: int = 1
    activation: Callable[[Array], Array] = nn.elu
    embed: Callable[[Array], Array] | None = None

    def setup(self):
        def mlp(num_layers: int, num_outputs: int) -> MLP:
            return MLP((self.num_units,) * num_layers, num_outputs, self.activation)

        self.features = mlp(2, self.num_features)
        self.pseudo = self.param("pseudo", nn.initializers.zeros_init(), (self.num_features,))
        self.statistic = mlp(1, 2 * self.num_context)
        self.prior = mlp(1, 2 * self.num_latents)
        self.posterior = mlp(1, 2 * self.num_latents)
        self.decoder = mlp(2, math.prod(self.shape) * self.num_params)

    def encode(self, examples: Float[AnyArray, "n *shape"]) -> Float[Array, "n features"]:
        """Features of each example by itself."""
        examples = jnp.asarray(examples)
        inputs = examples.reshape(len(examples), math.prod(self.shape))
        if self.embed is not None:
            known = jax.lax.stop_gradient(self.embed(examples))
            inputs = jnp.concatenate([inputs, known], axis=1)
        return self.features(inputs)

    def __call__(
        self,
        x: Float[AnyArray, "*shape"],
        memory: Float[AnyArray, "s features"],
        present: Bool[AnyArray, " s"],
        key: PRNGKey,
    ) -> tuple[Float[Array, "*shape params"], list[Level]]:
        """Parameters of `p(x | z, c)` for latents drawn from q, and these: c, then z.

        Args:
          x: ONE example.
          memory: features of the set, from `encode`.
          present: which of them are given.
          key: of the latents.
        """
        own = self.encode(jnp.asarray(x)[None])
        with_own = jnp.concatenate([memory, own]), jnp.concatenate([present, jnp.ones(1, bool)])
        return self._descend(key, self._context(memory, present), self._context(*with_own), own[0])

    def sample(
        self, memory: Float[AnyArray, "s features"], present: Bool[AnyArray, " s"], key: PRNGKey
    ) -> Float[Array, "*shape params"]:
        """The parameters of `p(x | z, c)` for latents drawn from p."""
        return self._descend(key, self._context(memory, present), None, None)[0]

    def _context(self, memory: AnyArray, present: AnyArray) -> Gaussian:
        weight = jnp.asarray(present, memory.dtype)
        count = 1 + weight.sum()
        mean = (self.pseudo + weight @ memory) / count
        return mean_and_log_std(self.statistic(jnp.append(mean, 1 / count)))

    def _descend(
        self, key: PRNGKey, prior: Gaussian, posterior: Gaussian | None, own: Array | None
    ) -> tuple[Array, list[Level]]:
        keys = jax.random.split(key)
        context = _level(keys[0], prior, posterior)
        prior = mean_and_log_std(self.prior(context.z))
        if own is not None:
            seen = jnp.concatenate([own, context.z])
            posterior = mean_and_log_std(self.posterior(seen))
        latent = _level(keys[1], prior, posterior)
        decoded = self.decoder(jnp.concatenate([latent.z, context.z]))
        return decoded.reshape(*self.shape, self.num_params), [context, latent]


def _level(key: PRNGKey, prior: Gaussian, posterior: Gaussian | None) -> Level:
    drawn_from = prior if posterior is None else posterior
    noise = jax.random.normal(key, drawn_from.mean.shape)
    return Level(drawn_from.mean + jnp.exp(drawn_from.log_std) * noise, drawn_from, prior)
