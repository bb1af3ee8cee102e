"""A small convolutional generator and discriminator, after DCGAN.

Radford, Metz, Chintala: Unsupervised Representation Learning with Deep Convolutional GANs, 2016.
Miyato, Koyama: cGANs with Projection Discriminator, 2018.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from metagen_jax.errors import UserError
from metagen_jax.nets.convolution import Conv
from metagen_jax.types import AnyArray

_NUM_GROUPS = 8


class Generator(nn.Module):
    """Images in (-1, 1) of latent vectors: a linear map to a quarter of the size, twice enlarged.

    A map of a quarter of the size, such as an encoder's, may stand in place of a vector. Each step
    enlarges by repetition and convolves, which leaves no chequered pattern. Norms are over groups
    of channels of one image, so that each image depends on its own vector alone.

    Attributes:
      image_shape: height, width and channels.
      num_filters: channels before the last convolution, a multiple of 8; 4 and 2 times as many
        before. A map has any multiple of 8.
      num_classes: None for no labels; otherwise an embedding of the class is added to the vector.
    """

    image_shape: tuple[int, int, int]
    num_filters: int = 32
    num_classes: int | None = None

    @nn.compact
    def __call__(
        self,
        latents: Float[AnyArray, "n *positions latents"],
        labels: Int[AnyArray, " n"] | None = None,
    ) -> Float[Array, "n h w c"]:
        """Images `(n, *image_shape)` of vectors, most often standard normal, and labels.

        Args:
          latents: `(n, latents)`, or maps `(n, ceil(height / 4), ceil(width / 4), filters)`.
          labels: `(n,)`.

        Raises:
          UserError: if the groups don't divide the filters, maps have another size, or labels are
            missing or not asked for.
        """
        if self.num_filters % _NUM_GROUPS:
            raise UserError(
                f"num_filters is {self.num_filters}; give a multiple of {_NUM_GROUPS}, which the "
                "groups of the normalisation divide"
            )
        _check_labels(labels, self.num_classes)
        height, width, channels = self.image_shape
        sizes = [(-(-height // s), -(-width // s)) for s in (4, 2, 1)]
        x = jnp.asarray(latents)
        if labels is not None:
            x = x + nn.Embed(self.num_classes or 1, x.shape[-1], name="classes")(labels)
        filters = [4 * self.num_filters, 2 * self.num_filters, self.num_filters]
        if x.ndim == 2:
            x = nn.Dense(sizes[0][0] * sizes[0][1] * filters[0], name="from_latents")(x)
            x = x.reshape(-1, *sizes[0], filters[0])
        if x.shape[1:3] != sizes[0]:
            raise UserError(
                f"latents have shape {x.shape}; give vectors, or maps (n, {sizes[0][0]}, "
                f"{sizes[0][1]}, filters)"
            )
        for i, (rows, columns) in enumerate(sizes[1:], start=1):
            x = nn.relu(nn.GroupNorm(_NUM_GROUPS, name=f"norm{i}")(x))
            x = x.repeat(2, axis=1).repeat(2, axis=2)[:, :rows, :columns]
            x = Conv(filters[i], name=f"conv{i}")(x)
        x = nn.relu(nn.GroupNorm(_NUM_GROUPS, name="norm")(x))
        return jnp.tanh(Conv(channels, name="head")(x))


class Discriminator(nn.Module):
    """Scores of images: two strided convolutions, one more, and a linear map of all positions.

    Without normalisation, so that each score depends on its own image alone, as gradient penalties
    need; for spectral norms see `metagen_jax.nets.spectral_norm`. With classes the score is
    `w h + e_y h`, h the features and e_y an embedding of the class (equation 3 of Miyato and
    Koyama 2018).

    Attributes:
      num_filters: channels of the first convolution; 2 and 4 times as many follow.
      num_classes: None for no labels.
    """

    num_filters: int = 32
    num_classes: int | None = None

    @nn.compact
    def __call__(
        self,
        images: Float[AnyArray, "n h w c"],
        labels: Int[AnyArray, " n"] | None = None,
    ) -> Float[Array, " n"]:
        """One unbounded score for each image.

        Raises:
          UserError: if labels are missing or not asked for.
        """
        _check_labels(labels, self.num_classes)
        x = jnp.asarray(images)
        for i, (factor, stride) in enumerate(((1, 2), (2, 2), (4, 1))):
            size = (4, 4) if stride == 2 else (3, 3)
            conv = Conv(factor * self.num_filters, size, (stride, stride), name=f"conv{i}")
            x = nn.leaky_relu(conv(x), 0.2)
        features = x.reshape(len(x), -1)
        scores = nn.Dense(1, name="head")(features)[:, 0]
        if labels is None:
            return scores
        classes = nn.Embed(self.num_classes or 1, features.shape[-1], name="classes")(labels)
        return scores + (classes * features).sum(-1)


def _check_labels(labels: AnyArray | None, num_classes: int | None) -> None:
    if labels is None and num_classes is not None:
        raise UserError(f"num_classes is {num_classes} and there are no labels; give them")
    if labels is not None and num_classes is None:
        raise UserError("there are labels and num_classes is None; give the number of classes")
