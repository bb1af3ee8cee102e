"""The multilayer perceptron."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import Initializer
from jaxtyping import Array, Float

from metagen_jax.nets.conv4 import BatchNorm
from metagen_jax.types import AnyArray


class MLP(nn.Module):
    """Dense layers, an activation after each but the last.

    `h_0 = x`, `h_i = activation(h_{i-1} W_i + b_i)`, `y = h_L W + b`.

    Attributes:
      hidden_sizes: units of each hidden layer, named `hidden0`, `hidden1`, ...; none gives a linear
        map.
      num_outputs: units of the last layer, `head`; None gives the features before it.
      activation: any elementwise function.
      kernel_init: of all kernels; biases start at zero.
      head_init: of the head's kernel, if it is another; zeros make the outputs start at zero.
      batch_norm: normalise by the current batch before each activation, as projection heads of
        self-supervised learning do: an output then depends on the other inputs.
      axis_name: of the devices whose inputs are of the batch too, as in
        `metagen_jax.nets.conv4.BatchNorm`.
    """

    hidden_sizes: Sequence[int]
    num_outputs: int | None
    activation: Callable[[Array], Array] = nn.relu
    kernel_init: Initializer = nn.initializers.lecun_normal()
    head_init: Initializer | None = None
    batch_norm: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """Outputs `(*batch, num_outputs)` for inputs `(*batch, inputs)`."""
        h: Array = jnp.asarray(x)
        for i, size in enumerate(self.hidden_sizes):
            h = nn.Dense(size, kernel_init=self.kernel_init, name=f"hidden{i}")(h)
            if self.batch_norm:
                h = BatchNorm(axis_name=self.axis_name, name=f"norm{i}")(h)
            h = self.activation(h)
        if self.num_outputs is None:
            return h
        head_init = self.kernel_init if self.head_init is None else self.head_init
        return nn.Dense(self.num_outputs, kernel_init=head_init, name="head")(h)
