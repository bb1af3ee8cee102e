"""Monotone rational-quadratic splines: functions of one number with an inverse in closed form.

Gregory, Delbourgo: Piecewise Rational Quadratic Interpolation to Monotonic Data, 1982.
Durkan, Bekasov, Murray, Papamakarios: Neural Spline Flows, 2019.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metagen_jax.errors import UserError

MIN_BIN_SIZE = 1e-3
"""The least width and height of a bin, as a share of the whole interval."""

MIN_SLOPE = 1e-3
"""The least slope at a knot."""


class _Bin(NamedTuple):
    """The bin that a number is in: its lower left corner, its sizes and the slopes at its ends."""

    x: Array
    y: Array
    width: Array
    height: Array
    slope0: Array
    slope1: Array


def rational_quadratic_spline(
    x: Float[Array, "*shape"],
    widths: Float[Array, "bins *shape"],
    heights: Float[Array, "bins *shape"],
    slopes: Float[Array, "inner_knots *shape"],
    *,
    bound: float,
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """A spline on [-bound, bound], the identity outside, with the logarithm of its slope.

    In a bin of slope s = height / width on average, with slopes d0 and d1 at its knots, at
    `t = (x - x0) / width`,

        y = y0 + height (s t^2 + d0 t (1-t)) / (s + (d0 + d1 - 2 s) t (1-t))

        dy/dx = s^2 (d1 t^2 + 2 s t (1-t) + d0 (1-t)^2) / (s + (d0 + d1 - 2 s) t (1-t))^2

    equations 4 and 5 of Durkan et al. 2019. The slope at both ends is 1, so that it is continuous.
    Parameters of zeros give the identity.

    Args:
      x: any numbers.
      widths: `(bins, *shape)`, the logits of a softmax that divides the interval of x.
      heights: `(bins, *shape)`, the same for y.
      slopes: `(bins - 1, *shape)`, those at the inner knots before a softplus.
      bound: half the interval's length.

    Returns:
      y and `log dy/dx` of each number. Slopes are finite, from about 1e-6 on, for any finite
      parameters; a spline as steep as that is as hard to invert as it is steep.

    Raises:
      UserError: for numbers of bins and slopes that don't match, too many bins, or a bound that is
        not positive.
    """
    _check(widths, heights, slopes, bound)
    # A number far out would not be NaN, but its derivatives in the branch not taken might.
    inside = jnp.abs(x) < bound
    at = _find(jnp.where(inside, x, 0), widths, heights, slopes, bound, by_height=False)
    t = _in_bin((jnp.where(inside, x, 0) - at.x) / at.width)
    y, log_slope = _evaluate(at, t)
    return jnp.where(inside, y, x), jnp.where(inside, log_slope, 0)


def inverse_rational_quadratic_spline(
    y: Float[Array, "*shape"],
    widths: Float[Array, "bins *shape"],
    heights: Float[Array, "bins *shape"],
    slopes: Float[Array, "inner_knots *shape"],
    *,
    bound: float,
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The x that `rational_quadratic_spline` takes to y, and `log dx/dy`.

    With `e = (y - y0) / height` the root t in [0, 1] of

        (s - b) t^2 + b t - e s = 0,  b = d0 (1-e) - d1 e + 2 s e

    whose discriminant is a sum of squares, `(d0 (1-e) - d1 e)^2 + 4 s^2 e (1-e)`, in which nothing
    cancels; of the two forms of the root, 2 e s / (b + sqrt) and (sqrt - b) / (2 (s - b)), that in
    which nothing cancels either is taken. (Equations 6 to 8 of Durkan et al. 2019 are the first.)

    Args:
      y: any numbers.
      widths: as in `rational_quadratic_spline`, and so all others.
      heights: `(bins, *shape)`.
      slopes: `(bins - 1, *shape)`.
      bound: half the interval's length.

    Returns:
      x and `log dx/dy` of each number.

    Raises:
      UserError: as `rational_quadratic_spline`.
    """
    _check(widths, heights, slopes, bound)
    inside = jnp.abs(y) < bound
    at = _find(jnp.where(inside, y, 0), widths, heights, slopes, bound, by_height=True)
    e = _in_bin((jnp.where(inside, y, 0) - at.y) / at.height)
    s = at.height / at.width
    difference = at.slope0 * (1 - e) - at.slope1 * e
    b = difference + 2 * s * e
    root = jnp.sqrt(jnp.square(difference) + 4 * jnp.square(s) * (e * (1 - e)))
    ahead = b >= 0
    q = root + jnp.where(ahead, b, -b)
    t = jnp.where(ahead, 2 * e * s, q) / jnp.where(ahead, q, 2 * (s - b))
    _, log_slope = _evaluate(at, t)
    return jnp.where(inside, at.x + t * at.width, y), jnp.where(inside, -log_slope, 0)


