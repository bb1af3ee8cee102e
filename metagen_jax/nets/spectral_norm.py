"""Spectral normalisation of any net, as a function of its variables.

    variables = add_spectral_vectors(key, net.init(key, images))
    outputs = net.apply(normalise_kernels(variables), images)
    variables = update_spectral_vectors(variables)          # once a training step

Beside each kernel stands a vector, in a collection of its own, `spectral`: a slow leaf that no
gradient moves, from which a step of the power iteration gives the kernel's largest singular value.

Miyato, Kataoka, Koyama, Yoshida: Spectral Normalization for Generative Adversarial Networks, 2018.
"""

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from metagen_jax.errors import UserError
from metagen_jax.gradients import task_keys
from metagen_jax.types import Params, PRNGKey

_COLLECTION = "spectral"
# Far below any vector that a trained kernel gives, and its square is a float32.
_SMALLEST = 1e-18


def spectral_norm(
    kernel: Float[Array, "*inputs outputs"], vector: Float[Array, " outputs"]
) -> Float[Array, ""]:
    """An estimate from below of the largest singular value of a kernel, from one power iteration.

    `|W v|`, `v = W^T u / |W^T u|`, W the kernel as a matrix `(outputs, all inputs)`: equation 19
    and algorithm 1 of Miyato et al. 2018, exact if `u` is the left singular vector. There its
    derivative is that of the paper, `u v^T`, for it is stationary in v; but v is not held constant,
    and so derivatives of every order are those of the value.

    Args:
      kernel: of a dense layer or of a convolution, output channels last.
      vector: u, of length one; no gradient reaches it.

    Returns:
      A scalar, 0 for a kernel of zeros.
    """
    matrix = kernel.reshape(-1, kernel.shape[-1])
    return _length(_unit(matrix @ jax.lax.stop_gradient(vector)) @ matrix)


def power_iteration(
    kernel: Float[Array, "*inputs outputs"], vector: Float[Array, " outputs"]
) -> Float[Array, " outputs"]:
    """The next vector u, `W v / |W v|` with the v of `spectral_norm`; it stays for `W v = 0`."""
    matrix = kernel.reshape(-1, kernel.shape[-1])
    product = _unit(matrix @ vector) @ matrix
    return jnp.where(_length(product) > _SMALLEST, _unit(product), vector)


def add_spectral_vectors(key: PRNGKey, variables: Params, *, num_iterations: int = 10) -> Params:
    """Variables of a flax net with a vector beside every kernel.

    Args:
      key: of the vectors, which begin at random.
      variables: `{"params": ...}`, from `init`.
      num_iterations: of the power iteration, to begin with.

    Returns:
      `{"params": ..., "spectral": ...}`.

    Raises:
      UserError: if the net has no kernel.
    """
    kernels = {path: leaf for path, leaf in _leaves(variables, "params").items() if _kernel(path)}
    if not kernels:
        raise UserError("the variables hold no leaf named 'kernel'; there is nothing to normalise")
    vectors = {
        (*path[:-1], "vector"): _unit(jax.random.normal(vector_key, kernel.shape[-1:]))
        for vector_key, (path, kernel) in zip(
            task_keys(key, len(kernels)), kernels.items(), strict=True
        )
    }
    variables = {**variables, _COLLECTION: unflatten_dict(vectors)}
    return jax.lax.fori_loop(0, num_iterations, lambda _, v: update_spectral_vectors(v), variables)


def normalise_kernels(variables: Params) -> Params:
    """Variables for `apply`: each kernel that has a vector, divided by its `spectral_norm`."""
    params = _leaves(variables, "params")
    for path, vector in _leaves(variables, _COLLECTION).items():
        kernel = params[(*path[:-1], "kernel")]
        norm = spectral_norm(kernel, vector)
        params[(*path[:-1], "kernel")] = kernel / jnp.where(norm > 0, norm, 1)
    others = {name: value for name, value in variables.items() if name != _COLLECTION}
    return {**others, "params": unflatten_dict(params)}


def update_spectral_vectors(variables: Params) -> Params:
    """One `power_iteration` of every vector, after kernels have moved."""
    params = _leaves(variables, "params")
    vectors = {
        path: power_iteration(params[(*path[:-1], "kernel")], vector)
        for path, vector in _leaves(variables, _COLLECTION).items()
    }
    return {**variables, _COLLECTION: unflatten_dict(vectors)}


def is_spectral_vector(path: tuple) -> bool:
    """Whether a leaf's path, as `jax.tree_util` gives it, is that of a vector."""
    return any(isinstance(k, jax.tree_util.DictKey) and k.key == _COLLECTION for k in path)


def _leaves(variables: Params, collection: str) -> dict[tuple[str, ...], Array]:
    if collection not in variables:
        raise UserError(
            f"the variables hold {sorted(variables)} and no {collection!r}; give those of a flax "
            "net with add_spectral_vectors"
        )
    leaves: dict = flatten_dict(variables[collection])
    return leaves


def _kernel(path: tuple[str, ...]) -> bool:
    return path[-1] == "kernel"


def _length(x: Float[Array, " n"]) -> Float[Array, ""]:
    """The norm, whose derivatives at zero are zero."""
    return optax.safe_norm(x, 0.0)


def _unit(x: Float[Array, " n"]) -> Float[Array, " n"]:
    return x / jnp.maximum(_length(x), _SMALLEST)
