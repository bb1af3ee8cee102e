"""MADE: one net that gives the parameters of all conditionals p(x_i | x_<i) in one pass.

Germain, Gregor, Murray, Larochelle: MADE: Masked Autoencoder for Distribution Estimation, 2015.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.initializers import Initializer
from jaxtyping import Array, Float, Int

from metagen_jax.errors import UserError
from metagen_jax.types import AnyArray

Order = Literal["natural", "reversed"] | int
"""In which order the inputs follow one another; a whole number is the seed of a random one."""


class MADE(nn.Module):
    """Dense layers with masks: outputs of an input depend on the inputs before it alone.

    `h = activation(h (W * M) + b + c V)`. Input i has the rank r(i) in the order and each hidden
    unit a degree m; it sees inputs of rank up to m and units of degree up to m, and is seen by the
    outputs of inputs of a rank above m: equations 8 to 11 of Germain et al. 2015. Degrees are
    spread evenly, not drawn, so that with as many units as inputs no allowed path is missing. A
    condition reaches all outputs; some units then see nothing else, for the first input.

    Attributes:
      hidden_sizes: units of each hidden layer, `hidden0`, `hidden1`, ...
      num_params: outputs for each input: 1 for the logit of a Bernoulli, 2 for a mean and a scale.
      order: "natural", "reversed" or a seed. Parameters belong to the order they were trained with.
      num_orders: above 1, so many random orders and connectivities, from seeds `order`, `order` + 1
        and so on, of which each call chooses one: training over all of them is order-agnostic.
      direct: whether inputs are also connected to outputs past the hidden layers.
      activation: any elementwise function.
      head_init: of the last layer's kernel; zeros make the outputs start at zero.
    """

    hidden_sizes: Sequence[int]
    num_params: int = 1
    order: Order = "natural"
    num_orders: int = 1
    direct: bool = False
    activation: Callable[[Array], Array] = nn.relu
    head_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, "*batch inputs"],
        condition: Float[AnyArray, "*batch condition"] | None = None,
        *,
        order_index: int | Int[Array, ""] = 0,
    ) -> Float[Array, "*batch params inputs"]:
        """Parameters of each input's conditional.

        Args:
          x: `(*batch, inputs)`.
          condition: `(*batch, condition)`, what the whole distribution depends on.
          order_index: which of the `num_orders` orders; may be traced.

        Returns:
          `(*batch, num_params, inputs)`: entry `[..., i]` depends on no input from i on.

        Raises:
          UserError: for an unknown order, or several orders without a seed.
        """
        x = jnp.asarray(x)
        num_inputs = x.shape[-1]
        ranks = jnp.asarray(self.ranks(num_inputs))[order_index]
        h, seen = x, ranks
        for i, size in enumerate(self.hidden_sizes):
            degrees = self._degrees(i, size, num_inputs, conditional=condition is not None)
            degrees = jnp.asarray(degrees)[order_index]
            h = _MaskedDense(size, name=f"hidden{i}")(h, seen[:, None] <= degrees)
            if condition is not None:
                h += nn.Dense(size, use_bias=False, name=f"condition{i}")(condition)
            h, seen = self.activation(h), degrees
        num_outputs = self.num_params * num_inputs
        later = jnp.tile(ranks, self.num_params)
        # Hidden units may pass on what they see; an input may not see itself.
        head = _MaskedDense(num_outputs, kernel_init=self.head_init, name="head")
        outputs = head(h, seen[:, None] < later)
        if self.direct and self.hidden_sizes:
            direct = _MaskedDense(
                num_outputs, use_bias=False, kernel_init=self.head_init, name="direct"
            )
            outputs += direct(x, ranks[:, None] < later)
        if condition is not None:
            outputs += nn.Dense(
                num_outputs, use_bias=False, kernel_init=self.head_init, name="condition"
            )(condition)
        return outputs.reshape(*x.shape[:-1], self.num_params, num_inputs)

    def ranks(self, num_inputs: int) -> Int[np.ndarray, "orders inputs"]:
        """The place of each input in each order, from 0."""
        if self.num_orders < 1 or (self.num_orders > 1 and isinstance(self.order, str)):
            raise UserError(
                f"num_orders is {self.num_orders} with order {self.order!r}; give a positive "
                "number and, for more than one, a seed as order"
            )
        if isinstance(self.order, int):
            seeds = range(self.order, self.order + self.num_orders)
            return np.stack([_shuffled(num_inputs, seed) for seed in seeds])
        if self.order not in ("natural", "reversed"):
            raise UserError(
                f'order is {self.order!r}; give "natural", "reversed" or a seed for a random one'
            )
        natural = np.arange(num_inputs)
        return natural[None] if self.order == "natural" else natural[None, ::-1]

    def _degrees(
        self, layer: int, size: int, num_inputs: int, *, conditional: bool
    ) -> Int[np.ndarray, "orders units"]:
        """Evenly spread from the first rank, or before it, to the last but one."""
        first = -1 if conditional else 0
        count = max(num_inputs - 1 - first, 1)
        degrees = first - 1 + -(-np.arange(1, size + 1) * count // size)
        if self.num_orders == 1:
            return degrees[None]
        seeds = [(self.order, layer, index) for index in range(self.num_orders)]
        return np.stack([degrees[_shuffled(size, seed)] for seed in seeds])


class _MaskedDense(nn.Module):
    """A dense layer whose kernel is zero where the mask is."""

    features: int
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x, mask):
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        y = x @ jnp.where(mask, kernel, 0)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        return y


def _shuffled(count: int, seed) -> Int[np.ndarray, " count"]:
    """0..count-1 in random order."""
    # The order is not stored with the parameters, so it must never change: NumPy promises that of
    # bit generators, not of what is drawn through them.
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
