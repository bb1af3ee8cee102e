"""Fine-tuning at one rate of many: each name is its own optimiser at that rate."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from experiments.fine_tuning import adam_or_sgd, at_edge, at_rates

RATES = {"adam": (0.01, 0.1), "sgd": (0.3, 1.0, 3.0)}


def test_a_name_is_its_optimiser_at_its_rate():
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    tried = at_rates(params, RATES)
    assert list(tried) == ["adam 0.01", "adam 0.1", "sgd 0.3", "sgd 1", "sgd 3"]

    def end(optimizer):
        moved, state = params, optimizer.init(params)
        for step in range(3):
            gradient = jax.tree.map(lambda x, step=step: x * (1 + step), moved)
            updates, state = optimizer.update(gradient, state, moved)
            moved = optax.apply_updates(moved, updates)
        return moved

    for name, expected in (("adam 0.1", optax.adam(0.1)), ("sgd 0.3", optax.sgd(0.3))):
        assert tried[name].init is params
        chex.assert_trees_all_close(end(adam_or_sgd(tried[name].rule)), end(expected), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("adam 0.01", True), ("adam 0.1", True), ("sgd 1", False), ("sgd 3", True)],
)
def test_the_first_and_the_last_rate_of_an_optimiser_are_its_edges(name, expected):
    assert at_edge(name, RATES) == expected
    assert not at_edge("sgd 1", {"adam": (), "sgd": (0.3, 1.0, 3.0)})
