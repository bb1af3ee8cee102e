"""A convolution that stays fast when its weights are batched by vmap, and its companions.

`vmap` over per-task weights turns `lax.conv` into a grouped convolution, which runs many times
slower than one matrix product a task. Here a convolution is a patch extraction followed by a
matrix product, so that a batch of weights gives a batched matrix product.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


def same_padding(size: int, window: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis so that `ceil(size / stride)` windows fit ("SAME")."""
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def extract_patches(
    images: Float[Array, "n h w c"], window: tuple[int, int], stride: tuple[int, int]
) -> Float[Array, "n h2 w2 patch"]:
    """The "SAME"-padded patches under a sliding window, in the order (row, column, channel).

    Args:
      images: `(n, h, w, c)`.
      window: height and width of a patch.
      stride: step between patches, down and across.

    Returns:
      `(n, ceil(h / stride), ceil(w / stride), window_h * window_w * c)`.
    """
    _, height, width, _ = images.shape
    rows, columns = -(-height // stride[0]), -(-width // stride[1])
    padding = (
        (0, 0),
        same_padding(height, window[0], stride[0]),
        same_padding(width, window[1], stride[1]),
        (0, 0),
    )
    padded = jnp.pad(images, padding)
    corners = [
        padded[
            :,
            i : i + (rows - 1) * stride[0] + 1 : stride[0],
            j : j + (columns - 1) * stride[1] + 1 : stride[1],
        ]
        for i in range(window[0])
        for j in range(window[1])
    ]
    return jnp.concatenate(corners, axis=-1)


def convolve(
    images: Float[Array, "n h w c"],
    kernel: Float[Array, "kh kw c f"],
    *,
    strides: tuple[int, int] = (1, 1),
) -> Float[Array, "n h2 w2 f"]:
    """The "SAME" convolution of `flax.linen.Conv`, as patches times a matrix.

    `out[n, y, x, f] = sum_{i, j, c} padded[n, s y + i, s x + j, c] kernel[i, j, c, f]`
    """
    kernel_h, kernel_w, channels, features = kernel.shape
    patches = extract_patches(images, (kernel_h, kernel_w), strides)
    return patches @ kernel.reshape(kernel_h * kernel_w * channels, features)


class Conv(nn.Module):
    """`flax.linen.Conv` with "SAME" padding, the same parameters and the same numbers.

    Attributes:
      features: output channels.
      kernel_size: height and width of the kernel.
      strides: step between outputs, down and across.
      use_bias: whether a bias is added.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    use_bias: bool = True

    @nn.compact
    def __call__(self, images: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 f"]:
        shape = (*self.kernel_size, images.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        outputs = convolve(images, kernel, strides=self.strides)
        if self.use_bias:
            outputs += self.param(
                "bias", nn.initializers.zeros_init(), (self.features,), jnp.float32
            )
        return outputs


@jax.jit
def max_pool_2x2(images: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """The maximum of each 2x2 block; an odd last row or column is dropped.

    A tie sends its gradient to the first of the equal corners in the order of reading, as
    `lax.reduce_window` does, so that value and gradient equal `flax.linen.max_pool`'s. A block with
    a NaN gives NaN.
    """
    height, width = images.shape[1] // 2 * 2, images.shape[2] // 2 * 2
    images = images[:, :height, :width]
    corners = [images[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]

    def larger(a, b):
        return jnp.where((a >= b) | jnp.isnan(a), a, b)

    return larger(larger(corners[0], corners[1]), larger(corners[2], corners[3]))
