"""The inner loop against a plain loop of optax, in float64."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import references

from metagen_jax.gradients import gradients, mixed_gradients
from metagen_jax.meta.adapt import adapt, at_step
from metagen_jax.meta.maml import maml_loss
from metagen_jax.types import Episode

RATE = 0.05
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def example():
    rng = np.random.default_rng(0)
    params = {
        "body": {"kernel": rng.normal(size=(2, 4)), "bias": rng.normal(size=4)},
        "head": {"kernel": rng.normal(size=(4, 1))},
    }
    support = (rng.normal(size=(6, 2)), rng.normal(size=(6, 1)))
    return jax.tree.map(jnp.asarray, (params, support))


def plain_loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["body"]["kernel"] + params["body"]["bias"])
    return jnp.mean((hidden @ params["head"]["kernel"] - y) ** 2)


def loss_fn(params, batch, key):
    del key
    loss = plain_loss(params, batch)
    return loss, {"root": jnp.sqrt(loss)}


def assert_close(actual, expected, rtol=1e-11, atol=1e-12):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(RATE),
        optax.sgd(RATE, momentum=0.9, nesterov=True),
        optax.adamw(RATE, eps_root=1e-8),
        optax.sgd(optax.linear_schedule(RATE, 0.0, 3)),
    ],
    ids=["sgd", "nesterov", "adamw", "schedule"],
)
def test_equals_a_plain_loop_of_optax(optimizer):
    params, support = example()

    @jax.jit
    def loop(params):
        path = references.optimizer_loop(plain_loss, params, [support] * 3, optimizer)
        return stack(path), jnp.stack([plain_loss(p, support) for p in path[:-1]])

    adapted = jax.jit(
        lambda params: adapt(
            gradients(loss_fn),
            params,
            support,
            KEY,
            optimizer=optimizer,
            num_steps=3,
            trajectory=True,
        )
    )(params)
    path, losses = loop(params)
    assert_close(adapted.trajectory, path)
    assert_close(adapted.params, jax.tree.map(lambda x: x[-1], path))
    assert_close(adapted.metrics, {"loss": losses, "root": jnp.sqrt(losses)})


def test_each_task_has_an_optimizer_state_of_its_own():
    params, support = example()
    supports = jax.tree.map(lambda x: jnp.stack([x, 2 * x, x - 1]), support)

    def adapted(params, support):
        optimizer = optax.adam(RATE, eps_root=1e-8)
        return adapt(
            gradients(loss_fn), params, support, KEY, optimizer=optimizer, num_steps=4
        ).params

    jitted = jax.jit(adapted)
    one_by_one = [jitted(params, jax.tree.map(lambda x, t=t: x[t], supports)) for t in range(3)]
    together = jax.jit(jax.vmap(adapted, in_axes=(None, 0)))(params, supports)
    assert_close(together, stack(one_by_one))
    assert_close(adapted(params, support), one_by_one[0])


def with_rows(params, entries):
    """`params` with a bias for each of so many steps."""
    rows = np.random.default_rng(1).normal(size=(entries, 4))
    return params | {"body": params["body"] | {"bias": jnp.asarray(rows)}}


@pytest.mark.parametrize("entries", [4, 2])
def test_per_step_leaves_are_read_by_the_step_and_moved_by_the_outer_loop_alone(entries):
    start, support = example()
    params = with_rows(start, entries)

    def at(params, step):
        body = params["body"]
        return params | {"body": body | {"bias": body["bias"][min(step, entries - 1)]}}

    @jax.jit
    def loop(params):
        path = [params]
        for step in range(3):
            grads = jax.grad(plain_loss)(at(path[-1], step), support)
            grads["body"]["bias"] = jnp.zeros_like(params["body"]["bias"])
            path.append(jax.tree.map(lambda p, g: p - RATE * g, path[-1], grads))
        return path

    def is_bias(path):
        return path == "body/bias"

    @jax.jit
    def trajectory(params):
        return adapt(
            gradients(loss_fn),
            params,
            support,
            KEY,
            optimizer=optax.sgd(RATE),
            num_steps=3,
            per_step=is_bias,
            trajectory=True,
        ).trajectory

    assert_close(trajectory(params), stack(loop(params)))
    for step in (0, 1, 3):
        assert_close(at_step(params, step, is_bias), at(params, step))

    def sum_of_query_losses(params):
        return sum(plain_loss(at(p, i), support) for i, p in enumerate(loop(params)[1:], 1))

    meta_loss = maml_loss(
        loss_fn,
        inner_optimizer=optax.sgd(RATE),
        num_steps=3,
        per_step=is_bias,
        query_loss_weights=jnp.ones(3),
    )
    meta_gradient = jax.jit(jax.grad(meta_loss, has_aux=True))
    grads, _ = meta_gradient(params, Episode(support, support), KEY)
    assert_close(grads, jax.jit(jax.grad(sum_of_query_losses))(params))
    last = maml_loss(loss_fn, inner_optimizer=optax.sgd(RATE), num_steps=3, per_step=is_bias)
    expected = plain_loss(at(loop(params)[-1], 3), support)
    assert_close(jax.jit(last)(params, Episode(support, support), KEY)[0], expected)


def test_no_steps_give_the_parameters_back():
    params, support = example()
    adapted = adapt(
        gradients(loss_fn),
        params,
        support,
        KEY,
        optimizer=optax.adam(RATE),
        num_steps=0,
        trajectory=True,
    )
    assert_close(adapted.params, params, rtol=0, atol=0)
    assert_close(adapted.trajectory, jax.tree.map(lambda x: x[None], params), rtol=0, atol=0)
    assert jax.tree.map(jnp.shape, adapted.metrics) == {"loss": (0,), "root": (0,)}


def test_every_step_draws_its_own_mini_batch_and_its_own_noise():
    params, (x, y) = example()

    def batch_at(support, step, key):
        """Two rows from `2 step` on, shuffled by the key."""
        rows = jax.random.permutation(key, 2 * step + jnp.arange(2))
        return jax.tree.map(lambda leaf: leaf[rows], support)

    def noisy_loss(params, batch, key):
        x, y = batch
        x = x + 0.1 * jnp.arange(1, 3)[:, None] * jax.random.normal(key, x.shape)
        return loss_fn(params, (x, y), key)

    adapted = jax.jit(
        lambda params: (
            adapt(
                gradients(noisy_loss),
                params,
                (x, y),
                KEY,
                optimizer=optax.sgd(RATE),
                num_steps=3,
                batch_at=batch_at,
            ).params
        )
    )(params)

    @jax.jit
    def loop(params):
        for step in range(3):
            batch_key, grad_key = jax.random.split(jax.random.fold_in(KEY, step))
            batch = batch_at((x, y), step, batch_key)
            grads = jax.grad(noisy_loss, has_aux=True)(params, batch, grad_key)[0]
            params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
        return params

    assert_close(adapted, loop(params))


def test_trainable_moves_what_it_chooses_and_nothing_else():
    params, support = example()
    asked = []

    def head_only(path):
        asked.append(path)
        return path == "head/kernel"

    def adapted(params):
        return adapt(
            gradients(loss_fn),
            params,
            support,
            KEY,
            optimizer=optax.adam(RATE, eps_root=1e-8),
            num_steps=3,
            trainable=head_only,
            trajectory=True,
        )

    adapted = jax.jit(adapted)(params)
    assert set(asked) == {"body/bias", "body/kernel", "head/kernel"}
    assert_close(adapted.params["body"], params["body"], rtol=0, atol=0)

    @jax.jit
    def head_loop(head):
        def head_loss(head, batch):
            return plain_loss({"body": params["body"], "head": head}, batch)

        optimizer = optax.adam(RATE, eps_root=1e-8)
        return stack(references.optimizer_loop(head_loss, head, [support] * 3, optimizer))

    path = head_loop(params["head"])
    assert_close(adapted.trajectory["head"], path)
    repeated = jax.tree.map(lambda x: jnp.stack([x] * 4), params["body"])
    assert_close(adapted.trajectory["body"], repeated, rtol=0, atol=0)


class Layers(NamedTuple):
    body: jax.Array
    head: list


def test_trainable_sees_fields_and_indices_as_a_path():
    asked = []
    params = Layers(jnp.ones(2), [jnp.ones(2), jnp.ones(2)])

    def loss(params, batch, key):
        return jnp.sum(params.body * params.head[0] * params.head[1]), {}

    adapted = adapt(
        gradients(loss),
        params,
        None,
        KEY,
        optimizer=optax.sgd(RATE),
        num_steps=1,
        trainable=lambda path: asked.append(path) or path == "head/1",
    )
    assert set(asked) == {"body", "head/0", "head/1"}
    expected = Layers(jnp.ones(2), [jnp.ones(2), jnp.full(2, 1 - RATE)])
    assert_close(adapted.params, expected)


@pytest.mark.parametrize(("lift", "gradient"), [(gradients, "reverse"), (mixed_gradients, "mixed")])
def test_differentiates_through_the_learning_rate_and_the_support_set(lift, gradient):
    params, support = example()

    @jax.jit
    def loss_after(rate, support):
        adapted = adapt(
            lift(loss_fn),
            params,
            support,
            KEY,
            optimizer=optax.sgd(rate),
            num_steps=3,
            gradient=gradient,
        )
        return plain_loss(adapted.params, example()[1])

    grads = jax.jit(jax.grad(loss_after, argnums=(0, 1)))(jnp.float64(RATE), support)
    expected = references.finite_differences(lambda a: loss_after(*a), (RATE, support))
    assert_close(grads, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": -1}, "num_steps is -1; give 0 or more"),
        ({"gradient": "second_order"}, "gradient is 'second_order'; give \"reverse\","),
        (
            {"trainable": lambda path: path == "haed/kernel"},
            r"none of the parameters.*'body/bias', 'body/kernel', 'head/kernel'",
        ),
    ],
)
@pytest.mark.usefixtures("ill_typed")
def test_refuses_in_one_line(options, message):
    params, support = example()
    options = {"optimizer": optax.sgd(RATE), "num_steps": 1} | options
    with pytest.raises(ValueError, match=message) as error:
        adapt(gradients(loss_fn), params, support, KEY, **options)
    assert "\n" not in str(error.value)
