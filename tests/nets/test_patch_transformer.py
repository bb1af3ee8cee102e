"""The patch transformer: what it sees, where it takes it to be, and a block in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from metagen_jax.errors import UserError
from metagen_jax.nets.patch_transformer import (
    PatchTransformer,
    TransformerBlock,
    from_patches,
    sine_positions,
    to_patches,
)

KEY = jax.random.key(0)
NET = PatchTransformer(
    (4, 6, 2), patch_size=2, width=8, depth=2, num_heads=2, decoder_width=4, decoder_depth=1
)
IMAGES = jax.random.normal(KEY, (3, 4, 6, 2))
SHOWN = jnp.array([[0, 3], [5, 1], [2, 4]])


@pytest.fixture(scope="module")
def params():
    return jax.jit(NET.init)(KEY, IMAGES, SHOWN)


def test_patches_are_squares_in_the_order_of_reading_and_come_together_again():
    patches = to_patches(IMAGES, 2)
    assert patches.shape == (3, 6, 8)
    np.testing.assert_array_equal(patches[1, 4], IMAGES[1, 2:4, 2:4].ravel())
    np.testing.assert_array_equal(from_patches(patches, (4, 6, 2)), IMAGES)
    with pytest.raises(UserError, match="patches of 4 pixels don't fill a picture of 4x6"):
        to_patches(IMAGES, 4)


def test_positions_by_hand():
    positions = sine_positions(2, 3, 8)
    row, column, slow = 1, 2, 10000**-0.5
    expected = [
        *(np.sin(row), np.sin(row * slow), np.cos(row), np.cos(row * slow)),
        *(np.sin(column), np.sin(column * slow), np.cos(column), np.cos(column * slow)),
    ]
    np.testing.assert_allclose(positions[5], expected, rtol=1e-6)
    with pytest.raises(UserError, match="multiple of 4"):
        sine_positions(2, 3, 6)


@pytest.mark.slow
def test_a_block_in_numpy():
    x = jax.random.normal(KEY, (1, 5, 4))
    block = TransformerBlock(num_heads=2, expansion=2)
    params = block.init(KEY, x)
    p = jax.tree.map(np.asarray, params["params"])

    def norm(x, p):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    y, total = norm(np.asarray(x[0]), p["attention_norm"]), np.asarray(x[0])
    for head in range(2):
        q, k, v = (
            y @ p["attention"][n]["kernel"][:, head] + p["attention"][n]["bias"][head]
            for n in ("query", "key", "value")
        )
        weights = scipy.special.softmax(q @ k.T / np.sqrt(2), axis=1)
        total = total + weights @ v @ p["attention"]["out"]["kernel"][head]
    total = total + p["attention"]["out"]["bias"]
    hidden = norm(total, p["dense_norm"]) @ p["dense0"]["kernel"] + p["dense0"]["bias"]
    hidden = np.asarray(jax.nn.gelu(jnp.asarray(hidden)))
    expected = total + hidden @ p["dense1"]["kernel"] + p["dense1"]["bias"]
    np.testing.assert_allclose(block.apply(params, x)[0], expected, atol=1e-5)


@pytest.mark.slow
def test_what_is_not_shown_changes_nothing_and_what_is_shown_everything(params):
    def drawn(images):
        return NET.apply(params, images, SHOWN)

    patches = drawn(IMAGES)
    assert patches.shape == (3, 6, 8)
    jacobian = jax.jit(jax.jacrev(lambda images: jnp.square(drawn(images)).sum((1, 2))))(IMAGES)
    for image in range(3):
        reached = np.abs(to_patches(jacobian[image], 2)).max(-1) > 0
        expected = np.zeros((3, 6), bool)
        expected[image, SHOWN[image]] = True
        np.testing.assert_array_equal(reached, expected)


@pytest.mark.slow
def test_the_order_of_what_is_shown_changes_nothing_but_its_place_does(params):
    apply = jax.jit(NET.apply)
    patches = apply(params, IMAGES, SHOWN)
    np.testing.assert_allclose(apply(params, IMAGES, SHOWN[:, ::-1]), patches, atol=1e-5)
    # The same patch at another place is drawn as another picture.
    same = jnp.ones((1, 4, 6, 2))
    drawn = [apply(params, same, jnp.array([shown])) for shown in ([0, 1], [0, 2])]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3


@pytest.mark.slow
def test_features_are_the_mean_token_of_all_patches(params):
    features = NET.apply(params, IMAGES, method="features")
    shown = jnp.tile(jnp.arange(6)[::-1], (3, 1))
    tokens = NET.apply(params, IMAGES, shown, method="encode")
    np.testing.assert_allclose(features, tokens.mean(1), atol=1e-5)
