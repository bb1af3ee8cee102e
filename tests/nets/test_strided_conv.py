"""The encoder of sounds: what a frame sees, how many there are, padding, values by loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pixel_models import random_params

from metagen_jax.errors import UserError
from metagen_jax.nets.strided_conv import StridedConv

NET = StridedConv(3, windows=(4, 3), strides=(3, 2))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def example(length=24):
    x = np.random.default_rng(0).normal(size=(2, length, 2))
    return random_params(NET, x), x


def test_frames_by_loops():
    params, x = example()
    p = jax.tree.map(np.asarray, params["params"])
    for i, (window, stride) in enumerate(((4, 3), (3, 2))):
        kernel, bias = p[f"conv{i}"]["kernel"][0], p[f"conv{i}"]["bias"]
        starts = range(0, x.shape[1] - window + 1, stride)
        x = np.stack(
            [np.einsum("ntc,tcf->nf", x[:, s : s + window], kernel) + bias for s in starts], 1
        )
        if i == 0:
            deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = (x - x.mean(-1, keepdims=True)) / deviation * p["norm0"]["scale"]
            x = np.maximum(x + p["norm0"]["bias"], 0)
    actual = jax.jit(NET.apply)(params, example()[1])
    np.testing.assert_allclose(actual, x, rtol=1e-7)
    np.testing.assert_allclose(NET.apply(params, example()[1][0]), x[0], rtol=1e-7)


@pytest.mark.slow
def test_a_frame_sees_its_window_and_nothing_else():
    assert (NET.stride, NET.window) == (6, 10)
    params, x = example()
    seen = jax.jacobian(lambda x: NET.apply(params, x).sum(-1))(jnp.asarray(x[0]))
    seen = np.abs(seen).max(-1) > 0
    expected = np.zeros((3, 24), bool)
    for frame in range(3):
        expected[frame, 6 * frame : 6 * frame + 10] = True
    np.testing.assert_array_equal(seen, expected)


def test_the_number_of_frames_is_that_of_the_sequence_without_padding():
    lengths = np.array([0, 9, 10, 15, 16, 24])
    assert NET.num_frames(lengths).tolist() == [0, 0, 1, 1, 2, 3]
    params, x = example()
    whole = NET.apply(params, np.where(np.arange(24)[:, None] < 17, x, 0))
    np.testing.assert_allclose(whole[:, :2], NET.apply(params, x[:, :17]), rtol=1e-12)


def test_published_sizes():
    net = StridedConv(8, windows=(10, 8, 4, 4, 4), strides=(5, 4, 2, 2, 2))
    assert (net.stride, net.window) == (160, 465)
    assert net.num_frames(np.array(20480)) == 126


@pytest.mark.usefixtures("ill_typed")
def test_says_what_is_needed():
    with pytest.raises(UserError, match="9 entries and a frame sees 10"):
        NET.init(jax.random.key(0), np.zeros((1, 9, 2)))
    with pytest.raises(UserError, match=r"strides \(3,\); give one of each"):
        StridedConv(3, windows=(4, 3), strides=(3,)).init(jax.random.key(0), np.zeros((1, 9, 2)))
