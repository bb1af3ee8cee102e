"""A small convolutional autoencoder: an embedding of pictures that needs no labels."""

from flax import linen as nn
from jaxtyping import Array, Float

from metagen_jax.nets.convolution import Conv


class Autoencoder(nn.Module):
    """Two strided convolutions and a linear map to a vector, and the same way back.

    Train `apply` by `metagen_jax.supervised.squared_error_loss` on `(images, images)`, then embed
    by `apply(params, images, method="encode")`. The way back enlarges by repetition and convolves,
    which leaves no chequered pattern.

    Attributes:
      image_shape: height, width and channels.
      num_latents: length of the vector.
      num_filters: channels of the first convolution; the second has twice as many.
    """

    image_shape: tuple[int, int, int]
    num_latents: int = 64
    num_filters: int = 16

    def setup(self):
        height, width, channels = self.image_shape
        self.sizes = [(-(-height // s), -(-width // s)) for s in (4, 2, 1)]
        filters = (self.num_filters, 2 * self.num_filters)
        self.smallest = (*self.sizes[0], filters[1])
        self.down = [Conv(f, strides=(2, 2)) for f in filters]
        self.up = [Conv(filters[0]), Conv(channels)]
        self.to_latents = nn.Dense(self.num_latents)
        self.from_latents = nn.Dense(self.smallest[0] * self.smallest[1] * self.smallest[2])

    def encode(self, images: Float[Array, "n h w c"]) -> Float[Array, "n latents"]:
        """Vectors `(n, num_latents)` of images `(n, *image_shape)`."""
        x = images
        for conv in self.down:
            x = nn.relu(conv(x))
        return self.to_latents(x.reshape(len(x), -1))

    def decode(self, latents: Float[Array, "n latents"]) -> Float[Array, "n h w c"]:
        """Images `(n, *image_shape)` of vectors; the values are unbounded."""
        x = self.from_latents(latents).reshape(-1, *self.smallest)
        for conv, (height, width) in zip(self.up, self.sizes[1:], strict=True):
            x = nn.relu(x).repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]
            x = conv(x)
        return x

    def __call__(self, images: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """Reconstructions of images."""
        return self.decode(self.encode(images))
