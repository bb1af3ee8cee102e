"""Learned update rules against plain loops and finite differences, in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references

from metagen_jax.errors import UserError
from metagen_jax.meta import update_rules
from metagen_jax.meta.maml import maml_loss, maml_predict
from metagen_jax.types import Episode, MetaParams

KEY, RATE, STEPS = jax.random.key(0), 0.1, 2


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def example():
    params = {
        "body": {"kernel": random(2, 3), "bias": random(3, seed=1)},
        "head": {"kernel": random(3, 1, seed=2)},
    }
    support = (random(4, 2, seed=3), random(4, 1, seed=4))
    return params, Episode(support, (random(5, 2, seed=5), random(5, 1, seed=6)))


def net(params, x):
    hidden = jnp.tanh(x @ params["body"]["kernel"] + params["body"]["bias"])
    return hidden @ params["head"]["kernel"]


def plain_loss(params, batch):
    return jnp.mean((net(params, batch[0]) - batch[1]) ** 2)


def loss_fn(params, batch, key):
    del key
    return plain_loss(params, batch), {}


def noisy(tree, scale):
    """A rule's parameters away from their symmetric start."""
    leaves, treedef = jax.tree.flatten(tree)
    noise = [scale * random(*x.shape, seed=10 + i) for i, x in enumerate(leaves)]
    return treedef.unflatten([x + n for x, n in zip(leaves, noise, strict=True)])


def curved(factors, gradient):
    """`gradient` times each matrix along its mode, by index, as a curvature rule should."""
    if gradient.ndim == 1:
        return jnp.einsum("ai,i->a", factors[0], gradient)
    return jnp.einsum("ai,bj,ij->ab", factors[0], factors[1], gradient)


RULES = {
    "meta_sgd": (
        lambda params: update_rules.init_meta_sgd(params, rate=RATE),
        update_rules.meta_sgd,
        lambda rule, grads, step: jax.tree.map(lambda r, g: -r * g, rule, grads),
    ),
    "per_layer_per_step": (
        lambda params: update_rules.init_per_layer_per_step(params, num_steps=STEPS, rate=RATE),
        update_rules.per_layer_per_step,
        lambda rule, grads, step: jax.tree.map(
            lambda r, g: -r[min(step, STEPS - 1)] * g, rule, grads
        ),
    ),
    "meta_curvature": (
        update_rules.init_meta_curvature,
        lambda factors: update_rules.meta_curvature(factors, rate=RATE),
        lambda rule, grads, step: jax.tree.map(
            lambda g, f: -RATE * curved(f, g), grads, rule, is_leaf=lambda x: isinstance(x, tuple)
        ),
    ),
}


