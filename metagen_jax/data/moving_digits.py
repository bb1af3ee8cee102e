"""Films of pictures that move straight on and bounce off the edges, drawn on the device.

Srivastava, Mansimov, Salakhutdinov: Unsupervised Learning of Video Representations Using LSTMs,
2015.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metagen_jax.errors import UserError
from metagen_jax.types import AnyArray, PRNGKey


def sample_moving_digits(
    key: PRNGKey,
    pictures: Float[AnyArray, "m h w"],
    *,
    num_frames: int,
    size: int,
    speed: float,
    num_digits: int = 2,
) -> Float[Array, "{num_frames} {size} {size} 1"]:
    """One film: pictures that start anywhere, in any direction, and are turned back by the edges.

    At time t a corner is at `|((p + v t + L) mod 2 L) - L|`, down and across, rounded; p is uniform
    from 0 to L, L the pixels that are left beside a picture, and v has the length `speed`. Where
    pictures overlap the lighter one is seen. Published: two digits of 28 pixels in frames of 64.

    Args:
      key: a typed key.
      pictures: `(m, h, w)`, light on 0, of which each is drawn from all.
      num_frames: how many frames.
      size: of a frame, in pixels a side.
      speed: pixels a frame.
      num_digits: pictures in the film.

    Raises:
      UserError: the pictures are as large as the frames, or larger.
    """
    _, height, width = pictures.shape
    if max(height, width) >= size:
        raise UserError(f"pictures have {height}x{width} pixels and frames {size}; give less")
    room = size - jnp.array([height, width])

    def draw(key: PRNGKey) -> Array:
        which_key, place_key, angle_key = jax.random.split(key, 3)
        picture = jnp.asarray(pictures)[jax.random.randint(which_key, (), 0, len(pictures))]
        angle = jax.random.uniform(angle_key, maxval=2 * jnp.pi)
        velocity = speed * jnp.stack([jnp.sin(angle), jnp.cos(angle)])
        straight = room * jax.random.uniform(place_key, (2,)) + (
            velocity * jnp.arange(num_frames)[:, None]
        )
        corners = jnp.abs((straight + room) % (2 * room) - room)
        corners = jnp.round(corners).astype(jnp.int32)
        blank = jnp.zeros((size, size), picture.dtype)
        return jax.vmap(
            lambda corner: jax.lax.dynamic_update_slice(blank, picture, (corner[0], corner[1]))
        )(corners)

    return jax.vmap(draw)(jax.random.split(key, num_digits)).max(0)[..., None]
