"""Films of digits that move and bounce off the edges, made on the device from pictures.

Srivastava, Mansimov, Salakhutdinov: Unsupervised Learning of Video Representations using LSTMs,
2015: "Moving MNIST".
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from metagen_jax.errors import UserError
from metagen_jax.types import PRNGKey


def sample_film(
    key: PRNGKey,
    images: UInt8[Array, "n h w 1"],
    *,
    num_frames: int,
    size: int,
    num_digits: int = 2,
    speeds: tuple[float, float] = (2.0, 5.0),
) -> Float[Array, "t s s 1"]:
    """A film of digits that move straight on and bounce off the edges; a pure function of the key.

    Each digit is one of the pictures; its place, direction and speed are drawn evenly. Where it
    would leave the film it turns round. Places are whole pixels, and where digits lie over one
    another the brighter pixel is seen: section 3.1 of Srivastava et al. 2015, who have 20 frames of
    64 pixels, two digits of 28.

    Args:
      key: a typed key.
      images: of 8 bits, digits bright on dark, `(n, h, w, 1)`.
      num_frames: t.
      size: s, the side of the film in pixels, larger than the pictures.
      num_digits: how many, 1 or more.
      speeds: the least and the largest, in pixels a frame.

    Returns:
      `(t, s, s, 1)`, from 0 to 1.

    Raises:
      UserError: the film is no larger than the pictures, or has no frame or no digit.
    """
    height, width = images.shape[1:3]
    if size <= max(height, width) or num_frames < 1 or num_digits < 1:
        raise UserError(
            f"size is {size} for pictures of {height}x{width}, num_frames {num_frames} and "
            f"num_digits {num_digits}; give a film larger than its pictures, 1 frame or more and 1 "
            "digit or more"
        )
    room = jnp.array([size - height, size - width])

    def of_digit(key: PRNGKey) -> Float[Array, "t s s 1"]:
        image_key, place_key, angle_key, speed_key = jax.random.split(key, 4)
        image = images[jax.random.randint(image_key, (), 0, len(images))] / 255.0
        angle = jax.random.uniform(angle_key, maxval=2 * jnp.pi)
        speed = jax.random.uniform(speed_key, minval=speeds[0], maxval=speeds[1])
        velocity = speed * jnp.stack([jnp.sin(angle), jnp.cos(angle)])
        place = jax.random.uniform(place_key, (2,)) * room
        way = place + jnp.arange(num_frames)[:, None] * velocity
        corners = jnp.round(bounce(way, room)).astype(jnp.int32)
        dark = jnp.zeros((size, size, 1))
        return jax.vmap(lambda c: jax.lax.dynamic_update_slice(dark, image, (c[0], c[1], 0)))(
            corners
        )

    return jax.vmap(of_digit)(jax.random.split(key, num_digits)).max(0)


def bounce(way: Float[Array, "*shape"], room: float | Array) -> Float[Array, "*shape"]:
    """Where something is between 0 and `room` that would be at `way` if there were no walls.

    `room - |way mod (2 room) - room|`: there and back again, at one speed.
    """
    return room - jnp.abs(way % (2 * room) - room)
