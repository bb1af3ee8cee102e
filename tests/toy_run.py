"""A regression that trains in no time, for the tests of training."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagen_jax.gradients import gradients
from metagen_jax.training import fit, init_state, train_step

KEY = jax.random.key(3)
DATA = (
    np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32),
    np.random.default_rng(1).normal(size=40).astype(np.float32),
)
PARAMS = {"weight": jnp.ones(3), "bias": jnp.zeros(())}
OPTIMIZER = optax.adam(0.05)
NUM_STEPS = 20


def loss_fn(params, batch, key):
    inputs, targets = batch
    noise = 0.1 * jax.random.normal(key, targets.shape)
    errors = inputs @ params["weight"] + params["bias"] + noise - targets
    return jnp.mean(errors**2), {"accuracy": jnp.mean(jnp.abs(errors) < 1)}


def sample(key, data):
    chosen = jax.random.randint(key, (8,), 0, len(data[0]))
    return jax.tree.map(lambda x: x[chosen], data)


STEP = train_step(gradients(loss_fn), OPTIMIZER, sample)


def fresh():
    return init_state(PARAMS, OPTIMIZER, KEY)


validation_loss = jax.jit(lambda params: loss_fn(params, DATA, KEY)[0])


def validate(params):
    return {"accuracy": float(params["bias"]), "loss": float(validation_loss(params))}


def run(run_dir, *, step_fn=STEP, num_steps=NUM_STEPS, **options):
    defaults = dict(validate=validate, validate_every=6, log_every=4, save_every=5, progress=False)
    state = options.pop("state", None) or fresh()
    options = defaults | options
    return fit(step_fn, state, DATA, num_steps=num_steps, run_dir=run_dir, **options)


def calling(when, what):
    """`STEP`, but before the step numbered `when` it calls `what`."""
    count = iter(range(1, 1000))

    def step(state, data):
        if next(count) == when:
            what()
        return STEP(state, data)

    return step


def fail():
    raise RuntimeError("the machine has gone")


def lines(run_dir, *, but=("train_seconds",)):
    text = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in but} for line in text]


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
