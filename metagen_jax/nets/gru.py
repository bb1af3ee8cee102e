"""The gated recurrent unit, over sequences of any length.

Cho, van Merrienboer, Gulcehre, Bahdanau, Bougares, Schwenk, Bengio: Learning Phrase Representations
using RNN Encoder-Decoder for Statistical Machine Translation, 2014.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from metagen_jax.types import AnyArray


class GRU(nn.Module):
    """States of which each knows its own entry of a sequence and all before it.

    `r_t = sigma(W_r x_t + U_r h_{t-1} + b_r)`, `z_t = sigma(W_z x_t + U_z h_{t-1} + b_z)`,
    `g_t = tanh(W_g x_t + b_g + r_t (U_g h_{t-1} + c_g))`, `h_t = (1 - z_t) g_t + z_t h_{t-1}`, from
    `h_0 = 0`: the same numbers as `flax.linen.GRUCell`, in which the update gate keeps the old
    state and the reset gate acts behind the product, as in cuDNN. What the inputs add to the gates
    is one product for the whole sequence.

    Attributes:
      features: of the state.
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*batch t inputs"]) -> Float[Array, "*batch t features"]:
        """States `(*batch, t, features)` of sequences `(*batch, t, inputs)`."""
        x, size = jnp.asarray(x), self.features
        from_inputs = nn.Dense(3 * size, name="input_to_state")(x)
        kernel = self.param(
            "state_to_state",
            nn.initializers.lecun_normal(batch_axis=0),
            (3, size, size),
            jnp.float32,
        )
        kernel = jnp.concatenate(list(kernel), axis=-1)
        bias = self.param("state_bias", nn.initializers.zeros_init(), (size,), jnp.float32)

        def step(state: Array, inputs: Array) -> tuple[Array, Array]:
            of_inputs, of_state = (jnp.split(x, 3, axis=-1) for x in (inputs, state @ kernel))
            reset, update = (jax.nn.sigmoid(of_inputs[i] + of_state[i]) for i in (0, 1))
            content = jnp.tanh(of_inputs[2] + reset * (of_state[2] + bias))
            state = (1 - update) * content + update * state
            return state, state

        zero = jnp.zeros_like(from_inputs[..., 0, :size])
        _, states = jax.lax.scan(step, zero, jnp.moveaxis(from_inputs, -2, 0))
        return jnp.moveaxis(states, 0, -2)
