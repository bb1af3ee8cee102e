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
      num_masks: above 1, so many sets of masks, of which each call chooses one. Each spreads the
        degrees over the hidden units in a random way: training over all of them is
        connectivity-agnostic. With a seed as `order` each also has an order of its own, from seeds
        `order`, `order` + 1 and so on: training is then order-agnostic as well.
      direct: whether inputs are also connected to outputs past the hidden layers.
      activation: any elementwise function.
      head_init: of the last layer's kernel; zeros make the outputs start at zero.
    """

    hidden_sizes: Sequence[int]
    num_params: int = 1
    order: Order = "natural"
    num_masks: int = 1
    direct: bool = False
    activation: Callable[[Array], Array] = nn.relu
    head_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, "*batch inputs"],
        condition: Float[AnyArray, "*batch condition"] | None = None,
        *,
        mask_index: int | Int[Array, ""] = 0,
    ) -> Float[Array, "*batch params inputs"]:
        """Parameters of each input's conditional.

        Args:
          x: `(*batch, inputs)`.
          condition: `(*batch, condition)`, what the whole distribution depends on.
          mask_index: which of the `num_masks` sets of masks; may be traced.

        Returns:
          `(*batch, num_params, inputs)`: entry `[..., i]` depends on no input from i on.

        Raises:
          UserError: for an unknown order, or no masks.
        """
        x = jnp.asarray(x)
        num_inputs = x.shape[-1]
        ranks = jnp.asarray(self.ranks(num_inputs))[mask_index]
        h, seen = x, ranks
        for i, size in enumerate(self.hidden_sizes):
            degrees = self._degrees(i, size, num_inputs, conditional=condition is not None)
            degrees = jnp.asarray(degrees)[mask_index]
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

    def ranks(self, num_inputs: int) -> Int[np.ndarray, "masks inputs"]:
        """The place of each input in the order of each set of masks, from 0."""
        if self.num_masks < 1:
            raise UserError(f"num_masks is {self.num_masks}; give 1 or more")
        if isinstance(self.order, int):
            seeds = range(self.order, self.order + self.num_masks)
            return np.stack([_shuffled(num_inputs, seed) for seed in seeds])
        if self.order not in ("natural", "reversed"):
            raise UserError(
                f'order is {self.order!r}; give "natural", "reversed" or a seed for a random one'
            )
        natural = np.arange(num_inputs)
        ranks = natural if self.order == "natural" else natural[::-1]
        return np.tile(ranks, (self.num_masks, 1))

    def _degrees(
        self, layer: int, size: int, num_inputs: int, *, conditional: bool
    ) -> Int[np.ndarray, "masks units"]:
        """Evenly spread from the first rank, or before it, to the last but one."""
        first = -1 if conditional else 0
        count = max(num_inputs - 1 - first, 1)
        degrees = first - 1 + -(-np.arange(1, size + 1) * count // size)
        if self.num_masks == 1:
            return degrees[None]
        seed = self.order if isinstance(self.order, int) else 0
        seeds = [(seed, layer, index) for index in range(self.num_masks)]
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
