"""The contract that everything in metagen_jax obeys.

What is minimised is a `LossFn`, what is trained is a `GradFn`; most of the second come from the
first by `metagen_jax.gradients`. Both always take `(params, batch, key)` and always give metrics.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

AnyArray = jax.Array | np.ndarray
"""What a user may hand in where arrays are asked for: JAX's or NumPy's."""

Params = PyTree
"""What is trained: any pytree of floating-point arrays."""

Batch = PyTree
"""What a loss is taken on: any pytree of arrays."""

PRNGKey = Key[Array, ""]
"""One typed key, as `jax.random.key` makes it."""

Metrics = dict[str, jax.Array]
"""Named arrays to watch; their names are the names in logs and plots."""

LossFn = Callable[[Params, Batch, PRNGKey], tuple[Float[Array, ""], Metrics]]
"""`loss_fn(params, batch, key) -> (loss, metrics)`."""

GradFn = Callable[[Params, Batch, PRNGKey], tuple[Params, Metrics]]
"""`grad_fn(params, batch, key) -> (direction, metrics)`: optimisers go against the direction."""

PredictFn = Callable[[Params, Batch, PyTree, PRNGKey], PyTree]
"""`predict(params, support, inputs, key) -> predictions`: a learner's answer for new inputs."""

Trainable = Callable[[str], bool]
"""Chooses leaves of `params` by their path, such as `"params/head/kernel"`."""


class Episode(NamedTuple):
    """One task: learn from `support`, be judged on `query`. Each is any pytree of arrays."""

    support: Any
    query: Any


class MetaParams(NamedTuple):
    """What a learner with a learned update rule trains: the initialisation and the rule's own."""

    init: Any
    rule: Any
