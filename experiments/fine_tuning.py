"""Fine-tuning by Adam or SGD, at a rate that validation chooses among many, compiled once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from metagen_jax.types import MetaParams, Params

Rates = Mapping[str, Sequence[float]]
"""Those to try of "adam" and of "sgd"."""


def at_rates(params: Params, rates: Rates) -> dict[Any, MetaParams]:
    """The parameters with each rate, as `adam_or_sgd` takes it, by name, such as "sgd 0.1"."""
    none = dict.fromkeys(rates, 0.0)
    return {
        _name(optimizer, rate): MetaParams(
            params, jax.tree.map(jnp.float32, {**none, optimizer: rate})
        )
        for optimizer, tried in rates.items()
        for rate in tried
    }


def at_edge(name: str, rates: Rates) -> bool:
    """Whether a rate is the first or the last one tried of its optimiser."""
    return any(
        name == _name(optimizer, edge)
        for optimizer, tried in rates.items()
        if tried
        for edge in (min(tried), max(tried))
    )


def adam_or_sgd(
    rates: Mapping[str, Array], *, adam: Callable[..., optax.GradientTransformation] = optax.adam
) -> optax.GradientTransformation:
    """The sum of their steps, so that one compiled program serves both: one rate is 0."""
    by_adam, by_sgd = adam(rates["adam"]), optax.sgd(rates["sgd"])

    def update(updates: Params, state: Any, params: Params | None = None):
        steps, state = by_adam.update(updates, state, params)
        more, _ = by_sgd.update(updates, by_sgd.init(updates))
        return optax.tree.add(steps, more), state

    return optax.GradientTransformation(by_adam.init, update)


def _name(optimizer: str, rate: float) -> str:
    return f"{optimizer} {rate:g}"
