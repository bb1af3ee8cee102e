"""CPC on images: patches, the loss against loops, and what may be seen."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.errors import UserError
from metagen_jax.gradients import gradients
from metagen_jax.parallel import data_parallel
from metagen_jax.self_supervised.cpc import cpc_loss, patch_grid

KEY = jax.random.key(0)
SIZES = {"patch_size": 4, "stride": 2, "num_steps": 2}


def embed(params, patches):
    return jnp.tanh(patches.reshape(len(patches), -1) @ params["embed"])


def contextualise(params, grid):
    return jnp.cumsum(grid, axis=1)


def predict(params, contexts):
    return jnp.einsum("nf,fkg->nkg", contexts, params["predict"])


def example(dtype=jnp.float32):
    images = jax.random.normal(KEY, (8, 10, 8, 1), dtype)
    embed_key, predict_key = jax.random.split(jax.random.key(1))
    return {
        "embed": 0.3 * jax.random.normal(embed_key, (16, 3), dtype),
        "predict": jax.random.normal(predict_key, (3, 2, 3), dtype),
    }, images


def test_patches_overlap_as_a_grid():
    _, images = example()
    grid = patch_grid(images, patch_size=4, stride=2)
    assert grid.shape == (8, 4, 3, 4, 4, 1)
    np.testing.assert_array_equal(grid[5, 2, 1], images[5, 4:8, 2:6])
    with pytest.raises(UserError, match="patches of 9 pixels don't fit into images of 10x8"):
        patch_grid(images, patch_size=9, stride=2)


def test_the_loss_equals_a_loop_over_steps_contexts_and_candidates():
    params, images = example()
    grid = np.asarray(patch_grid(images, patch_size=4, stride=2)).reshape(8, 4, 3, 16)
    z = np.tanh(grid @ np.asarray(params["embed"]))
    contexts, steps = np.cumsum(z, 1), []
    for step in (1, 2):
        candidates = z[:, step:].reshape(-1, 3)
        losses = []
        for n, i, j in np.ndindex(8, 4 - step, 3):
            scores = candidates @ (contexts[n, i, j] @ np.asarray(params["predict"])[:, step - 1])
            own = z[n, i + step, j] @ (
                contexts[n, i, j] @ np.asarray(params["predict"])[:, step - 1]
            )
            losses.append(np.logaddexp.reduce(scores) - own)
        steps.append(np.mean(losses))
    loss, metrics = cpc_loss(embed, contextualise, predict, **SIZES)(params, images, KEY)
    np.testing.assert_allclose(loss, np.mean(steps), rtol=1e-4)
    np.testing.assert_allclose(metrics["last_step"], steps[1], rtol=1e-4)
    # Only the second step, by the predictions that were made for it.
    sizes = {**SIZES, "num_steps": 1, "first_step": 2}
    loss, _ = cpc_loss(embed, contextualise, lambda params, c: predict(params, c)[:, 1:], **sizes)(
        params, images, KEY
    )
    np.testing.assert_allclose(loss, steps[1], rtol=1e-4)


@pytest.mark.slow
def test_on_eight_devices_it_is_the_same_and_every_patch_is_changed_by_itself():
    def noise(key, patch):
        return patch + jax.random.normal(key, patch.shape, patch.dtype)

    with jax.enable_x64(True):
        params, images = example(jnp.float64)
        loss = functools.partial(cpc_loss, embed, contextualise, predict, **SIZES, augment=noise)
        expected = jax.jit(gradients(loss()))(params, images, KEY)
        many = data_parallel(
            gradients(loss(axis_name="tasks", block_size=4)), devices=jax.devices("cpu")[:8]
        )
        chex.assert_trees_all_close(many(params, images, KEY), expected, atol=1e-12)
        # Of one picture repeated no two patches are alike any more.
        same = jnp.zeros_like(images)
        seen = []
        cpc_loss(
            lambda p, x: seen.append(x) or embed(p, x),
            contextualise,
            predict,
            **SIZES,
            augment=noise,
        )(params, same, KEY)
        assert len(np.unique(np.asarray(seen[0]).reshape(96, -1), axis=0)) == 96


def test_what_can_not_be_done_is_refused(ill_typed):
    params, images = example()
    for changes in ({"num_steps": 4}, {"first_step": 3}, {"first_step": 0}):
        with pytest.raises(UserError, match=r"for 4 rows of patches; give .* at most 3"):
            cpc_loss(embed, contextualise, predict, **{**SIZES, **changes})(params, images, KEY)
    with pytest.raises(UserError, match="2 vectors like the embeddings"):
        cpc_loss(embed, contextualise, lambda p, x: x, **SIZES)(params, images, KEY)
