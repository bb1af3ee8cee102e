"""Contrastive losses: an embedding is to find its like among many others.

    def loss_fn(params, batch, key):                        # batch: two views of each image
        z_a, z_b = (embed(params, views) for views in batch)
        return nt_xent(z_a, z_b, temperature=0.5).mean(), {}

Each gives one value an embedding, and its mean is the loss. Scores are computed in float32, or in
float64 for inputs of that.

Over several devices every loss takes `axis_name`, and then compares the rows of a device with those
of all: candidates go round a ring of the devices, with derivatives. Inside `jax.pmap`, or
`jax.shard_map` with `check_vma=False`, the mean of all devices' values is the loss of the whole
batch; differentiate each device's own mean and average the gradients, as
`metagen_jax.parallel.data_parallel(gradients(loss_fn), axis_name=...)` does.

With `block_size` the scores of so many rows are in memory at once, of one device's candidates, and
are computed again for the derivative.

Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual
Representations, 2020.
Khosla et al.: Supervised Contrastive Learning, 2020.
van den Oord, Li, Vinyals: Representation Learning with Contrastive Predictive Coding, 2018.
Zhai, Mustafa, Kolesnikov, Beyer: Sigmoid Loss for Language Image Pre-Training, 2023.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, PyTree

from metagen_jax.errors import UserError
from metagen_jax.similarity import unit_rows
from metagen_jax.types import AnyArray

Scalar = float | Float[Array, ""]

# The score of a candidate that is none: finite, as all of a device's may be so, and a sum of no
# terms has no derivative. Beside any score of a candidate its exponential is 0.
_ABSENT = -1e30


class _Rows(NamedTuple):
    """What is compared: embeddings, and by which two of them are told to be the same or alike."""

    vectors: Float[Array, "n features"]
    ids: Int[Array, " n"]
    labels: Integer[Array, " n"] | None = None


def nt_xent(
    z_a: Float[AnyArray, "n features"],
    z_b: Float[AnyArray, "n features"],
    *,
    temperature: Scalar,
    axis_name: str | None = None,
    block_size: int | None = None,
) -> Float[Array, " views"]:
    """SimCLR's loss of each view: to find the other view of its example among all views.

    `l_i = -log (exp(s_ip / t) / sum_{k != i} exp(s_ik / t))`, `s` the cosines of all `2n` views,
    `p` the other view of `i`: equation 1 of Chen et al. 2020, whose `L` is the mean of these values
    (others give the sum, or twice the mean). Views that are all alike lose `ln(2n - 1)`.

    Args:
      z_a: a view of each example, `(n, features)`, of any length: cosines are taken. A vector of
        zeros has a cosine of 0 with all.
      z_b: another view of each.
      temperature: t, positive.
      axis_name: of the devices whose examples are candidates too.
      block_size: views that are compared at once; None for all.

    Returns:
      `(2 n,)`, in nats: of `z_a`, then of `z_b`.

    Raises:
      UserError: for embeddings of other shapes, a temperature or a block that is not positive.
    """
    z_a, z_b = _check_pairs(z_a, z_b, temperature, block_size)
    num_examples = len(z_a)
    views = unit_rows(jnp.concatenate([z_a, z_b]))
    ids = _global_ids(2 * num_examples, axis_name)
    rows = _Rows(views / temperature, ids)
    normalizers = _over_candidates(
        _log_normalizer,
        jnp.logaddexp,
        rows,
        _Rows(views, ids),
        axis_name=axis_name,
        block_size=block_size,
    )
    return normalizers - _dot_rows(rows.vectors, jnp.roll(views, num_examples, axis=0))


def info_nce(
    queries: Float[AnyArray, "n features"],
    candidates: Float[AnyArray, "m features"],
    *,
    temperature: Scalar = 1.0,
    valid: Bool[AnyArray, " m"] | None = None,
    axis_name: str | None = None,
    block_size: int | None = None,
) -> Float[Array, " n"]:
    """The loss of each query: to find its own candidate, `i`, among all candidates.

    `l_i = -log (exp(q_i . c_i / t) / sum_k exp(q_i . c_k / t))`: equation 4 of van den Oord et al.
    2018. `ln m - mean_i l_i` is a lower bound, never above `ln m`, of the mutual information of
    queries and candidates (their section 2.3). Products are taken as they are; for cosines give
    `metagen_jax.similarity.unit_rows` of both.

    Args:
      queries: `(n, features)`, such as predictions from a context.
      candidates: `(m, features)`, m >= n: the first `n` belong to the queries, further ones, such
        as a queue, to none.
      temperature: t, positive.
      valid: `(m,)`, which candidates there are; the others, such as padding, count nowhere, and the
        values of their own queries mean nothing. None for all.
      axis_name: of the devices whose candidates count too.
      block_size: queries that are compared at once; None for all.

    Returns:
      `(n,)`, in nats.

    Raises:
      UserError: for fewer candidates than queries, embeddings that are not vectors of one length, a
        temperature or a block that is not positive.
    """
    _check_positive(temperature, block_size)
    queries, candidates = _in_float(queries), _in_float(candidates)
    shapes = queries.shape, candidates.shape
    if {len(shape) for shape in shapes} != {2} or shapes[0][1] != shapes[1][1]:
        raise UserError(
            f"queries have shape {shapes[0]} and candidates {shapes[1]}; give (n, features) and "
            "(m, features)"
        )
    num_queries = len(queries)
    if len(candidates) < num_queries:
        raise UserError(
            f"there are {num_queries} queries and {len(candidates)} candidates; give each query "
            "its own candidate, in the same order, and further ones behind"
        )
    if valid is not None and jnp.shape(valid) != (len(candidates),):
        raise UserError(
            f"valid has shape {jnp.shape(valid)} for {len(candidates)} candidates; give one each"
        )
    # No candidate is its query; those that are not valid are left out as if they were.
    rows = _Rows(queries / temperature, jnp.full(num_queries, -1))
    ids = jnp.where(jnp.ones(len(candidates), bool) if valid is None else valid, 0, -1)
    normalizers = _over_candidates(
        functools.partial(_log_normalizer, absent=_ABSENT),
        jnp.logaddexp,
        rows,
        _Rows(candidates, ids),
        axis_name=axis_name,
        block_size=block_size,
    )
    return normalizers - _dot_rows(rows.vectors, candidates[:num_queries])


def supervised_contrastive(
    z: Float[AnyArray, "n features"],
    labels: Integer[AnyArray, " n"],
    *,
    temperature: Scalar,
    axis_name: str | None = None,
    block_size: int | None = None,
) -> Float[Array, " n"]:
    """The loss of each embedding: to find the others of its class among all others.

    `l_i = -1/|P_i| sum_{p in P_i} log (exp(s_ip / t) / sum_{k != i} exp(s_ik / t))`, `s` cosines,
    `P_i` the other embeddings of the class of `i`: equation 2 of Khosla et al. 2020. With one label
    for both views of an example it is `nt_xent`.

    Args:
      z: `(n, features)`; cosines are taken, as in `nt_xent`.
      labels: `(n,)` integers.
      temperature: t, positive.
      axis_name: of the devices whose embeddings are candidates, and positives, too.
      block_size: embeddings that are compared at once; None for all.

    Returns:
      `(n,)`, in nats; 0 for one that is alone in its class.

    Raises:
      UserError: for embeddings that are not vectors or not one integer label each, a temperature or
        a block that is not positive.
    """
    _check_positive(temperature, block_size)
    z, labels = _in_float(z), jnp.asarray(labels)
    if z.ndim != 2 or labels.shape != z.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UserError(
            f"there are {labels.dtype} labels of shape {labels.shape} for embeddings of shape "
            f"{z.shape}; give (n, features) and one integer for each"
        )
    views, ids = unit_rows(z), _global_ids(len(z), axis_name)
    normalizers, sums, counts = _over_candidates(
        _log_normalizer_and_positives,
        _join,
        _Rows(views / temperature, ids, labels),
        _Rows(views, ids, labels),
        axis_name=axis_name,
        block_size=block_size,
    )
    # A row without positives has nothing to find, and one without others no normalizer.
    return jnp.where(counts > 0, normalizers, 0) - sums / jnp.maximum(counts, 1)


def sigmoid_pairs(
    z_a: Float[AnyArray, "n features"],
    z_b: Float[AnyArray, "n features"],
    *,
    temperature: Scalar,
    bias: Scalar,
    axis_name: str | None = None,
    block_size: int | None = None,
) -> Float[Array, " n"]:
    """The loss of each `z_a`: to tell of every `z_b` whether it belongs to it.

    `l_i = -sum_k log sigmoid(y_ik (s_ik / t + b))`, `s` cosines, `y_ik` 1 for `k = i` and -1
    otherwise: section 3.2 of Zhai et al. 2023, with `1 / t` for their t. Swapping `z_a` and `z_b`
    leaves the mean as it is.

    Args:
      z_a: `(n, features)`, such as of images; cosines are taken, as in `nt_xent`.
      z_b: `(n, features)`, such as of their captions.
      temperature: t, positive; published: 0.1 to begin with, then learned.
      bias: b; published: -10 to begin with, then learned: nearly all pairs do not belong.
      axis_name: of the devices whose `z_b` are compared too.
      block_size: rows of `z_a` that are compared at once; None for all.

    Returns:
      `(n,)`, in nats.

    Raises:
      UserError: for embeddings of other shapes, a temperature or a block that is not positive.
    """
    z_a, z_b = _check_pairs(z_a, z_b, temperature, block_size)
    ids = _global_ids(len(z_a), axis_name)
    return _over_candidates(
        functools.partial(_binary_cross_entropy, bias=bias),
        jnp.add,
        _Rows(unit_rows(z_a) / temperature, ids),
        _Rows(unit_rows(z_b), ids),
        axis_name=axis_name,
        block_size=block_size,
    )


def _log_normalizer(row: _Rows, columns: _Rows, *, absent: float = -jnp.inf) -> Float[Array, ""]:
    """`log sum_k exp(row . column_k)` over columns that are not the row itself."""
    return jax.nn.logsumexp(jnp.where(columns.ids != row.ids, _scores(row, columns), absent))


def _log_normalizer_and_positives(row: _Rows, columns: _Rows) -> tuple[Array, Array, Array]:
    """`_log_normalizer`, `-inf` without any column, and sum and number of the positives' scores."""
    scores, others = _scores(row, columns), columns.ids != row.ids
    # A sum without terms has no derivative.
    terms = jnp.where(others, scores, jnp.where(others.any(), -jnp.inf, 0))
    normalizer = jnp.where(others.any(), jax.nn.logsumexp(terms), -jnp.inf)
    positives = others & (columns.labels == row.labels)
    return normalizer, jnp.where(positives, scores, 0).sum(), positives.sum()


