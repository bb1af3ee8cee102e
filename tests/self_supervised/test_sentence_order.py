"""The order of two segments: the loss by hand, each order as often, and what can be learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from metagen_jax.errors import UserError
from metagen_jax.gradients import gradients, task_keys
from metagen_jax.self_supervised.sentence_order import sentence_order_loss
from metagen_jax.training import fit, init_state, train_step

KEY = jax.random.key(0)


def pairs(num, seed=0):
    """Two tokens each, the smaller one first."""
    rng = np.random.default_rng(seed)
    first, gap = rng.integers(5, 10, num), rng.integers(1, 5, num)
    tokens = np.stack([np.stack([first, first + gap], 1), np.stack([first + gap, first], 1)], 1)
    return tokens, np.ones_like(tokens), np.broadcast_to(np.array([0, 1]), tokens.shape)


def compare(params, tokens, documents, types):
    """A logit of the difference of what two tokens are worth."""
    del documents, types
    worth = params[tokens]
    return worth[:, 1] - worth[:, 0]


def test_the_loss_by_a_loop_with_each_order_as_often():
    batch, worth = pairs(2000), jnp.linspace(-1, 1, 20)
    loss, metrics = sentence_order_loss(compare)(worth, batch, KEY)
    losses, orders = [], []
    for key, tokens in zip(task_keys(KEY, 2000), batch[0], strict=True):
        in_order = bool(jax.random.bernoulli(key))
        a, b = tokens[0 if in_order else 1]
        logit = float(worth[b] - worth[a])
        losses.append(np.log1p(np.exp(-logit if in_order else logit)))
        orders.append(in_order)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    assert metrics["accuracy"] == 1
    assert scipy.stats.binomtest(sum(orders), 2000, 0.5).pvalue > 1e-3
    # Keys of one's own, as several devices have them, give the same.
    again, _ = sentence_order_loss(compare)(worth, batch, task_keys(KEY, 2000))
    assert again == loss


def test_a_net_that_knows_nothing_has_log_2():
    loss, metrics = sentence_order_loss(compare)(jnp.zeros(20), pairs(500), KEY)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    assert 0.4 < metrics["accuracy"] < 0.6


@pytest.mark.slow
def test_an_order_is_learned():
    optimizer = optax.adam(0.1)

    def sample(key, data):
        chosen = jax.random.randint(key, (32,), 0, len(data[0]))
        return jax.tree.map(lambda x: x[chosen], data)

    result = fit(
        train_step(gradients(sentence_order_loss(compare)), optimizer, sample),
        init_state(jnp.zeros(20), optimizer, KEY),
        jax.tree.map(jnp.asarray, pairs(200)),
        num_steps=60,
        progress=False,
    )
    loss, metrics = sentence_order_loss(compare)(result.best_params, pairs(300, seed=1), KEY)
    assert metrics["accuracy"] > 0.95
    assert loss < 0.3


def test_says_what_is_needed():
    with pytest.raises(UserError, match=r"the logits have shape \(3, 1\) for 3 pairs; give one"):
        sentence_order_loss(lambda p, *_: jnp.zeros((3, 1)))((), pairs(3), KEY)
