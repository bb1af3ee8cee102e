"""What the table of `metagen_jax.meta.adapt` says of optax transformations is measured."""

import ast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import references

import metagen_jax.meta.adapt
from metagen_jax.meta.maml import maml_loss
from metagen_jax.types import Episode

RATE = 0.05
KEY = jax.random.key(0)

# What the table's rows are called with beyond a learning rate.
ARGUMENTS = {
    "adaptive_grad_clip": [0.1],
    "add_decayed_weights": [0.1],
    "clip": [0.1],
    "clip_by_block_rms": [0.1],
    "clip_by_global_norm": [0.1],
    "ema": [0.9],
    "scale_by_schedule": [optax.cosine_decay_schedule(1.0, 9)],
    "trace": [0.9],
}
WITHOUT_ARGUMENTS = {"centralize", "normalize_by_update_norm", "scale_by_trust_ratio"}
FIXED_OPTIONS = {"noisy_sgd": {"key": 0}, "sgd": {"momentum": 0.9, "nesterov": True}}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def make(name, **options):
    """The transformation of a row: an optimiser, or one step of a chain that ends in a rate."""
    module = optax.contrib if name.startswith("contrib.") else optax
    function = getattr(module, name.removeprefix("contrib."))
    options = FIXED_OPTIONS.get(name, {}) | options
    if name in ARGUMENTS or name in WITHOUT_ARGUMENTS:
        return optax.chain(function(*ARGUMENTS.get(name, []), **options), optax.scale(-RATE))
    return function(RATE, **options)


def table():
    """`{transformation: (generic point, dead coordinate, all dead, remedy)}`."""
    lines = metagen_jax.meta.adapt.__doc__.splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if "|" in line]
    return {name.strip(): row[1:] for row in rows[1:] for name in row[0].split(",")}


def points():
    """Parameters and episodes of a linear layer under tanh: the three columns of the table."""
    rng = np.random.default_rng(1)
    params = 0.6 * rng.normal(size=(3, 2))
    x, query_x = rng.normal(size=(2, 5, 3))
    y, query_y = rng.normal(size=(2, 5, 2))
    for scale in ([1, 1, 1], [1, 1, 0], [0, 0, 0]):
        yield jnp.asarray(params), Episode((jnp.asarray(x * scale), y), (query_x, query_y))


def measure(optimizer):
    """What the table should say of a transformation, but for its remedy."""

    def loss(params, batch, key):
        x, y = batch
        return jnp.mean((jnp.tanh(x @ params) - y) ** 2), {}

    # Enough steps for radam to change its rule on the way.
    meta = maml_loss(loss, inner_optimizer=optimizer, num_steps=6)
    by_params_and_episode = jax.jit(
        jax.value_and_grad(lambda *args: meta(*args, KEY)[0], argnums=(0, 1)),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    cells = []
    for params, episode in points():
        _, (grads, by_episode) = by_params_and_episode(params, episode)
        if not jnp.isfinite(grads).all():
            cells.append("nan")
            continue
        expected = references.finite_differences(
            lambda p, episode=episode: by_params_and_episode(p, episode)[0], params
        )
        np.testing.assert_allclose(grads, expected, rtol=1e-6, atol=1e-8)
        # Where the update doesn't depend on the gradient, the support's targets don't matter.
        flat = not cells and not jnp.any(by_episode.support[1])
        cells.append("flat" if flat else "exact")
    return cells


@pytest.mark.parametrize("name", table())
@pytest.mark.slow
def test_the_table_says_what_is_measured(name):
    *expected, remedy = table()[name]
    if expected[0] == "error":
        with pytest.raises(TypeError, match=r"missing .* required keyword-only argument"):
            measure(make(name))
        return
    assert measure(make(name)) == expected
    if "=" in remedy:
        options = dict(pair.split("=") for pair in remedy.split(", "))
        cured = make(name, **{key: ast.literal_eval(value) for key, value in options.items()})
        assert measure(cured) == ["exact"] * 3
    elif "nan" in expected:
        assert remedy == "none" or table()[remedy.removeprefix("use ")][:3] == ["exact"] * 3
    else:
        assert remedy == ""


def test_the_table_is_sorted_and_names_each_transformation_once():
    lines = [line for line in metagen_jax.meta.adapt.__doc__.splitlines() if "|" in line]
    names = [name.strip() for line in lines[1:] for name in line.split("|")[0].split(",")]
    assert len(names) == len(set(names)) == len(table())
    assert {"sgd", "adam", "lion", "lbfgs", "clip_by_global_norm"} <= set(names)
    rows = [[name.strip() for name in line.split("|")[0].split(",")] for line in lines[1:]]
    assert rows == sorted(sorted(row) for row in rows)
