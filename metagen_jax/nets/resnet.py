"""A small residual net for pictures of 28 to 64 pixels a side."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from metagen_jax.errors import UserError
from metagen_jax.nets.conv4 import Norm, check_norm, normalise
from metagen_jax.nets.convolution import Conv
from metagen_jax.types import AnyArray


class ResNet(nn.Module):
    """Stages of residual blocks, the mean over positions, then a linear head.

    The stem is one 3x3 convolution of stride 1 without pooling, which keeps the detail of small
    pictures (He et al. 2016, section 4.2, and appendix B.9 of the SimCLR paper). Each stage but the
    first halves the picture. A block is `relu(x + F(x))`, F two 3x3 convolutions, each normalised,
    with a ReLU between them; where the shape changes, x goes through a normalised 1x1 convolution.
    ResNet-18 is `num_filters=(64, 128, 256, 512), blocks_per_stage=2`.

    He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, 2016.

    Attributes:
      num_outputs: outputs of the head; None gives the features before it.
      num_filters: channels of each stage.
      blocks_per_stage: residual blocks of a stage.
      norm: as in `metagen_jax.nets.conv4.Conv4`. By "batch" a feature depends on the other images
        of the batch; by the others each image is by itself.
      pooled: take the mean over positions; without it there are outputs for each position.
      axis_name: of the devices whose images are of the batch too, as in
        `metagen_jax.nets.conv4.BatchNorm`.
    """

    num_outputs: int | None
    num_filters: tuple[int, ...] = (32, 64, 128)
    blocks_per_stage: int = 1
    norm: Norm = "group"
    pooled: bool = True
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, images: Float[AnyArray, "n h w c"], num_reference: int | None = None
    ) -> Float[Array, "n *positions outputs"]:
        """Logits (or features) of images.

        Args:
          images: `(n, h, w, c)`.
          num_reference: with norm "batch", take statistics from the first so many images only.

        Returns:
          `(n, num_outputs)`, or `(n, num_filters[-1])` where `num_outputs` is None; not pooled
          `(n, h / s, w / s, ...)`, s doubling with each stage but the first.

        Raises:
          UserError: for an unknown norm, filters that its groups don't divide, or no stage.
        """
        if not self.num_filters or self.blocks_per_stage < 1:
            raise UserError(
                f"num_filters is {self.num_filters} and blocks_per_stage {self.blocks_per_stage}; "
                "give at least one stage of one block"
            )
        for filters in self.num_filters:
            check_norm(self.norm, filters)

        def convolve(x, filters: int, name: str, *, size: int = 3, stride: int = 1):
            return normalise(
                Conv(filters, (size, size), (stride, stride), use_bias=False, name=name)(x),
                self.norm,
                num_reference=num_reference,
                name=f"{name}_norm",
                axis_name=self.axis_name,
            )

        x = nn.relu(convolve(jnp.asarray(images), self.num_filters[0], "stem"))
        for stage, filters in enumerate(self.num_filters):
            for block in range(self.blocks_per_stage):
                name, stride = f"stage{stage}_block{block}", 2 if stage and not block else 1
                y = nn.relu(convolve(x, filters, f"{name}_conv0", stride=stride))
                y = convolve(y, filters, f"{name}_conv1")
                if x.shape != y.shape:
                    x = convolve(x, filters, f"{name}_skip", size=1, stride=stride)
                x = nn.relu(x + y)
        if self.pooled:
            x = x.mean((1, 2))
        return x if self.num_outputs is None else nn.Dense(self.num_outputs, name="head")(x)