def plain_loop(update, rule, params, support, num_steps, moves=lambda path: True):
    for step in range(num_steps):
        updates = update(rule, jax.grad(plain_loss)(params, support), step)
        params = {
            part: {
                name: leaf + updates[part][name] if moves(f"{part}/{name}") else leaf
                for name, leaf in leaves.items()
            }
            for part, leaves in params.items()
        }
    return params


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("part", "gradient"), [(None, "mixed"), ("head", "reverse")])
def test_a_rule_equals_its_plain_loop_in_loss_prediction_and_gradients(name, part, gradient):
    init, rule, update = RULES[name]
    params, episode = example()
    meta = MetaParams(params, noisy(init(params), 0.05))
    trainable = None if part is None else (lambda path: path.startswith(part))
    options = {"rule": rule, "num_steps": 3, "trainable": trainable}

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def expected(meta):
        adapted = plain_loop(
            update, meta.rule, meta.init, episode.support, 3, trainable or (lambda path: True)
        )
        return plain_loss(adapted, episode.query), net(adapted, episode.query[0])

    loss = update_rules.learned_rule_loss(loss_fn, gradient=gradient, **options)
    (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(meta, episode, KEY)
    (reference, outputs), reference_grads = expected(meta)
    chex.assert_trees_all_close((value, grads), (reference, reference_grads), rtol=1e-10)
    predict = update_rules.learned_rule_predict(
        loss_fn, lambda params, support, inputs: net(params, inputs), **options
    )
    actual = jax.jit(predict)(meta, episode.support, episode.query[0], KEY)
    np.testing.assert_allclose(actual, outputs, rtol=1e-10)


@pytest.mark.parametrize("name", RULES)
def test_the_meta_gradient_of_initialisation_and_rule_equals_finite_differences(name):
    init, rule, _ = RULES[name]
    params, episode = example()
    meta = MetaParams(params, noisy(init(params), 0.05))
    loss = update_rules.learned_rule_loss(loss_fn, rule=rule, num_steps=STEPS)
    value = jax.jit(lambda meta: loss(meta, episode, KEY)[0])
    grads = jax.jit(jax.grad(value))(meta)
    numerical = references.finite_differences(lambda meta: float(value(meta)), meta)
    chex.assert_trees_all_close(grads, numerical, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_at_its_start_is_maml(name):
    init, rule, _ = RULES[name]
    params, episode = example()
    meta = MetaParams(params, init(params))
    loss = update_rules.learned_rule_loss(loss_fn, rule=rule, num_steps=STEPS)
    plain = maml_loss(loss_fn, inner_optimizer=optax.sgd(RATE), num_steps=STEPS)
    value, grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(meta, episode, KEY)
    of_maml = jax.jit(jax.value_and_grad(plain, has_aux=True))
    expected, expected_grads = of_maml(params, episode, KEY)
    chex.assert_trees_all_close((value, grads.init), (expected, expected_grads), rtol=1e-10)
    assert sum(float(jnp.abs(g).sum()) for g in jax.tree.leaves(grads.rule)) > 1e-3


def test_per_step_leaves_reach_the_inner_loop_of_a_learned_rule():
    params, episode = example()
    params["body"]["bias"] = random(STEPS + 1, 3, seed=7)
    options = {"num_steps": STEPS, "per_step": lambda path: path == "body/bias"}
    rates = update_rules.init_meta_sgd(params, rate=RATE)
    sgd = {"inner_optimizer": optax.sgd(RATE), **options}
    rule = {"rule": update_rules.meta_sgd, **options}

    def answer(params, support, inputs):
        return net(params, inputs)

    meta = MetaParams(params, rates)
    actual = jax.jit(update_rules.learned_rule_loss(loss_fn, **rule))(meta, episode, KEY)
    expected = jax.jit(maml_loss(loss_fn, **sgd))(params, episode, KEY)
    np.testing.assert_allclose(actual[0], expected[0])
    inputs = (episode.support, episode.query[0], KEY)
    predict = update_rules.learned_rule_predict(loss_fn, answer, every_step=True, **rule)
    expected = jax.jit(maml_predict(loss_fn, answer, every_step=True, **sgd))(params, *inputs)
    np.testing.assert_allclose(jax.jit(predict)(meta, *inputs), expected)


def test_annealed_weights_by_hand():
    def weights(step):
        return update_rules.annealed_weights(step, num_inner_steps=4, anneal_steps=10)

    np.testing.assert_allclose(weights(0), [0.25] * 4)
    np.testing.assert_allclose(weights(5), [0.125, 0.125, 0.125, 0.625])
    for step in (10, 1000):
        np.testing.assert_allclose(weights(step), [0, 0, 0, 1])
    np.testing.assert_allclose(jax.jit(weights)(jnp.asarray(5)), weights(5))


def test_curvature_of_a_convolution_acts_on_positions_inputs_and_outputs():
    kernel, scalar = random(3, 2, 4, 5), jnp.asarray(2.0)
    params = {"kernel": kernel, "scalar": scalar}
    factors = noisy(update_rules.init_meta_curvature(params), 0.3)
    assert [m.shape for m in factors["kernel"]] == [(6, 6), (4, 4), (5, 5)]
    rule = update_rules.meta_curvature(factors, rate=0.1)
    updates, _ = rule.update(params, rule.init(params))
    expected = jnp.einsum("wx,ci,fo,xio->wcf", *factors["kernel"], kernel.reshape(6, 4, 5))
    np.testing.assert_allclose(updates["kernel"], -0.1 * expected.reshape(kernel.shape), rtol=1e-11)
    np.testing.assert_allclose(updates["scalar"], -0.1 * factors["scalar"][0][0, 0] * scalar)


@pytest.mark.parametrize(
    ("rule", "of_leaf", "says"),
    [
        (update_rules.meta_sgd, jnp.ones(3), "one rate for each"),
        (update_rules.per_layer_per_step, jnp.ones((2, 2)), r"give \(num_steps,\)"),
        (
            lambda factors: update_rules.meta_curvature(factors, rate=1.0),
            (jnp.eye(2), jnp.eye(3)),
            r"have shapes \[\(2, 2\), \(3, 3\)\]; give \[\(2, 2\), \(2, 2\)\]",
        ),
    ],
)
def test_refuses_parameters_of_a_rule_that_are_not_those_of_the_net(rule, of_leaf, says):
    params = {"kernel": jnp.ones((2, 2))}
    optimizer = rule({"kernel": of_leaf})
    with pytest.raises(UserError, match=says):
        optimizer.update(params, optimizer.init(params))


def test_refuses_counts_below_one():
    with pytest.raises(UserError, match="num_inner_steps is 0"):
        update_rules.annealed_weights(0, num_inner_steps=0, anneal_steps=3)
    with pytest.raises(UserError, match="num_steps is 0"):
        update_rules.init_per_layer_per_step(example()[0], num_steps=0, rate=RATE)
