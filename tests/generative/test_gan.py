"""GANs: losses and penalties by hand, the field of two players to second order, slow leaves."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references

from metagen_jax.errors import UserError
from metagen_jax.generative.gan import (
    HINGE,
    NON_SATURATING,
    WASSERSTEIN,
    GANParams,
    gan_gradients,
    gan_optimizer,
    gradient_penalty,
    r1_penalty,
)
from metagen_jax.gradients import gradients, mean_over_tasks
from metagen_jax.meta.adapt import adapt
from metagen_jax.meta.maml import maml_gradients, maml_loss
from metagen_jax.parallel import data_parallel
from metagen_jax.training import init_state, train_step
from metagen_jax.types import Episode

KEY = jax.random.key(0)
LOSSES = {"non_saturating": NON_SATURATING, "wasserstein": WASSERSTEIN, "hinge": HINGE}
LN2 = np.log(2)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def latents(keys):
    return jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)


def generate(generator, batch, keys):
    """A smooth generator of pairs, which adds to the label of each example its embedding."""
    hidden = jnp.tanh(latents(keys) @ generator["w"] + generator["label"][batch["label"]])
    return {"x": hidden @ generator["v"], "label": batch["label"]}


def score(discriminator, batch):
    hidden = jnp.tanh(batch["x"] @ discriminator["w"] + discriminator["label"][batch["label"]])
    return hidden @ discriminator["v"]


def penalise(score, real, fake, key):
    return 3.0 * gradient_penalty(score, real, fake, jax.random.uniform(key)) + 0.7 * r1_penalty(
        score, real
    )


def example(seed=0, num_examples=4):
    rng = np.random.default_rng(seed)
    generator = {
        "w": rng.normal(size=(3, 4)),
        "v": rng.normal(size=(4, 2)),
        "label": rng.normal(size=(2, 4)),
    }
    discriminator = {
        "w": rng.normal(size=(2, 5)),
        "v": rng.normal(size=5),
        "label": rng.normal(size=(2, 5)),
    }
    batch = {"x": rng.normal(size=(num_examples, 2)), "label": np.arange(num_examples) % 2}
    return jax.tree.map(jnp.asarray, (GANParams(generator, discriminator), batch))


FIELD = gan_gradients(generate, score, losses=NON_SATURATING, penalty=penalise)


def test_losses_worked_by_hand():
    """Logits of -ln 3, 0 and ln 3 are probabilities of 1/4, 1/2 and 3/4."""
    scores = jnp.log(jnp.array([1 / 3, 1, 3]))
    for function, expected in (
        (NON_SATURATING.real, [np.log(4), LN2, np.log(4 / 3)]),
        (NON_SATURATING.fake, [np.log(4 / 3), LN2, np.log(4)]),
        (NON_SATURATING.generator, [np.log(4), LN2, np.log(4 / 3)]),
    ):
        np.testing.assert_allclose(function(scores), expected, rtol=1e-6)
    scores = jnp.array([-3.0, -0.5, 0.25, 2.0])
    for function, expected in (
        (HINGE.real, [4, 1.5, 0.75, 0]),
        (HINGE.fake, [0, 0.5, 1.25, 3]),
        (HINGE.generator, -scores),
        (WASSERSTEIN.real, -scores),
        (WASSERSTEIN.fake, scores),
        (WASSERSTEIN.generator, -scores),
    ):
        np.testing.assert_allclose(function(scores), expected, rtol=1e-6)


@pytest.mark.slow
def test_the_best_discriminator_is_the_log_ratio_and_loses_the_jensen_shannon_divergence(float64):
    """Proposition 1 and theorem 1 of Goodfellow et al. 2014; for the hinge the sign of the
    difference, which loses twice what both have in common."""
    p, q = jnp.array([0.1, 0.2, 0.7]), jnp.array([0.3, 0.3, 0.4])

    def loss(scores, losses):
        return (p * losses.real(scores) + q * losses.fake(scores)).sum()

    best = jnp.log(p / q)
    np.testing.assert_allclose(jax.grad(loss)(best, NON_SATURATING), 0, atol=1e-15)
    assert (jnp.linalg.eigvalsh(jax.hessian(loss)(best, NON_SATURATING)) > 0).all()
    middle = (p + q) / 2
    divergence = ((p * jnp.log(p / middle)).sum() + (q * jnp.log(q / middle)).sum()) / 2
    np.testing.assert_allclose(loss(best, NON_SATURATING), 2 * LN2 - 2 * divergence, rtol=1e-12)
    best = jnp.sign(p - q)
    np.testing.assert_allclose(loss(best, HINGE), 2 * jnp.minimum(p, q).sum(), rtol=1e-12)
    for step in np.eye(3):
        assert loss(best + 0.1 * step, HINGE) > loss(best, HINGE)
        assert loss(best - 0.1 * step, HINGE) > loss(best, HINGE)


def test_gradient_penalty_of_a_linear_critic_and_r1_of_a_quadratic(float64):
    """A critic `w x` has the slope |w| everywhere; `x A x / 2` has A x at x."""
    rng = np.random.default_rng(0)
    w, real, fake = rng.normal(size=(3, 4))
    half = rng.normal(size=(4, 4))
    a = half + half.T

    def quadratic(x):
        return x @ a @ x / 2

    slope = np.linalg.norm(w)
    for mix in (0.0, 0.3, 1.0):
        penalty = gradient_penalty(lambda x: w @ x, real, fake, mix)
        np.testing.assert_allclose(penalty, (slope - 1) ** 2, rtol=1e-12)
        between = mix * real + (1 - mix) * fake
        penalty = gradient_penalty(quadratic, real, fake, mix)
        np.testing.assert_allclose(penalty, (np.linalg.norm(a @ between) - 1) ** 2, rtol=1e-12)
    np.testing.assert_allclose(r1_penalty(lambda x: w @ x, real), slope**2 / 2, rtol=1e-12)
    np.testing.assert_allclose(
        r1_penalty(quadratic, real), np.square(a @ real).sum() / 2, rtol=1e-12
    )


def test_a_flat_critic_is_penalised_by_one_with_a_gradient_of_zero():
    grads = jax.grad(lambda w: gradient_penalty(lambda x: w @ x, jnp.ones(3), jnp.zeros(3), 0.5))
    np.testing.assert_array_equal(grads(jnp.zeros(3)), 0)
    assert gradient_penalty(lambda x: 0 * x.sum(), jnp.ones(3), jnp.zeros(3), 0.5) == 1


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.slow
def test_field_is_each_player_s_gradient_of_its_own_loss(float64, name):
    """Against a loop over examples, differentiated player by player."""
    params, batch = example()
    losses = LOSSES[name]
    field = gan_gradients(generate, score, losses=losses, penalty=penalise)

    def by_loop(params):
        total_generator, total_discriminator = 0.0, 0.0
        for n in range(4):
            real = jax.tree.map(lambda x, n=n: x[n : n + 1], batch)
            latent_key, penalty_key = jax.random.split(jax.random.fold_in(KEY, n))
            fake = generate(params.generator, real, latent_key[None])
            score_fake = score(params.discriminator, fake)[0]
            total_generator += losses.generator(score_fake) / 4

            def score_x(x, real=real):
                return score(params.discriminator, {"x": x[None], "label": real["label"]})[0]

            mix = jax.random.uniform(penalty_key)
            at = mix * real["x"][0] + (1 - mix) * fake["x"][0]
            slope = jnp.sqrt(jnp.square(jax.grad(score_x)(at)).sum())
            r1 = jnp.square(jax.grad(score_x)(real["x"][0])).sum() / 2
            total_discriminator += (
                losses.real(score(params.discriminator, real)[0])
                + losses.fake(score_fake)
                + 3 * (slope - 1) ** 2
                + 0.7 * r1
            ) / 4
        return total_generator, total_discriminator

    @jax.jit
    def plain(params):
        of_generator = jax.grad(lambda g: by_loop(params._replace(generator=g))[0])
        of_discriminator = jax.grad(lambda d: by_loop(params._replace(discriminator=d))[1])
        return GANParams(of_generator(params[0]), of_discriminator(params[1])), by_loop(params)

    expected, expected_losses = plain(params)
    direction, metrics = jax.jit(field)(params, batch, KEY)
    chex.assert_trees_all_close(direction, expected, rtol=1e-11, atol=1e-13)
    losses_of_both = [metrics["generator_loss"], metrics["discriminator_loss"]]
    np.testing.assert_allclose(losses_of_both, expected_losses, rtol=1e-12)
    assert sorted(metrics) == [
        "discriminator_loss",
        "fake_score",
        "generator_loss",
        "penalty",
        "real_score",
    ]


@pytest.mark.slow
def test_without_jit_the_field_is_the_same(float64):
    params, batch = example()
    field = gan_gradients(generate, score, losses=HINGE)
    chex.assert_trees_all_close(
        field(params, batch, KEY), jax.jit(field)(params, batch, KEY), rtol=1e-12, atol=1e-14
    )


def flat(params):
    return jax.flatten_util.ravel_pytree(params)


@pytest.mark.slow
def test_derivatives_of_the_field_hold_the_cross_terms(float64):
    """All of its Jacobian by finite differences: not symmetric, with both players in each row."""
    params, batch = example()
    vector, unflatten = flat(params)

    def field(vector):
        return flat(FIELD(unflatten(vector), batch, KEY)[0])[0]

    jacobian = jax.jit(jax.jacrev(field))(vector)
    compiled = jax.jit(field)
    for i in range(0, len(vector), 3):
        step = 1e-4 * jnp.zeros_like(vector).at[i].set(1)
        numerical = (
            8 * (compiled(vector + step) - compiled(vector - step))
            - (compiled(vector + 2 * step) - compiled(vector - 2 * step))
        ) / 12e-4
        np.testing.assert_allclose(jacobian[:, i], numerical, rtol=1e-7, atol=1e-9)
    num_generator = len(flat(params.generator)[0])
    cross = jacobian[:num_generator, num_generator:], jacobian[num_generator:, :num_generator]
    assert min(jnp.abs(x).max() for x in cross) > 1e-2
    assert jnp.abs(cross[0] - cross[1].T).max() > 1e-2


@pytest.mark.slow
def test_meta_gradient_through_adaptation_equals_finite_differences(float64):
    """`J^T v`, the adapted parameters' Jacobian J by finite differences of their products."""
    params, support = example()
    _, query = example(1)
    optimizer, num_steps = optax.sgd(0.1), 3
    meta = maml_gradients(FIELD, inner_optimizer=optimizer, num_steps=num_steps)
    direction, metrics = jax.jit(meta)(params, Episode(support, query), KEY)
    adapt_key, query_key = jax.random.split(KEY)

    @jax.jit
    def adapted(params):
        return adapt(
            FIELD, params, support, adapt_key, optimizer=optimizer, num_steps=num_steps
        ).params

    at_query, expected_metrics = jax.jit(FIELD)(adapted(params), query, query_key)
    weights = flat(at_query)[0]
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-11)

    @jax.jit
    def product(params):
        return flat(adapted(params))[0] @ weights

    numerical = references.finite_differences(product, params, step=1e-4)
    chex.assert_trees_all_close(direction, numerical, rtol=1e-7, atol=1e-9)