def _evaluate(at: _Bin, t: Array) -> tuple[Array, Array]:
    """y and `log dy/dx` at `t` in [0, 1] of a bin; all terms are positive."""
    s = at.height / at.width
    rest = 1 - t
    both = t * rest
    below = s * (jnp.square(t) + jnp.square(rest)) + (at.slope0 + at.slope1) * both
    y = at.y + at.height * (t * (s * t + at.slope0 * rest)) / below
    above = at.slope1 * jnp.square(t) + 2 * s * both + at.slope0 * jnp.square(rest)
    return y, jnp.log(above) + 2 * jnp.log(s / below)


def _find(x, widths, heights, slopes, bound: float, *, by_height: bool) -> _Bin:
    """The bin of each number, which is one of x or, `by_height`, one of y.

    By comparisons and masked sums over the leading axis, which are several times as fast as
    gathers on a CPU with their gradients.
    """
    all_widths, all_heights = _sizes(widths, bound), _sizes(heights, bound)
    inner_knots = -bound + jnp.cumsum(all_heights if by_height else all_widths, axis=0)[:-1]
    index = (x >= inner_knots).sum(axis=0)
    bins = jnp.arange(len(widths)).reshape(-1, *(1 for _ in x.shape))
    here, before = bins == index, bins < index

    def total(mask, values):
        return jnp.where(mask, values, 0).sum(axis=0)

    return _Bin(
        x=-bound + total(before, all_widths),
        y=-bound + total(before, all_heights),
        width=total(here, all_widths),
        height=total(here, all_heights),
        slope0=jnp.where(index == 0, 1, _slope(total(here[1:], slopes))),
        slope1=jnp.where(index == len(slopes), 1, _slope(total(here[:-1], slopes))),
    )


def _sizes(logits: Float[Array, "bins *shape"], bound: float) -> Float[Array, "bins *shape"]:
    """Sizes of bins that sum to 2 bound, none less than its least share."""
    free = 1 - MIN_BIN_SIZE * len(logits)
    return 2 * bound * (MIN_BIN_SIZE + free * jax.nn.softmax(logits, axis=0))


def _in_bin(share: Array) -> Array:
    """What rounding at a knot has put before or behind the bin, at its end.

    There a steep bin would have a slope below zero. At an end itself the derivative is left as it
    is, which `jnp.clip` would halve.
    """
    return jnp.where(share < 0, 0, jnp.where(share > 1, 1, share))


def _slope(unbounded: Array) -> Array:
    """A slope from a number, 1 from 0."""
    return MIN_SLOPE + jax.nn.softplus(unbounded + math.log(math.expm1(1 - MIN_SLOPE)))


def _check(widths: Array, heights: Array, slopes: Array, bound: float) -> None:
    num_bins = len(widths)
    if len(heights) != num_bins or len(slopes) != num_bins - 1:
        raise UserError(
            f"there are {num_bins} widths, {len(heights)} heights and {len(slopes)} slopes; give "
            "as many heights as widths, and a slope for each of the knots between them"
        )
    if not 1 <= num_bins < 1 / MIN_BIN_SIZE:
        raise UserError(f"there are {num_bins} bins; give 1 to {int(1 / MIN_BIN_SIZE) - 1}")
    if not bound > 0:
        raise UserError(f"bound is {bound}; give a positive number, such as 3")
