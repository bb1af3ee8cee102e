"""The residual net: its published size, its shapes, what its blocks add."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from metagen_jax.errors import UserError
from metagen_jax.nets.resnet import ResNet

KEY = jax.random.key(0)


def test_resnet_18_for_cifar_has_as_many_parameters_as_published():
    net = ResNet(10, num_filters=(64, 128, 256, 512), blocks_per_stage=2, norm="batch")
    params = jax.eval_shape(net.init, KEY, jnp.zeros((1, 32, 32, 3)))
    assert sum(x.size for x in jax.tree.leaves(params)) == 11_173_962


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1), (9, 7, 2)])
def test_features_are_means_over_positions(shape):
    images = jnp.zeros((2, *shape))
    for num_outputs, width in ((None, 32), (5, 5)):
        net = ResNet(num_outputs, num_filters=(8, 16, 32))
        outputs, _ = jax.eval_shape(net.init_with_output, KEY, images)
        assert outputs.shape == (2, width)
    net = ResNet(None, num_filters=(8, 16, 32), pooled=False)
    outputs, _ = jax.eval_shape(net.init_with_output, KEY, images)
    assert outputs.shape == (2, -(-shape[0] // 4), -(-shape[1] // 4), 32)


def test_blocks_whose_last_norm_is_zero_pass_on_what_comes_in():
    net = ResNet(None, num_filters=(8,), blocks_per_stage=2)
    images = jax.random.normal(KEY, (2, 6, 6, 3))
    params = net.init(KEY, images)["params"]
    for block in ("stage0_block0", "stage0_block1"):
        params[f"{block}_conv1_norm"] = jax.tree.map(jnp.zeros_like, params[f"{block}_conv1_norm"])
    stem = nn.Conv(8, (3, 3), use_bias=False).apply({"params": params["stem"]}, images)
    stem = nn.GroupNorm(8).apply({"params": params["stem_norm"]}, stem)
    expected = nn.relu(stem).mean((1, 2))
    np.testing.assert_allclose(net.apply({"params": params}, images), expected, atol=1e-5)


@pytest.mark.slow
def test_each_image_is_by_itself_unless_the_batch_normalises():
    images = jax.random.normal(KEY, (3, 8, 8, 1))
    for norm in ("group", "batch"):
        net = ResNet(None, num_filters=(8, 16), norm=norm)
        params = net.init(KEY, images)
        apply = jax.jit(net.apply)
        difference = jnp.abs(apply(params, images)[:1] - apply(params, images[:1])).max()
        assert (difference < 1e-5) == (norm == "group")


def test_what_can_not_be_built_is_refused(ill_typed):
    images = jnp.zeros((1, 8, 8, 1))
    with pytest.raises(UserError, match="12 filters can't be split"):
        ResNet(None, num_filters=(8, 12)).init(KEY, images)
    with pytest.raises(UserError, match="norm is 'instance'"):
        ResNet(None, norm="instance").init(KEY, images)
    with pytest.raises(UserError, match="at least one stage"):
        ResNet(None, num_filters=()).init(KEY, images)
