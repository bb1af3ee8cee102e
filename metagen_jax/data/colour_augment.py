"""Random changes of the colours of one picture, each a pure function of a key, on the device.

Pictures are bytes, or floats from 0 to 1; both stay what they are. A batch is `jax.vmap` over keys
and pictures.

Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual
Representations, 2020.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from metagen_jax.types import PRNGKey

Scalar = float | Float[Array, ""]

# Of red, green and blue in the brightness that is seen (ITU-R BT.601).
LUMA = (0.299, 0.587, 0.114)


def adjust_colours(
    image: Num[Array, "h w 3"],
    *,
    brightness: Scalar = 1.0,
    contrast: Scalar = 1.0,
    saturation: Scalar = 1.0,
    hue: Scalar = 0.0,
) -> Num[Array, "h w 3"]:
    """Brightens, then contrasts, then colours, then turns the hues; cut to the range each time.

    `x -> b x`, `x -> c x + (1 - c) mean(grey(x))`, `x -> s x + (1 - s) grey(x)`, and `h -> h + hue`
    in hue, saturation and value; `grey` by the weights of BT.601.

    Args:
      image: `(h, w, 3)`, red, green, blue.
      brightness: b, at least 0.
      contrast: c, at least 0.
      saturation: s, at least 0; 0 makes it grey.
      hue: in turns of the colour circle.

    Returns:
      `(h, w, 3)`, of the dtype of `image`.
    """
    x = jnp.clip(brightness * _to_unit(image), 0, 1)
    x = jnp.clip(contrast * x + (1 - contrast) * grey(x).mean(), 0, 1)
    x = jnp.clip(saturation * x + (1 - saturation) * grey(x), 0, 1)
    return _from_unit(_turn_hues(x, hue), image.dtype)


def colour_jitter(
    key: PRNGKey, image: Num[Array, "h w 3"], *, strength: float = 1.0, probability: float = 0.8
) -> Num[Array, "h w 3"]:
    """`adjust_colours` with a probability, by random amounts.

    Brightness, contrast and saturation are each uniform in `[max(0, 1 - 0.8 s), 1 + 0.8 s]`, the
    hue in `[-0.2 s, 0.2 s]`: appendix A of Chen et al. 2020, who make the four changes in random
    order. They take `s = 0.5` for CIFAR-10.

    Args:
      key: a typed key.
      image: `(h, w, 3)`.
      strength: s.
      probability: that the picture is changed at all.

    Returns:
      `(h, w, 3)`, of the dtype of `image`.
    """
    chosen_key, amount_key = jax.random.split(key)
    draws = jax.random.uniform(amount_key, (4,), minval=-1.0, maxval=1.0)
    low, high = max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength
    factors = low + (high - low) * (draws[:3] + 1) / 2
    changed = adjust_colours(
        image,
        brightness=factors[0],
        contrast=factors[1],
        saturation=factors[2],
        hue=0.2 * strength * draws[3],
    )
    return jnp.where(jax.random.bernoulli(chosen_key, probability), changed, image)


def random_grey(
    key: PRNGKey, image: Num[Array, "h w 3"], *, probability: float = 0.2
) -> Num[Array, "h w 3"]:
    """All three channels the brightness that is seen, with a probability."""
    greyed = _from_unit(jnp.broadcast_to(grey(_to_unit(image)), image.shape), image.dtype)
    return jnp.where(jax.random.bernoulli(key, probability), greyed, image)


def grey(image: Float[Array, "*shape 3"]) -> Float[Array, "*shape 1"]:
    """The brightness that is seen, by the weights of BT.601."""
    return (image * jnp.array(LUMA, image.dtype)).sum(-1, keepdims=True)


def _turn_hues(x: Float[Array, "h w 3"], turns: Scalar) -> Float[Array, "h w 3"]:
    """Adds to the hue, keeps saturation and value; in [0, 1]."""
    red, green, blue = jnp.moveaxis(x, -1, 0)
    value, chroma = x.max(-1), x.max(-1) - x.min(-1)
    safe = jnp.where(chroma > 0, chroma, 1)
    # In sixths of the circle, from the channel that is largest.
    hue = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    channels = jnp.array([5, 3, 1], x.dtype)
    k = (channels + hue[..., None] + 6 * turns) % 6
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def _to_unit(image: Num[Array, "h w 3"]) -> Float[Array, "h w 3"]:
    if jnp.issubdtype(image.dtype, jnp.integer):
        return image.astype(jnp.float32) / 255
    return image


def _from_unit(x: Float[Array, "h w 3"], dtype) -> Num[Array, "h w 3"]:
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.round(255 * x).astype(dtype)
    return x.astype(dtype)