def _join(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return jnp.logaddexp(a[0], b[0]), a[1] + b[1], a[2] + b[2]


def _binary_cross_entropy(row: _Rows, columns: _Rows, *, bias: Scalar) -> Float[Array, ""]:
    logits = _scores(row, columns) + bias
    return jax.nn.softplus(jnp.where(columns.ids == row.ids, -logits, logits)).sum()


def _scores(row: _Rows, columns: _Rows) -> Float[Array, " m"]:
    return jnp.matmul(row.vectors, columns.vectors.T, precision="highest")


def _over_candidates(
    of_row: Callable[[PyTree, PyTree], PyTree],
    combine: Callable[[PyTree, PyTree], PyTree],
    rows: _Rows,
    columns: _Rows,
    *,
    axis_name: str | None,
    block_size: int | None,
) -> PyTree:
    """`of_row(row, columns)` of each row, combined over the columns of all devices.

    Args:
      of_row: of ONE row.
      combine: what `of_row` gives of some columns and of others, into that of both.
      rows: of this device.
      columns: of this device; they go round the others.
      axis_name: of the devices; None for this one alone.
      block_size: rows at once.
    """
    size = 1 if axis_name is None else jax.lax.axis_size(axis_name)

    def of_columns(columns: _Rows) -> PyTree:
        if block_size is None or block_size >= len(rows.ids):
            return jax.vmap(of_row, in_axes=(0, None))(rows, columns)
        # A scan is never merged with its derivative's, against which checkpoint guards otherwise.
        of_one = jax.checkpoint(lambda row: of_row(row, columns), prevent_cse=False)
        return jax.lax.map(of_one, rows, batch_size=block_size)

    def hop(carry: tuple[_Rows, PyTree], _) -> tuple[tuple[_Rows, PyTree], None]:
        columns, total = carry
        columns = jax.tree.map(
            lambda x: jax.lax.ppermute(x, axis_name, [(d, (d + 1) % size) for d in range(size)]),
            columns,
        )
        return (columns, combine(total, of_columns(columns))), None

    total = of_columns(columns)
    if size > 1:
        (_, total), _ = jax.lax.scan(hop, (columns, total), length=size - 1)
    return total


def _global_ids(num_rows: int, axis_name: str | None) -> Int[Array, " {num_rows}"]:
    """Numbers that no two rows of all devices have in common."""
    first = 0 if axis_name is None else num_rows * jax.lax.axis_index(axis_name)
    return first + jnp.arange(num_rows, dtype=jnp.int32)


def _dot_rows(a: Float[Array, "n features"], b: Float[Array, "n features"]) -> Float[Array, " n"]:
    return (a * b).sum(-1)


def _in_float(z: Float[AnyArray, "n features"]) -> Float[Array, "n features"]:
    """In float32 at least."""
    return jnp.asarray(z, jnp.promote_types(jnp.result_type(z), jnp.float32))


def _check_pairs(z_a, z_b, temperature: Scalar, block_size: int | None) -> tuple[Array, Array]:
    """Both in float, checked."""
    _check_positive(temperature, block_size)
    if jnp.ndim(z_a) != 2 or jnp.shape(z_a) != jnp.shape(z_b):
        raise UserError(
            f"z_a has shape {jnp.shape(z_a)} and z_b {jnp.shape(z_b)}; give two embeddings of each "
            "example, both (n, features)"
        )
    return _in_float(z_a), _in_float(z_b)


def _check_positive(temperature: Scalar, block_size: int | None) -> None:
    if isinstance(temperature, float | int) and temperature <= 0:
        raise UserError(f"temperature is {temperature}; give more than 0")
    if block_size is not None and block_size < 1:
        raise UserError(f"block_size is {block_size}; give 1 or more, or None for all at once")
