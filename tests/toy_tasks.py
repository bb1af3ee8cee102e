"""Small smooth regression tasks, for the tests of meta-learners."""

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.supervised import squared_error_loss
from metagen_jax.types import Episode

KEY = jax.random.key(0)


def net(params, x):
    """Smooth, so that finite differences and float rounding mean something."""
    hidden = jnp.tanh(x @ params["body"]["kernel"] + params["body"]["bias"])
    return hidden @ params["head"]["kernel"]


regression = squared_error_loss(net)


def plain_loss(params, batch):
    return regression(params, batch, KEY)[0]


def example(num_tasks=3):
    """Parameters and a batch of tasks, each with its own inputs and targets."""
    rng = np.random.default_rng(0)
    params = {
        "body": {"kernel": rng.normal(size=(2, 4)), "bias": rng.normal(size=4)},
        "head": {"kernel": rng.normal(size=(4, 1))},
    }
    tasks = Episode(
        (rng.normal(size=(num_tasks, 3, 2)), rng.normal(size=(num_tasks, 3, 1))),
        (rng.normal(size=(num_tasks, 5, 2)), rng.normal(size=(num_tasks, 5, 1))),
    )
    return jax.tree.map(jnp.asarray, (params, tasks))


def one_task():
    params, tasks = example(1)
    return params, jax.tree.map(lambda x: x[0], tasks)
