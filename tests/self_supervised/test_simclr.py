"""SimCLR and BYOL: their losses by hand, what moves what, and that they learn."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagen_jax.errors import UserError
from metagen_jax.gradients import gradients, task_keys
from metagen_jax.nets.mlp import MLP
from metagen_jax.parallel import data_parallel
from metagen_jax.self_supervised.byol import (
    BYOLParams,
    byol_loss,
    byol_optimizer,
    init_byol,
    move_target,
)
from metagen_jax.self_supervised.contrastive import nt_xent
from metagen_jax.self_supervised.decorrelation import vicreg
from metagen_jax.self_supervised.simclr import (
    simclr_loss,
    spread,
    two_view_loss,
    two_views,
)
from metagen_jax.training import init_state, train_step

KEY = jax.random.key(0)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def embed(params, images):
    return jnp.tanh(images.reshape(len(images), -1) @ params["w"])


def noise(key, image):
    return image + 0.3 * jax.random.normal(key, image.shape, image.dtype)


def example(num_images=16, dtype=np.float64):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(6, 4)), dtype)}
    return params, jnp.asarray(rng.normal(size=(num_images, 2, 3, 1)), dtype)


def test_simclr_is_nt_xent_of_two_different_views():
    params, images = example(dtype=np.float32)
    views = two_views(KEY, images, noise)
    keys = [jax.random.split(jax.random.fold_in(KEY, i)) for i in range(16)]
    for j in (0, 1):
        expected = [noise(keys[i][j], images[i]) for i in range(16)]
        np.testing.assert_allclose(views[j], jnp.stack(expected), atol=1e-6)
    loss, metrics = simclr_loss(embed, noise, temperature=0.2)(params, images, KEY)
    z_a, z_b = (embed(params, view) for view in views)
    np.testing.assert_allclose(loss, nt_xent(z_a, z_b, temperature=0.2).mean(), rtol=1e-5)
    assert 0.5 < metrics["spread"] <= 1


@pytest.mark.slow
def test_simclr_on_eight_devices_is_simclr_on_one(float64):
    params, images = example()
    loss = functools.partial(simclr_loss, embed, noise, temperature=0.2)
    expected, metrics = jax.jit(gradients(loss()))(params, images, KEY)
    many = gradients(loss(axis_name="tasks", block_size=3))
    actual, others = data_parallel(many, devices=jax.devices("cpu")[:8])(params, images, KEY)
    chex.assert_trees_all_close(actual, expected, atol=1e-12)
    np.testing.assert_allclose(others["loss"], metrics["loss"], rtol=1e-12)


@pytest.mark.slow
def test_batch_norm_sees_the_views_of_all_devices(float64):
    params, images = example()
    of_device, of_all = (MLP((6,), 4, batch_norm=True, axis_name=name) for name in (None, "tasks"))
    params["head"] = jax.tree.map(jnp.float64, of_all.init(KEY, jnp.zeros((1, 4))))

    def gradient(head, num_devices):
        def project(params, images):
            return head.apply(params["head"], embed(params, images))

        loss_fn = simclr_loss(project, noise, temperature=0.5, axis_name="tasks")
        devices = jax.devices("cpu")[:num_devices]
        grads, metrics = data_parallel(gradients(loss_fn), devices=devices)(params, images, KEY)
        return jax.device_get((grads, metrics["loss"]))

    expected = gradient(of_all, 1)
    chex.assert_trees_all_close(gradient(of_all, 8), expected, atol=1e-12)
    # By the statistics of a device's own two images it is another loss.
    assert abs(gradient(of_device, 8)[1] - expected[1]) > 1e-3


def test_any_loss_of_pairs_compares_two_views():
    params, images = example(dtype=np.float32)
    loss, _ = two_view_loss(embed, noise, vicreg)(params, images, KEY)
    z_a, z_b = (embed(params, view) for view in two_views(KEY, images, noise))
    np.testing.assert_allclose(loss, vicreg(z_a, z_b), rtol=1e-5)


def test_keys_may_be_given_for_each_image():
    params, images = example(dtype=np.float32)
    loss_fn = simclr_loss(embed, noise, temperature=0.2)
    assert loss_fn(params, images, KEY)[0] == loss_fn(params, images, task_keys(KEY, 16))[0]
    assert loss_fn(params, images, KEY)[0] != loss_fn(params, images, jax.random.key(1))[0]


def test_spread_of_collapsed_and_of_even_embeddings():
    assert spread(jnp.ones((50, 8))) < 1e-3
    even = jax.random.normal(KEY, (2000, 8))
    np.testing.assert_allclose(spread(even), 1, atol=0.01)
    line = even[:, :1] * jnp.ones(8)
    np.testing.assert_allclose(spread(line), 1, atol=0.01)  # Two directions, evenly.


def byol_example(dtype=np.float64):
    online, images = example(dtype=dtype)
    predictor = {"p": jnp.eye(4, dtype=dtype) + 0.1}
    return init_byol(online, predictor), images


def predict(predictor, z):
    return z @ predictor["p"]


def test_byol_equals_a_loop_over_images(float64):
    params, images = byol_example()
    params = params._replace(target=jax.tree.map(lambda x: x + 0.5, params.target))
    loss, _ = byol_loss(embed, predict, noise)(params, images, KEY)
    view_a, view_b = two_views(KEY, images, noise)

    def unit(x):
        return x / np.linalg.norm(x)

    total = 0.0
    for a, b in zip(view_a, view_b, strict=True):
        for one, other in ((a, b), (b, a)):
            prediction = np.asarray(predict(params.predictor, embed(params.online, one[None])))[0]
            target = np.asarray(embed(params.target, other[None]))[0]
            total += 2 - 2 * unit(prediction) @ unit(target)
    np.testing.assert_allclose(loss, total / 16, rtol=1e-10)


@pytest.mark.slow
def test_the_target_moves_as_an_average_alone_whatever_the_optimiser():
    params, images = byol_example(np.float32)
    optimizer = byol_optimizer(optax.adamw(0.1, weight_decay=0.5))
    step = train_step(
        gradients(byol_loss(embed, predict, noise)),
        optimizer,
        lambda key, data: data,
        update_slow=move_target(0.9),
    )
    before = jax.device_get(params)
    state, _ = step(init_state(params, optimizer, KEY), images)
    after = jax.device_get(state.params)
    assert np.abs(after.online["w"] - before.online["w"]).min() > 1e-3
    assert np.abs(after.predictor["p"] - before.predictor["p"]).min() > 1e-3
    expected = 0.9 * before.target["w"] + 0.1 * after.online["w"]
    np.testing.assert_allclose(after.target["w"], expected, rtol=1e-5)
    grads, _ = gradients(byol_loss(embed, predict, noise))(params, images, KEY)
    np.testing.assert_array_equal(grads.target["w"], 0)


def signal_and_nuisance(key, num_images=256):
    """Images of which 2 numbers stay in every view and 6 are new in each."""
    return jnp.pad(jax.random.normal(key, (num_images, 2)), ((0, 0), (0, 6)))


def nuisance(key, image):
    return image + jnp.concatenate([jnp.zeros(2), 3 * jax.random.normal(key, (6,))])


@pytest.mark.parametrize("method", ["simclr", "byol"])
@pytest.mark.slow
def test_they_learn_what_stays_the_same(method):
    """The share of a linear embedding's weights that sees the signal: by chance 2 of 8."""
    images = signal_and_nuisance(KEY)

    def linear(params, x):
        return x @ params["w"]

    online = {"w": 0.3 * jax.random.normal(jax.random.key(1), (8, 4))}
    if method == "simclr":
        params, update_slow = online, None
        loss_fn, optimizer = simclr_loss(linear, nuisance, temperature=0.5), optax.adam(0.02)
    else:
        params, update_slow = init_byol(online, {"p": jnp.eye(4)}), move_target(0.95)
        loss_fn = byol_loss(linear, predict, nuisance)
        optimizer = byol_optimizer(optax.adam(0.02))
    step = train_step(
        gradients(loss_fn), optimizer, lambda key, data: data, update_slow=update_slow
    )
    state = init_state(params, optimizer, KEY)
    for _ in range(150):
        state, metrics = step(state, images)
    trained = state.params.online if isinstance(state.params, BYOLParams) else state.params
    squares = np.square(trained["w"]).sum(1)
    assert squares[:2].sum() / squares.sum() > 0.9
    assert metrics["spread"] > 0.5


def test_what_can_not_be_done_is_refused(ill_typed):
    params, images = example(dtype=np.float32)
    with pytest.raises(UserError, match=r"32 images have embeddings of shape \(32, 2, 3, 1\)"):
        simclr_loss(lambda p, x: x, noise, temperature=0.5)(params, images, KEY)
    with pytest.raises(UserError, match=r"decay is 1.5; give 0 to 1"):
        move_target(1.5)