def test_meta_gradients_of_a_loss_are_those_of_maml(float64):
    def loss_fn(params, batch, key):
        errors = jnp.tanh(batch["x"] @ params["w"]) - jax.random.normal(key)
        return jnp.square(errors).mean(), {"largest": errors.max()}

    params = example()[0].discriminator
    episode = Episode(example()[1], example(1)[1])
    options = {"inner_optimizer": optax.sgd(0.1), "num_steps": 2}
    for gradient in ("reverse", "first_order"):
        expected = gradients(maml_loss(loss_fn, gradient=gradient, **options))
        actual = maml_gradients(gradients(loss_fn), gradient=gradient, **options)
        results = [jax.jit(f)(params, episode, KEY) for f in (actual, expected)]
        chex.assert_trees_all_close(*results, rtol=1e-12, atol=1e-14)


def test_vmap_over_tasks_of_parameters_equals_a_loop(float64):
    tasks = [example(seed) for seed in range(3)]
    keys = jax.random.split(KEY, 3)
    together = jax.jit(jax.vmap(FIELD))(*jax.tree.map(lambda *x: jnp.stack(x), *tasks), keys)
    one = jax.jit(FIELD)
    alone = [one(*task, key) for task, key in zip(tasks, keys, strict=True)]
    chex.assert_trees_all_close(
        together, jax.tree.map(lambda *x: jnp.stack(x), *alone), rtol=1e-11, atol=1e-13
    )


