"""A convolutional net that draws the next frame of a film from the few before it."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from metagen_jax.errors import UserError
from metagen_jax.nets.causal import before
from metagen_jax.nets.convolution import Conv
from metagen_jax.types import AnyArray


class NextFrame(nn.Module):
    """After each frame the next one: that frame, and a change that a small U-Net draws.

    The net sees the frame and the `num_seen - 1` before it, zeros before the first, as channels of
    one picture, halves it twice and doubles it again. The change starts at zero: an untrained net
    copies the last frame.

    Attributes:
      features: channels at half of the resolution and below.
      num_seen: frames that a prediction is made of, 1 or more.
    """

    features: int = 32
    num_seen: int = 4

    @nn.compact
    def __call__(self, frames: Float[AnyArray, "n t h w c"]) -> Float[Array, "n t h w c"]:
        """Predictions `(n, t, h, w, c)`; that at place i sees frames up to i.

        Raises:
          UserError: height or width is no multiple of 4, or no frame is seen.
        """
        frames = jnp.asarray(frames)
        num, length, height, width, channels = frames.shape
        if height % 4 or width % 4 or self.num_seen < 1:
            raise UserError(
                f"frames have {height}x{width} pixels and num_seen is {self.num_seen}; give "
                "multiples of 4, and 1 or more"
            )
        padded = before(frames, axis=1, reach=self.num_seen - 1, current=True)
        seen = [padded[:, i : i + length] for i in range(self.num_seen)]
        x = jnp.concatenate(seen, axis=-1).reshape(num * length, height, width, -1)
        fine = nn.relu(Conv(self.features, (4, 4), (2, 2), name="halve0")(x))
        fine = nn.relu(Conv(self.features, name="fine0")(fine))
        coarse = nn.relu(Conv(2 * self.features, (4, 4), (2, 2), name="halve1")(fine))
        for i in (0, 1):
            coarse = coarse + Conv(2 * self.features, name=f"coarse{i}")(nn.relu(coarse))
        doubled = jnp.repeat(jnp.repeat(nn.relu(coarse), 2, axis=1), 2, axis=2)
        fine = nn.relu(Conv(self.features, name="fine1")(jnp.concatenate([fine, doubled], -1)))
        # Four numbers for each place at half of the resolution: its four pixels.
        change = nn.Dense(4 * channels, kernel_init=nn.initializers.zeros_init(), name="head")(fine)
        change = change.reshape(num, length, height // 2, width // 2, 2, 2, channels)
        change = jnp.transpose(change, (0, 1, 2, 4, 3, 5, 6))
        return frames + change.reshape(frames.shape)
