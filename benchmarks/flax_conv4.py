"""Conv4 as it is written elsewhere, on `flax.linen.Conv`."""

import flax.linen as nn

from metagen_jax.nets.conv4 import BatchNorm


class FlaxConv4(nn.Module):
    """The parameters and the numbers of `Conv4`."""

    num_outputs: int
    num_filters: int
    strided: bool

    @nn.compact
    def __call__(self, x):
        for block in range(4):
            strides = (2, 2) if self.strided else (1, 1)
            x = nn.Conv(self.num_filters, (3, 3), strides=strides, name=f"conv{block}")(x)
            x = BatchNorm(name=f"norm{block}")(x)
            x = nn.relu(x if self.strided else nn.max_pool(x, (2, 2), (2, 2)))
        x = x.mean((1, 2)) if self.strided else x.reshape(len(x), -1)
        return nn.Dense(self.num_outputs, name="head")(x)
