"""Linear prediction with Laplace noise, as probabilities of codes.

What a model of sound has to be better than. On the host, in NumPy and SciPy, in float64.

Atal, Hanauer: Speech analysis and synthesis by linear prediction of the speech wave, 1971.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer
from scipy.optimize import minimize_scalar

from metagen_jax.errors import UserError

_MOST_FOR_SCALE = 1_000_000


class LinearPrediction(NamedTuple):
    """A predictor of the next value, from `fit_linear_prediction`.

    Attributes:
      taps: weights of the values before, the latest last.
      offset: what is added to them.
      scale: of the Laplace noise, its mean size, in units of the values.
      values: `(levels,)`, what each code stands for.
      edges: `(levels - 1,)`, where one code ends and the next begins, in the same units.
    """

    taps: Float[np.ndarray, " taps"]
    offset: float
    scale: float
    values: Float[np.ndarray, " levels"]
    edges: Float[np.ndarray, " levels_less_1"]


def fit_linear_prediction(
    sequences: Sequence[Integer[np.ndarray, "_"]],
    *,
    values: Float[np.ndarray, " levels"],
    edges: Float[np.ndarray, " levels_less_1"],
    num_taps: int = 8,
) -> LinearPrediction:
    """Taps by least squares, then the scale of the noise by maximum likelihood of the codes.

    Which values the codes stand for decides what is linear: amplitudes, or the codes themselves,
    in which noise is as large where sound is loud as where it is not.

    Args:
      sequences: of codes 0..levels-1, each predicted from its own beginning, before which the
        values are 0.
      values: what each code stands for, rising.
      edges: between them.
      num_taps: how many values before are seen.

    Raises:
      UserError: for edges that are not between the values, or no more samples than taps.
    """
    values, edges = np.asarray(values, np.float64), np.asarray(edges, np.float64)
    if (
        edges.shape != (len(values) - 1,)
        or not ((values[:-1] < edges) & (edges < values[1:])).all()
    ):
        raise UserError(
            f"there are {len(edges)} edges for {len(values)} values; give one between each two"
        )
    count = sum(map(len, sequences))
    if count <= num_taps + 1:
        raise UserError(f"there are {count} samples for {num_taps} taps; give more")
    square, product = np.zeros((num_taps + 1,) * 2), np.zeros(num_taps + 1)
    for codes in sequences:
        seen = _seen(values[codes], num_taps)
        square += seen.T @ seen
        product += seen.T @ values[codes]
    # Of least norm, where the sequences say nothing of some tap.
    *taps, offset = np.linalg.lstsq(square, product, rcond=None)[0]
    model = LinearPrediction(np.array(taps), float(offset), 1.0, values, edges)
    every = -(-count // _MOST_FOR_SCALE)
    errors = [_error_bounds(model, codes) for codes in sequences]
    lower, upper = (np.concatenate(side)[::every] for side in zip(*errors, strict=True))

    def loss(log_scale: float) -> float:
        return -_log_mass(lower, upper, math.exp(log_scale)).mean()

    widths = np.diff(edges)
    bounds = math.log(widths.min() / 100), math.log(values[-1] - values[0])
    best = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return model._replace(scale=math.exp(best.x))


def linear_prediction_log_prob(
    model: LinearPrediction, codes: Integer[np.ndarray, " t"]
) -> Float[np.ndarray, " t"]:
    """The log-probability of each code given those before it.

    `log(F((upper - m) / b) - F((lower - m) / b))`, F the distribution function of a Laplace
    distribution, m the prediction, b the scale, and the code's edges, beyond which the first and
    last reach without end; so that the probabilities of all codes sum to 1.

    Returns:
      In nats; the sum is the sequence's.
    """
    return _log_mass(*_error_bounds(model, codes), model.scale)


def _seen(values: np.ndarray, num_taps: int) -> np.ndarray:
    """`(t, taps + 1)`: the values before each one, zeros before the first, and a column of ones."""
    padded = np.concatenate([np.zeros(num_taps), values])
    lagged = [padded[i : i + len(values)] for i in range(num_taps)]
    return np.stack([*lagged, np.ones(len(values))], axis=1)


def _error_bounds(model: LinearPrediction, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From where to where the error of each prediction was, as the code tells."""
    seen = _seen(model.values[codes], len(model.taps))
    predicted = seen @ np.append(model.taps, model.offset)
    ends = np.concatenate([[-np.inf], model.edges, [np.inf]])
    codes = codes.astype(np.int64)  # One more than the last code has no place in a byte.
    return ends[codes] - predicted, ends[codes + 1] - predicted


def _log_mass(lower: np.ndarray, upper: np.ndarray, scale: float) -> np.ndarray:
    """The log-mass of a Laplace distribution around 0 between two bounds."""
    lower, upper = lower / scale, upper / scale
    # Of bounds on one side of 0 as on the positive one, where nothing cancels.
    across = (lower < 0) & (upper > 0)
    near = np.where(across, 0.0, np.minimum(np.abs(lower), np.abs(upper)))
    width = np.where(across, 1.0, upper - lower)
    one_side = -near + np.log(-np.expm1(-width)) - math.log(2)
    below, above = np.where(across, lower, 0.0), np.where(across, upper, 0.0)
    both = np.log((-np.expm1(below) - np.expm1(-above)) / 2, where=across, out=np.zeros_like(near))
    return np.where(across, both, one_side)
