"""Losses of two views without negatives: embeddings agree, and their features do not repeat.

Each is one number of a whole batch. Over several devices, `axis_name` takes the moments over all
of them, with derivatives; see `metagen_jax.self_supervised.contrastive` for how to average.

Zbontar, Jing, Misra, LeCun, Deny: Barlow Twins: Self-Supervised Learning via Redundancy Reduction,
2021.
Bardes, Ponce, LeCun: VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised
Learning, 2022.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metagen_jax.errors import UserError
from metagen_jax.types import AnyArray


def barlow_twins(
    z_a: Float[AnyArray, "n features"],
    z_b: Float[AnyArray, "n features"],
    *,
    redundancy: float = 5e-3,
    epsilon: float = 1e-5,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Every feature of one view correlates with itself in the other, and with no other feature.

    `sum_i (1 - C_ii)^2 + lambda sum_i sum_{j != i} C_ij^2`, `C_ij` the correlation over the batch
    of feature `i` of `z_a` with feature `j` of `z_b`: equations 1 and 2 of Zbontar et al. 2021.

    Args:
      z_a: a view of each example, `(n, features)`.
      z_b: another view of each.
      redundancy: lambda.
      epsilon: added to the variances, so that a feature without variance correlates with none.
      axis_name: of the devices whose examples are in the batch too.

    Returns:
      A scalar, at least 0.

    Raises:
      UserError: for embeddings of other shapes, or fewer than two examples.
    """
    z_a, z_b, num_examples = _check_pairs(z_a, z_b, axis_name)
    standard = [
        z * jax.lax.rsqrt(_mean(jnp.square(z), axis_name) + epsilon)
        for z in (_centre(z_a, axis_name), _centre(z_b, axis_name))
    ]
    correlation = _sum(jnp.matmul(standard[0].T, standard[1], precision="highest"), axis_name)
    correlation = correlation / num_examples
    diagonal = jnp.diagonal(correlation)
    return jnp.square(1 - diagonal).sum() + redundancy * _off_diagonal_squares(correlation)


def vicreg(
    z_a: Float[AnyArray, "n features"],
    z_b: Float[AnyArray, "n features"],
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    epsilon: float = 1e-4,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Views agree, every feature varies, and no two features covary.

    `lambda s(z_a, z_b) + mu (v(z_a) + v(z_b)) + nu (c(z_a) + c(z_b))` with
    `s = mean (z_a - z_b)^2` over examples and features,
    `v = mean_j max(0, 1 - sqrt(Var_j + epsilon))` and `c = 1/d sum_{i != j} Cov_ij^2`, the moments
    those of the batch with `n - 1` degrees of freedom: algorithm 1 of Bardes et al. 2022, whose
    weights these are. (Equation 5 of the paper does not divide `s` by the features.)

    Args:
      z_a: a view of each example, `(n, features)`.
      z_b: another view of each.
      invariance: lambda.
      variance: mu.
      covariance: nu.
      epsilon: added to the variances; without it the root has no derivative at 0.
      axis_name: of the devices whose examples are in the batch too.

    Returns:
      A scalar, at least 0.

    Raises:
      UserError: for embeddings of other shapes, or fewer than two examples.
    """
    z_a, z_b, num_examples = _check_pairs(z_a, z_b, axis_name)

    def spread(z: Float[Array, "n features"]) -> Float[Array, ""]:
        centred = _centre(z, axis_name)
        products = _sum(jnp.matmul(centred.T, centred, precision="highest"), axis_name)
        moments = products / (num_examples - 1)
        deviations = jnp.sqrt(jnp.diagonal(moments) + epsilon)
        too_small = jax.nn.relu(1 - deviations).mean()
        return variance * too_small + covariance * _off_diagonal_squares(moments) / len(moments)

    difference = _mean(jnp.square(z_a - z_b).mean(-1), axis_name)
    return invariance * difference + spread(z_a) + spread(z_b)


def _off_diagonal_squares(matrix: Float[Array, "d d"]) -> Float[Array, ""]:
    return jnp.where(jnp.eye(len(matrix), dtype=bool), 0, jnp.square(matrix)).sum()


def _centre(z: Float[Array, "n features"], axis_name: str | None) -> Float[Array, "n features"]:
    return z - _mean(z, axis_name)


def _mean(values: Float[Array, "n *shape"], axis_name: str | None) -> Float[Array, "*shape"]:
    """Over the examples of all devices."""
    mean = values.mean(0)
    return mean if axis_name is None else jax.lax.pmean(mean, axis_name)


def _sum(values: Float[Array, "*shape"], axis_name: str | None) -> Float[Array, "*shape"]:
    """Over all devices."""
    return values if axis_name is None else jax.lax.psum(values, axis_name)


def _check_pairs(z_a, z_b, axis_name: str | None) -> tuple[Array, Array, int]:
    """Both in float32 at least, and the number of examples of all devices."""
    if jnp.ndim(z_a) != 2 or jnp.shape(z_a) != jnp.shape(z_b):
        raise UserError(
            f"z_a has shape {jnp.shape(z_a)} and z_b {jnp.shape(z_b)}; give two embeddings of each "
            "example, both (n, features)"
        )
    num_examples = len(z_a) * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    if num_examples < 2:
        raise UserError(f"there is {num_examples} example, which has no variance; give 2 or more")
    z_a, z_b = (
        jnp.asarray(z, jnp.promote_types(jnp.result_type(z), jnp.float32)) for z in (z_a, z_b)
    )
    return z_a, z_b, num_examples