@pytest.mark.slow
def test_a_batch_over_devices_or_tasks_is_the_same_as_on_one(float64):
    params, batch = example(num_examples=8)
    expected = jax.jit(FIELD)(params, batch, KEY)
    parallel = data_parallel(FIELD, devices=jax.devices()[:4])(params, batch, KEY)
    chex.assert_trees_all_close(parallel, expected, rtol=1e-11, atol=1e-13)
    tasks = jax.tree.map(lambda x: jnp.stack([x, x]), batch)
    keys = jnp.stack([KEY, KEY])
    averaged = mean_over_tasks(FIELD, chunk=1)(params, tasks, keys)
    chex.assert_trees_all_close(averaged, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [0.0, 1e4])
@pytest.mark.slow
def test_finite_at_extreme_scores_in_float32(name, size):
    params, batch = jax.tree.map(lambda x: x.astype(jnp.float32), example())
    batch["label"] = batch["label"].astype(jnp.int32)
    discriminator = {**params.discriminator, "v": size * params.discriminator["v"]}
    field = gan_gradients(generate, score, losses=LOSSES[name], penalty=penalise)
    results = jax.jit(field)(params._replace(discriminator=discriminator), batch, KEY)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(results))


@pytest.mark.slow
def test_generator_moves_once_in_so_many_steps_and_slow_leaves_follow():
    """A training step with a moving average; weight decay is kept from what is slow."""
    params, batch = jax.tree.map(lambda x: x.astype(jnp.float32), example())
    params = params._replace(average=params.generator)
    batch["label"] = batch["label"].astype(jnp.int32)
    optimizer = gan_optimizer(optax.adam(1e-2), optax.adamw(1e-2), critic_steps=3)

    def update_slow(params, batch, key):
        average = optax.incremental_update(params.generator, params.average, 0.25)
        return params._replace(average=average)

    step = train_step(FIELD, optimizer, lambda key, data: data, update_slow=update_slow)
    state = init_state(params, optimizer, KEY)
    path = [params]
    for _ in range(7):
        state, _ = step(state, batch)
        path.append(jax.tree.map(jnp.array, state.params))
    moved = [
        not np.array_equal(a.generator["w"], b.generator["w"]) for a, b in itertools.pairwise(path)
    ]
    assert moved == [False, False, True, False, False, True, False]
    assert all(
        not np.array_equal(a.discriminator["w"], b.discriminator["w"])
        for a, b in itertools.pairwise(path)
    )
    average = params.average
    for after in path[1:]:
        average = jax.tree.map(lambda a, g: a + 0.25 * (g - a), average, after.generator)
        chex.assert_trees_all_close(after.average, average, rtol=1e-6, atol=1e-7)
    # The generator's Adam has seen two gradients, those of the steps at which it moved.
    alone, adam = init_state(params, optimizer, KEY), optax.adam(1e-2)
    state, generator = adam.init(params.generator), params.generator
    for i in (2, 5):
        _, key = jax.random.split(jax.random.fold_in(alone.key, i))
        direction = FIELD(path[i]._replace(generator=generator), batch, key)[0].generator
        updates, state = adam.update(direction, state)
        generator = optax.apply_updates(generator, updates)
    chex.assert_trees_all_close(path[7].generator, generator, rtol=1e-5, atol=1e-6)


def test_says_what_is_needed():
    params, batch = example()
    field = gan_gradients(generate, lambda d, b: score(d, b)[:, None], losses=HINGE)
    with pytest.raises(UserError, match=r"scores of 4 examples have shape \(4, 1\); give one"):
        field(params, batch, KEY)
    with pytest.raises(UserError, match="critic_steps is 0; give 1 or more"):
        gan_optimizer(optax.sgd(0.1), optax.sgd(0.1), critic_steps=0)
