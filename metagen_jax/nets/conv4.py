"""The four-block convolutional net of few-shot learning."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from metagen_jax.errors import UserError
from metagen_jax.nets.convolution import Conv, max_pool_2x2
from metagen_jax.types import AnyArray

Norm = Literal["batch", "group", "layer", "none"]
NUM_GROUPS = 8
_MODULATED_BLOCK = 2


class BatchNorm(nn.Module):
    """Batch normalisation by the current batch, without running averages.

    `y = scale (x - mean) / sqrt(var + epsilon) + bias`, mean and variance per channel over
    examples and positions. Nothing is remembered between calls: the statistics are those of the
    batch at hand (*transductive* when that is a query set), or, with `num_reference`, of its first
    examples alone, so that the others are normalised independently of one another.

    Attributes:
      epsilon: added to the variance.
      axis_name: of the devices whose examples are of the batch too, with derivatives; see
        `metagen_jax.self_supervised.contrastive` for how to average. It is needed neither to
        initialise nor with `num_reference`, whose examples are this device's own.
    """

    epsilon: float = 1e-3
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "n *positions c"], num_reference: int | None = None
    ) -> Float[Array, "n *positions c"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), jnp.float32)
        reference = x[:num_reference]
        axes = tuple(range(x.ndim - 1))
        alone = num_reference is not None or self.is_initializing()
        axis_name = None if alone else self.axis_name
        mean = _mean_of_devices(reference.mean(axes), axis_name)
        variance = _mean_of_devices(jnp.square(reference - mean).mean(axes), axis_name)
        return (x - mean) * (scale * jax.lax.rsqrt(variance + self.epsilon)) + bias


def _mean_of_devices(values: Float[Array, " c"], axis_name: str | None) -> Float[Array, " c"]:
    # XLA keeps an all-reduce even among one device.
    if axis_name is None or jax.lax.axis_size(axis_name) == 1:
        return values
    return jax.lax.pmean(values, axis_name)


def normalise(
    x: Float[Array, "n *positions c"],
    norm: Norm,
    *,
    num_reference: int | None,
    name: str,
    axis_name: str | None,
) -> Float[Array, "n *positions c"]:
    """A layer of the net that calls this: as `Conv4.norm` says, by parameters of that name."""
    if norm == "batch":
        return BatchNorm(axis_name=axis_name, name=name)(x, num_reference)
    if norm == "group":
        return nn.GroupNorm(num_groups=NUM_GROUPS, name=name)(x)
    if norm == "layer":
        return nn.LayerNorm(reduction_axes=tuple(range(1, x.ndim)), name=name)(x)
    return x


def check_norm(norm: str, num_filters: int) -> None:
    """Raises a UserError for an unknown norm, or filters that its groups don't divide."""
    if norm not in get_args(Norm):
        raise UserError(f'norm is {norm!r}; give "batch", "group", "layer" or "none"')
    if norm == "group" and num_filters % NUM_GROUPS:
        raise UserError(
            f"{num_filters} filters can't be split into {NUM_GROUPS} groups; give a multiple of "
            f"{NUM_GROUPS}"
        )


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, normalisation and ReLU, then a linear head.

    Strided, each block halves the image by its convolution and the head sees the mean over
    positions: the net of MAML's Omniglot experiments (Finn et al. 2017, section 5.2). Otherwise a
    2x2 max-pool stands between normalisation and ReLU (after the ReLU it would give the same), and
    the head sees all positions: that of Vinyals et al. 2016. A context modulates the third block's
    maps right before their ReLU, so after that max-pool.

    Attributes:
      num_outputs: outputs of the head; None gives the features before it.
      num_filters: channels of each block.
      strided: stride 2 in place of max-pooling.
      norm: "batch" (statistics of the current batch), "group" (8 groups), "layer" or "none".
      matmul_dtype: what the operands of the convolutions' products are rounded to, such as
        `jnp.bfloat16`; all else, and their sums, keep the images' type.
      axis_name: of the devices whose images are of the current batch too, as in `BatchNorm`.
    """

    num_outputs: int | None
    num_filters: int = 64
    strided: bool = True
    norm: Norm = "batch"
    matmul_dtype: DTypeLike | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        images: Float[AnyArray, "n h w c"],
        num_reference: int | None = None,
        *,
        context: Float[Array, " context"] | None = None,
    ) -> Float[Array, "n outputs"]:
        """Logits (or features) of images.

        Args:
          images: `(n, h, w, c)`, at least 16 pixels a side when max-pooled.
          num_reference: with norm "batch", take statistics from the first so many images only.
          context: `(num_context,)`, scales and shifts the third block's maps before their ReLU,
            `h -> (1 + W c) h + V c`: feature-wise linear modulation as in CAVIA (Zintgraf et al.
            2019). Zeros change nothing. W and V have no biases, which would repeat the norm's.

        Returns:
          `(n, num_outputs)`, or `(n, features)` where `num_outputs` is None.

        Raises:
          UserError: for an unknown norm, images too small for four max-pools, or a number of
            filters that the groups don't divide.
        """
        self._check(images.shape[1], images.shape[2])
        x = jnp.asarray(images)
        for block in range(4):
            strides = (2, 2) if self.strided else (1, 1)
            x = Conv(
                self.num_filters,
                strides=strides,
                matmul_dtype=self.matmul_dtype,
                name=f"conv{block}",
            )(x)
            x = normalise(
                x,
                self.norm,
                num_reference=num_reference,
                name=f"norm{block}",
                axis_name=self.axis_name,
            )
            if not self.strided:
                x = max_pool_2x2(x)
            if context is not None and block == _MODULATED_BLOCK:
                modulation = nn.Dense(2 * self.num_filters, use_bias=False, name="film")(context)
                scale, shift = jnp.split(modulation, 2)
                x = (1 + scale) * x + shift
            x = nn.relu(x)
        x = x.mean((1, 2)) if self.strided else x.reshape(len(x), -1)
        if self.num_outputs is None:
            return x
        return nn.Dense(self.num_outputs, name="head")(x)

    def _check(self, height: int, width: int) -> None:
        check_norm(self.norm, self.num_filters)
        if not self.strided and min(height, width) < 16:
            raise UserError(
                f"images have {height}x{width} pixels; four max-pools need at least 16 a side, or "
                "give strided=True"
            )
