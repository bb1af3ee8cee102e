"""A small residual convolutional net that gives each position of an image its outputs."""

from flax import linen as nn
from jaxtyping import Array, Float

from metagen_jax.nets.convolution import Conv
from metagen_jax.types import AnyArray


class ResidualConv(nn.Module):
    """A 3x3 convolution, residual blocks, ReLU and a 1x1 convolution that starts at zero.

    `h := h + conv(relu(conv(relu(h))))`, each of 3x3, as in the couplings of Dinh et al. 2017
    without their batch norm; the last layer starts at zero, as in Kingma and Dhariwal 2018, so that
    an affine coupling or one of splines starts as the identity.

    Attributes:
      num_filters: channels of each hidden layer.
      num_outputs: channels of the result.
      num_blocks: residual blocks.
    """

    num_filters: int
    num_outputs: int
    num_blocks: int = 2

    @nn.compact
    def __call__(self, images: Float[AnyArray, "n h w c"]) -> Float[Array, "n h w outputs"]:
        h = Conv(self.num_filters, name="stem")(images)
        for i in range(self.num_blocks):
            more = Conv(self.num_filters, name=f"block{i}_conv0")(nn.relu(h))
            h = h + Conv(self.num_filters, name=f"block{i}_conv1")(nn.relu(more))
        head = nn.Dense(self.num_outputs, kernel_init=nn.initializers.zeros_init(), name="head")
        return head(nn.relu(h))
