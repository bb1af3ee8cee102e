"""Velocity nets: what they see, and the U-Net under vmap over examples and over tasks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.errors import UserError
from metagen_jax.generative.flow_matching import flow_matching_loss
from metagen_jax.gradients import gradients
from metagen_jax.nets.velocity import VelocityMLP, VelocityUNet, time_embedding

KEY = jax.random.key(0)
UNET = VelocityUNet(num_filters=8, num_time_features=8)
IMAGE = (6, 5, 2)


def perturbed(variables, seed=1):
    """Away from the start, where the last layer is zero and hides the others."""
    leaves, treedef = jax.tree.flatten(variables)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([x + 0.3 * rng.normal(size=x.shape) for x in leaves])


def test_time_embedding_by_hand():
    """Frequencies of 1, 10 and 100."""
    angles = 0.3 * np.array([1, 10, 100])
    expected = np.concatenate([np.sin(angles), np.cos(angles)])
    actual = time_embedding(jnp.float32(0.3), num_features=6)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_mlp_equals_numpy_and_starts_at_zero():
    net = VelocityMLP((6,), num_time_features=4, activation=jnp.tanh)
    x, condition = jnp.array([0.5, -1.0]), jnp.array([2.0])
    variables = net.init(KEY, x, 0.3, condition)
    np.testing.assert_array_equal(net.apply(variables, x, 0.3, condition), 0)
    variables = jax.tree.map(np.float64, perturbed(variables))
    angles = 0.3 * np.array([1, 100])
    inputs = np.concatenate([x, np.sin(angles), np.cos(angles), condition])
    body, head = variables["params"]["body"]["hidden0"], variables["params"]["head"]
    hidden = np.tanh(inputs @ body["kernel"] + body["bias"])
    actual = net.apply(jax.tree.map(jnp.float32, variables), x, 0.3, condition)
    np.testing.assert_allclose(actual, hidden @ head["kernel"] + head["bias"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_unet_starts_at_zero_and_sees_all_of_the_image_the_time_and_the_condition():
    image, condition = jax.random.normal(KEY, IMAGE), jnp.array([1.0, -2.0])
    variables = jax.jit(UNET.init)(KEY, image, 0.5, condition)
    apply = jax.jit(UNET.apply)
    np.testing.assert_array_equal(apply(variables, image, 0.5, condition), 0)
    variables = perturbed(variables)
    output = apply(variables, image, 0.5, condition)
    assert output.shape == IMAGE
    for other in (
        (image.at[0, 0, 1].add(1.0), 0.5, condition),
        (image, 0.6, condition),
        (image, 0.5, condition + jnp.array([0.0, 1.0])),
    ):
        assert jnp.abs(apply(variables, *other) - output)[-1, -1, 0] > 1e-5


def test_unet_of_mnist_and_cifar_keep_their_shapes():
    for shape in ((28, 28, 1), (32, 32, 3)):
        output, variables = jax.eval_shape(
            lambda: VelocityUNet().init_with_output(KEY, jnp.zeros(shape), 0.5)  # noqa: B023
        )
        assert output.shape == shape
        assert len(jax.tree.leaves(variables)) > 50


@pytest.mark.slow
def test_loss_over_tasks_of_parameters_equals_a_loop():
    """Convolutions under vmap over examples and over tasks."""
    grad_fn = gradients(flow_matching_loss(UNET.apply))
    variables = jax.jit(UNET.init)(KEY, jnp.zeros(IMAGE), 0.5)
    tasks = [
        (perturbed(variables, seed), (jax.random.normal(jax.random.key(seed), (2, *IMAGE)), None))
        for seed in range(2)
    ]
    keys = jax.random.split(KEY, 2)
    together = jax.jit(jax.vmap(grad_fn))(*jax.tree.map(lambda *x: jnp.stack(x), *tasks), keys)
    one = jax.jit(grad_fn)
    alone = [one(*task, key) for task, key in zip(tasks, keys, strict=True)]
    chex.assert_trees_all_close(
        together, jax.tree.map(lambda *x: jnp.stack(x), *alone), rtol=1e-3, atol=1e-3
    )


def test_says_what_is_needed():
    with pytest.raises(UserError, match="num_features is 5; give an even number of 4 or more"):
        time_embedding(0.5, num_features=5)
    with pytest.raises(UserError, match="num_filters is 12; give a multiple of 8"):
        VelocityUNet(num_filters=12).init(KEY, jnp.zeros(IMAGE), 0.5)
