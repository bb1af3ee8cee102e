"""A convolution that stays fast when its weights are batched by vmap, and its companions.

`vmap` over per-task weights turns `lax.conv` into a grouped convolution, which runs many times
slower than one matrix product a task. Here a batch of weights gives a patch extraction followed by
a batched matrix product; on a CPU weights that all images share are left to XLA's own convolution,
which never stores the patches, wherever that is the faster one.

The derivatives of a convolution with respect to images and kernel are two more bilinear maps, and
the derivatives of those are the three maps again. Each is a JAX primitive here, so that gradients
of every order consist of these three alone, and each chooses by itself; JAX's own transposes of the
patch product transpose (and so copy) the patches from the second order on.
"""

import contextlib
import functools
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from metagen_jax.errors import UserError
from metagen_jax.types import AnyArray

Padding = Literal["SAME", "VALID"]
"""Zeros around the images so that `ceil(size / stride)` windows fit, or none."""


def same_padding(size: int, window: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis so that `ceil(size / stride)` windows fit ("SAME")."""
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def extract_patches(
    images: Float[Array, "n h w c"],
    window: tuple[int, int],
    stride: tuple[int, int],
    padding: Padding = "SAME",
) -> Float[Array, "n h2 w2 patch"]:
    """The patches under a sliding window, in the order (row, column, channel).

    Args:
      images: `(n, h, w, c)`.
      window: height and width of a patch.
      stride: step between patches, down and across.
      padding: "SAME" or "VALID".

    Returns:
      `(n, h2, w2, window_h * window_w * c)`: "SAME", h2 is `ceil(h / stride)`; "VALID",
      `floor((h - window_h) / stride) + 1`.
    """
    if padding == "SAME":
        _, height, width, _ = images.shape
        sides = (
            (0, 0),
            same_padding(height, window[0], stride[0]),
            same_padding(width, window[1], stride[1]),
            (0, 0),
        )
        images = jnp.pad(images, sides)
    rows, columns = ((images.shape[1 + i] - window[i]) // stride[i] + 1 for i in (0, 1))
    corners = [
        images[
            :,
            i : i + (rows - 1) * stride[0] + 1 : stride[0],
            j : j + (columns - 1) * stride[1] + 1 : stride[1],
        ]
        for i in range(window[0])
        for j in range(window[1])
    ]
    return jnp.concatenate(corners, axis=-1)


class _Shape(NamedTuple):
    """What the three maps must know beside their operands."""

    size: tuple[int, int]
    window: tuple[int, int]
    strides: tuple[int, int]
    padding: Padding
    matmul_dtype: DTypeLike | None = None


def _round(x: Array, shape: _Shape) -> Array:
    """An operand of a product, in the dtype that products take."""
    return x if shape.matmul_dtype is None else x.astype(shape.matmul_dtype)


def _outputs(images, kernel, *, shape: _Shape):
    """The convolution: `(n, h, w, c)` and `(kh, kw, c, f)` to `(n, h2, w2, f)`."""
    patches = extract_patches(images, shape.window, shape.strides, shape.padding)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    return jnp.matmul(
        _round(patches, shape), _round(matrix, shape), preferred_element_type=images.dtype
    )


def _images(outputs, kernel, *, shape: _Shape):
    """Its transpose in the images: `(n, h2, w2, f)` and `(kh, kw, c, f)` to `(n, h, w, c)`."""
    matrix = kernel.reshape(-1, kernel.shape[-1])
    patches = jnp.matmul(
        _round(outputs, shape), _round(matrix, shape).T, preferred_element_type=outputs.dtype
    )
    images = jax.ShapeDtypeStruct((len(outputs), *shape.size, kernel.shape[2]), outputs.dtype)
    extract = functools.partial(
        extract_patches, window=shape.window, stride=shape.strides, padding=shape.padding
    )
    return jax.linear_transpose(extract, images)(patches)[0]


def _kernel(images, outputs, *, shape: _Shape):
    """Its transpose in the kernel: `(n, h, w, c)` and `(n, h2, w2, f)` to `(kh, kw, c, f)`."""
    patches = extract_patches(images, shape.window, shape.strides, shape.padding)
    kernel = jnp.einsum(
        "nhwp,nhwf->pf",
        _round(patches, shape),
        _round(outputs, shape),
        preferred_element_type=images.dtype,
    )
    return kernel.reshape(*shape.window, images.shape[-1], outputs.shape[-1])


def _outputs_by_xla(images, kernel, *, shape: _Shape):
    """`_outputs`, of which XLA never stores the patches."""
    if not _is_faster_by_xla(images, kernel.shape[2:], shape):
        return _outputs(images, kernel, shape=shape)
    return _correlate(images, kernel, strides=shape.strides, padding=_sides(shape))


def _images_by_xla(outputs, kernel, *, shape: _Shape):
    """`_images` likewise: outputs with the kernel turned around."""
    # Outputs that lie apart take it up to ten times as long.
    apart = shape.strides != (1, 1)
    if apart or not _is_faster_by_xla(outputs, kernel.shape[2:], shape):
        return _images(outputs, kernel, shape=shape)
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    padding = [
        (window - 1 - before, window - 1 - after)
        for window, (before, after) in zip(shape.window, _sides(shape), strict=True)
    ]
    return _correlate(outputs, turned, padding=padding)


def _kernel_by_xla(images, outputs, *, shape: _Shape):
    """`_kernel` likewise: each channel of all images with the outputs of all for a kernel."""
    if not _is_faster_by_xla(images, (images.shape[-1], outputs.shape[-1]), shape):
        return _kernel(images, outputs, shape=shape)
    padding = [
        (before, (places - 1) * stride + window - size - before)
        for size, window, stride, places, (before, _) in zip(
            shape.size, shape.window, shape.strides, outputs.shape[1:3], _sides(shape), strict=True
        )
    ]
    by_channel, as_kernel = images.transpose(3, 1, 2, 0), outputs.transpose(1, 2, 0, 3)
    kernel = _correlate(by_channel, as_kernel, dilation=shape.strides, padding=padding)
    return kernel.transpose(1, 2, 0, 3)


def _correlate(images, kernel, *, strides=(1, 1), dilation=(1, 1), padding):
    """XLA's convolution, in the one layout in which it is fast on a CPU inside of a loop too."""
    return jax.lax.conv_general_dilated(
        images,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _sides(shape: _Shape) -> list[tuple[int, int]]:
    """Zeros before and after the rows, and the columns."""
    if shape.padding == "VALID":
        return [(0, 0), (0, 0)]
    return list(map(same_padding, shape.size, shape.window, shape.strides))


def _is_faster_by_xla(maps: Array, channels: tuple[int, ...], shape: _Shape) -> bool:
    """Whether XLA's convolution is the faster one: where patches overlap much, or leave the caches.

    Given the images or the outputs, and the channels of both. As measured on a CPU, where float64,
    few channels and maps of fewer than 6 rows or columns take it up to ten times as long.
    """
    if shape.matmul_dtype is not None or maps.dtype != jnp.float32:
        return False
    if min(channels) < 16 or min(shape.size) < 6 or math.prod(shape.window) == 1:
        return False
    num_patches = len(maps) * math.prod(shape.size) // math.prod(shape.strides)
    # 16 MB of numbers.
    return shape.strides == (1, 1) or num_patches * math.prod(shape.window) * channels[0] > 4e6


def _primitive(function, by_xla):
    """A JAX primitive that is computed and batched as `function` is; on a CPU as `by_xla`."""

    def trace(*operands, **settings):
        return jax.make_jaxpr(functools.partial(function, **settings))(*operands).out_avals[0]

    def batch(operands, axes, **settings):
        images, kernel = operands
        if function is not _kernel and axes[1] is None:
            # One kernel for all: more images, and still these primitives in the derivatives.
            images = jnp.moveaxis(images, axes[0], 0)
            together = images.reshape(-1, *images.shape[2:])
            result = primitive.bind(together, kernel, **settings)
            return result.reshape(*images.shape[:2], *result.shape[1:]), 0
        return jax.vmap(functools.partial(function, **settings), axes)(*operands), 0

    primitive = Primitive(f"convolution{function.__name__}")
    primitive.def_impl(jax.jit(primitive.bind, static_argnames="shape"))
    primitive.def_abstract_eval(trace)
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    # Chosen by what was measured there.
    on_cpu = mlir.lower_fun(by_xla, multiple_results=False)
    mlir.register_lowering(primitive, on_cpu, platform="cpu")
    batching.primitive_batchers[primitive] = batch
    return primitive


_outputs_p = _primitive(_outputs, _outputs_by_xla)
_images_p = _primitive(_images, _images_by_xla)
_kernel_p = _primitive(_kernel, _kernel_by_xla)
# The transposes with respect to the first and to the second operand.
ad.defbilinear(
    _outputs_p,
    lambda cotangent, _, kernel, **shape: _images_p.bind(cotangent, kernel, **shape),
    lambda cotangent, images, _, **shape: _kernel_p.bind(images, cotangent, **shape),
)
ad.defbilinear(
    _images_p,
    lambda cotangent, _, kernel, **shape: _outputs_p.bind(cotangent, kernel, **shape),
    lambda cotangent, outputs, _, **shape: _kernel_p.bind(cotangent, outputs, **shape),
)
ad.defbilinear(
    _kernel_p,
    lambda cotangent, _, outputs, **shape: _images_p.bind(outputs, cotangent, **shape),
    lambda cotangent, images, _, **shape: _outputs_p.bind(images, cotangent, **shape),
)


def convolve(
    images: Float[AnyArray, "n h w c"],
    kernel: Float[AnyArray, "kh kw c f"],
    *,
    strides: tuple[int, int] = (1, 1),
    padding: Padding = "SAME",
    matmul_dtype: DTypeLike | None = None,
) -> Float[Array, "n h2 w2 f"]:
    """The convolution of `flax.linen.Conv`, fast for a kernel of each task as well.

    `out[n, y, x, f] = sum_{i, j, c} padded[n, s y + i, s x + j, c] kernel[i, j, c, f]`

    Differentiable to any order, in forward and in reverse mode. With a `matmul_dtype` such as
    `jnp.bfloat16` the operands of every product, in the derivatives too, are rounded to it and
    summed in their own type; None takes them as they are. In `jnp.float16` cotangents below 6e-8
    become 0: scale the loss up.

    Raises:
      UserError: for images smaller than the kernel where nothing is padded, strides below 1,
        another padding than "SAME" and "VALID", or a `matmul_dtype` that is no floating-point type.
    """
    dtype = jnp.result_type(images, kernel)
    _, height, width, _ = images.shape
    kernel_h, kernel_w, _, _ = kernel.shape
    if padding == "VALID" and (height < kernel_h or width < kernel_w):
        raise UserError(
            f"images have {height}x{width} pixels; a {kernel_h}x{kernel_w} kernel needs at least "
            'as many, or give padding="SAME"'
        )
    if padding not in get_args(Padding):
        raise UserError(f'padding is {padding!r}; give "SAME" or "VALID"')
    if min(strides) < 1:
        raise UserError(f"strides are {strides}; give 1 or more, down and across")
    rounded = None if matmul_dtype is None else _floating(matmul_dtype)
    shape = _Shape((height, width), (kernel_h, kernel_w), strides, padding, rounded)
    operands = _vary_alike(jnp.asarray(images, dtype), jnp.asarray(kernel, dtype))
    return _outputs_p.bind(*operands, shape=shape)


def _floating(dtype: DTypeLike) -> jnp.dtype:
    with contextlib.suppress(TypeError):
        if jnp.issubdtype(dtype, jnp.floating):
            return jnp.dtype(dtype)
    raise UserError(f"matmul_dtype is {dtype!r}; give a floating-point type such as jnp.bfloat16")


def _vary_alike(*operands: Array) -> list[Array]:
    """Inside `jax.shard_map`: what is the same on all devices counts as differing, if others do.

    JAX's own operations do so by themselves; the derivative of it sums over the devices.
    """
    axes = [frozenset(jax.typeof(x).manual_axis_type.varying) for x in operands]
    every = frozenset().union(*axes)
    return [
        jax.lax.pcast(x, tuple(every - own), to="varying") if every - own else x
        for x, own in zip(operands, axes, strict=True)
    ]


class Conv(nn.Module):
    """`flax.linen.Conv`, the same parameters and the same numbers.

    Attributes:
      features: output channels.
      kernel_size: height and width of the kernel.
      strides: step between outputs, down and across.
      use_bias: whether a bias is added.
      padding: "SAME" or "VALID".
      matmul_dtype: what operands of products are rounded to; see `convolve`.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    use_bias: bool = True
    padding: Padding = "SAME"
    matmul_dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, images: Float[AnyArray, "*batch h w c"]) -> Float[Array, "*batch h2 w2 f"]:
        shape = (*self.kernel_size, images.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        batch = images.shape[:-3]
        together = images.reshape(math.prod(batch), *images.shape[-3:])
        outputs = convolve(
            together,
            kernel,
            strides=self.strides,
            padding=self.padding,
            matmul_dtype=self.matmul_dtype,
        )
        outputs = outputs.reshape(*batch, *outputs.shape[1:])
        if self.use_bias:
            outputs += self.param(
                "bias", nn.initializers.zeros_init(), (self.features,), jnp.float32
            )
        return outputs


@jax.jit
@jax.named_scope("max_pool_2x2")
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
