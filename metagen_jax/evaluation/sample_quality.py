"""How samples compare with data, from features `(n, d)` of both; the extractor is the caller's.

Numbers are comparable only for the same extractor, preprocessing and number of samples: say which.
The Frechet distance is biased by the number of samples, the kernel distance is not.

Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter: GANs Trained by a Two Time-Scale Update Rule
Converge to a Local Nash Equilibrium, 2017.
Binkowski, Sutherland, Arbel, Gretton: Demystifying MMD GANs, 2018.
Kynkaanniemi, Karras, Laine, Lehtinen, Aila: Improved Precision and Recall Metric for Assessing
Generative Models, 2019.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from metagen_jax.errors import UserError
from metagen_jax.evaluation.baselines import squared_distances
from metagen_jax.evaluation.estimates import Estimate, estimate
from metagen_jax.types import AnyArray, PRNGKey

_CHUNK = 512


def frechet_distance(
    real: Float[AnyArray, "n features"], fake: Float[AnyArray, "m features"]
) -> float:
    """`|mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))` of the features' means and covariances.

    The squared 2-Wasserstein distance of two Gaussians with these moments: equation 6 of Heusel et
    al. 2017, "FID" where the features are those of their Inception network.

    Args:
      real: `(n, d)`, two examples or more; fewer than d do as well.
      fake: `(m, d)`, likewise.

    Returns:
      Zero or more, in the unit of the features squared; computed in float64 on the host.

    Raises:
      UserError: for fewer than two examples, another number of features, or features that are not
        finite.
    """
    _check_features(real=real, fake=fake)
    moments = []
    for features in (real, fake):
        features = np.asarray(features, np.float64)
        moments += [features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))]
    return frechet_distance_of_gaussians(*moments)


def frechet_distance_of_gaussians(
    mean_a: Float[AnyArray, " d"],
    covariance_a: Float[AnyArray, "d d"],
    mean_b: Float[AnyArray, " d"],
    covariance_b: Float[AnyArray, "d d"],
) -> float:
    """The `frechet_distance` of two Gaussians, from their moments.

    `tr (A B)^(1/2)` is the sum of the singular values of `A^(1/2) B^(1/2)`, each root that of a
    symmetric matrix by its eigenvalues: real, and finite whatever the ranks.
    """
    covariances = [np.asarray(c, np.float64) for c in (covariance_a, covariance_b)]
    root_a, root_b = (_symmetric_root(c) for c in covariances)
    shared = np.linalg.svd(root_a @ root_b, compute_uv=False).sum()
    difference = np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)
    spread = sum(np.trace(c) for c in covariances) - 2 * shared
    return float(difference @ difference + max(spread, 0.0))


def kernel_distance(
    key: PRNGKey,
    real: Float[AnyArray, "n features"],
    fake: Float[AnyArray, "m features"],
    *,
    subset_size: int = 1000,
    num_subsets: int = 100,
) -> Estimate:
    """The squared maximum mean discrepancy by the kernel `(x y / d + 1)^3`, "KID"; no bias.

    `1/(s (s-1)) sum_{i != j} k(x_i, x_j) + k(y_i, y_j) - 2/s^2 sum_{i, j} k(x_i, y_j)`: equation 4
    of Binkowski et al. 2018, averaged over random subsets of size s as in their section 4. It may
    be negative where the distributions are alike.

    Args:
      key: draws the subsets, each without repetition.
      real: `(n, d)`.
      fake: `(m, d)`.
      subset_size: s.
      num_subsets: how many.

    Returns:
      An `Estimate` over subsets: the mean, and 1.96 standard errors of it. Subsets overlap, so that
      the interval is that of their choice; to `per_task.std(ddof=1)`, the spread of one subset,
      that of the data contributes too.

    Raises:
      UserError: for fewer than two subsets, fewer than two examples in one, more than there are,
        another number of features, or features that are not finite.
    """
    _check_features(real=real, fake=fake)
    if num_subsets < 2:
        raise UserError(f"num_subsets is {num_subsets}; give 2 or more")
    fewest = min(len(real), len(fake))
    if not 2 <= subset_size <= fewest:
        raise UserError(
            f"subset_size is {subset_size}; give 2 or more, and at most the {fewest} examples of "
            "the smaller set"
        )
    real, fake = (np.asarray(x, np.float64) for x in (real, fake))
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())

    def draw(features):
        return features[generator.choice(len(features), subset_size, replace=False)]

    return estimate(np.array([_discrepancy(draw(real), draw(fake)) for _ in range(num_subsets)]))


class PrecisionRecall(NamedTuple):
    """How much of what is generated could be data, and how much of the data could be generated.

    Attributes:
      precision: the share of fakes within the manifold of real features.
      recall: the share of real features within the manifold of fakes.
    """

    precision: float
    recall: float


def precision_recall(
    real: Float[AnyArray, "n features"],
    fake: Float[AnyArray, "m features"],
    *,
    num_neighbours: int = 3,
    chunk: int = _CHUNK,
) -> PrecisionRecall:
    """Precision and recall with manifolds of balls that reach to the k-th neighbour.

    An example is within the manifold of a set if it is in the ball around one of its members whose
    radius is the distance to that member's k-th nearest other: equations 1 to 3 of Kynkaanniemi et
    al. 2019, who take 50,000 examples of each and k = 3.

    Args:
      real: `(n, d)`, more than k.
      fake: `(m, d)`, likewise; as many as real ones for precision and recall to be comparable.
      num_neighbours: k.
      chunk: rows of the matrices of distances that are in memory at once.

    Raises:
      UserError: for fewer than one neighbour or row, too few examples, another number of features,
        or features that are not finite.
    """
    _check_features(real=real, fake=fake)
    _check_search(num_neighbours, chunk, min(len(real), len(fake)) - 1)
    real, fake = jnp.asarray(real), jnp.asarray(fake)
    radii_real, radii_fake = (_squared_radii(x, num_neighbours, chunk) for x in (real, fake))

    def share_within(queries: Array, members: Array, radii: Array) -> float:
        def within(query: Array) -> Array:
            return (squared_distances(query[None], members)[0] <= radii).any()

        return float(jax.lax.map(within, queries, batch_size=chunk).mean())

    return PrecisionRecall(
        share_within(fake, real, radii_real), share_within(real, fake, radii_fake)
    )


def nearest_neighbours(
    queries: Float[AnyArray, "n features"],
    references: Float[AnyArray, "m features"],
    *,
    num_neighbours: int = 1,
    chunk: int = _CHUNK,
) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
    """The references nearest to each query, such as the training images that a sample may copy.

    Args:
      queries: `(n, d)`: features, or images laid flat.
      references: `(m, d)`.
      num_neighbours: k.
      chunk: queries whose distances to all references are in memory at once.

    Returns:
      Euclidean distances and indices into the references, `(n, k)`, the nearest first. Distances
      are those of differences, so that a copy has exactly zero.

    Raises:
      UserError: for fewer than one neighbour or query, more neighbours than references, another
        number of features, or features that are not finite.
    """
    _check_features(queries=queries, references=references, fewest=1)
    _check_search(num_neighbours, chunk, len(references))
    references = jnp.asarray(references)

    def search(query: Array) -> tuple[Array, Array]:
        squares = squared_distances(query[None], references)[0]
        _, indices = jax.lax.top_k(-squares, num_neighbours)
        # Squares of near ones have lost their digits in the product.
        distances = jnp.linalg.norm(query - references[indices], axis=1)
        order = jnp.argsort(distances)
        return distances[order], indices[order]

    return jax.lax.map(search, jnp.asarray(queries), batch_size=chunk)


def _squared_radii(features: Array, num_neighbours: int, chunk: int) -> Float[Array, " n"]:
    """The squared distance of each member to its k-th nearest other."""

    def radius(i: Array) -> Array:
        squares = squared_distances(features[i][None], features)[0].at[i].set(jnp.inf)
        return -jax.lax.top_k(-squares, num_neighbours)[0][-1]

    return jax.lax.map(radius, jnp.arange(len(features)), batch_size=chunk)


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_others(matrix):
        return (matrix.sum() - np.trace(matrix)) / (len(matrix) * (len(matrix) - 1))

    return mean_of_others(kernel(x, x)) + mean_of_others(kernel(y, y)) - 2 * kernel(x, y).mean()


def _check_features(*, fewest: int = 2, **sets: AnyArray) -> None:
    if len({x.shape[1] for x in sets.values()}) != 1:
        shapes = " and ".join(f"{name} of shape {x.shape}" for name, x in sets.items())
        raise UserError(f"there are {shapes}; give both the same number of features")
    for name, features in sets.items():
        if len(features) < fewest:
            raise UserError(f"{name} has {len(features)} rows; give {fewest} or more")
        if not np.isfinite(features).all():
            raise UserError(f"{name} has numbers that are not finite; see to the extractor")


def _check_search(num_neighbours: int, chunk: int, most: int) -> None:
    if not 1 <= num_neighbours <= most:
        raise UserError(f"num_neighbours is {num_neighbours}; give 1 to {most}")
    if chunk < 1:
        raise UserError(f"chunk is {chunk}; give 1 or more rows at once")
