"""Every bijector: inverse, log-determinant, vmap over tasks; and what each is known for."""

import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.errors import UserError
from metagen_jax.generative.bijectors import (
    Bijector,
    activation_norm,
    chain,
    inverted,
    invertible_linear,
    logit,
    multi_scale,
    permutation,
    repeat,
    reverse,
    squeeze,
)
from metagen_jax.generative.couplings import (
    affine_transform,
    autoregressive,
    checkerboard,
    coupling,
    halves,
    spline_transform,
)
from metagen_jax.nets.made import MADE
from metagen_jax.nets.mlp import MLP
from metagen_jax.nets.residual_conv import ResidualConv

KEY = jax.random.key(0)
AFFINE, SPLINE = affine_transform(), spline_transform(num_bins=4)
mlp = functools.partial(MLP, (6,), activation=jnp.tanh)
conv = functools.partial(ResidualConv, 3, num_blocks=1)


def conv_net(num_outputs):
    return conv(num_outputs=num_outputs)


def made(transform, order):
    net = MADE((7,), num_params=transform.num_params, order=order, activation=jnp.tanh)
    return autoregressive(net, transform)


# With the shape of an example and, if it takes one, the length of a condition.
CASES: dict[str, tuple[Bijector, tuple, int | None]] = {
    "activation_norm": (activation_norm(), (4,), None),
    "activation_norm of an image": (activation_norm(), (2, 3, 2), None),
    "invertible_linear": (invertible_linear(), (4,), None),
    "invertible_linear of an image": (invertible_linear(), (2, 1, 3), None),
    "permutation": (permutation((2, 0, 3, 1)), (4,), None),
    "reverse": (reverse(), (4,), None),
    "squeeze": (squeeze(), (4, 2, 1), None),
    "logit": (logit(0.05), (4,), None),
    "coupling": (coupling(mlp, AFFINE, partition=halves("first")), (5,), 2),
    "spline coupling": (coupling(mlp, SPLINE, partition=halves("second")), (5,), None),
    "channel coupling": (coupling(conv_net, AFFINE, partition=halves("second")), (2, 2, 3), 2),
    "checkerboard": (coupling(conv_net, AFFINE, partition=checkerboard("odd")), (3, 2, 1), None),
    "spline checkerboard": (
        coupling(conv_net, SPLINE, partition=checkerboard("even")),
        (2, 2, 2),
        None,
    ),
    "autoregressive": (made(AFFINE, "natural"), (4,), None),
    "autoregressive spline": (made(SPLINE, 3), (4,), 2),
    "inverse autoregressive": (inverted(made(AFFINE, "reversed")), (4,), None),
    "repeat": (repeat(chain(activation_norm(), invertible_linear()), 3), (3,), None),
    "multi_scale": (
        multi_scale(chain(squeeze(), activation_norm()), squeeze(), activation_norm()),
        (4, 4, 1),
        None,
    ),
}


def batch_of(name, num=16):
    _, shape, num_condition = CASES[name]
    rng = np.random.default_rng(0)
    draw = rng.uniform if name == "logit" else rng.normal
    condition = None if num_condition is None else rng.normal(size=(num, num_condition))
    return jax.tree.map(jnp.asarray, (draw(size=(num, *shape)), condition))


@functools.cache
def params_of(name):
    """As `init` gives them, moved by a little, so that no layer is at zero."""
    bijector = CASES[name][0]
    params = jax.jit(bijector.init)(KEY, *batch_of(name))
    rng = np.random.default_rng(1)

    def move(path, p):
        fixed = any(word in str(path) for word in ("sign", "order"))
        return np.asarray(p + (0 if fixed else 0.15 * rng.normal(size=p.shape)), np.float64)

    return jax.tree_util.tree_map_with_path(move, params)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def flat(tree):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("name", CASES)
def test_inverse_inverts_and_log_determinants_are_those_of_the_jacobian(float64, name):
    bijector = CASES[name][0]
    params, (batch, conditions) = params_of(name), batch_of(name)
    x, condition = jax.tree.map(lambda a: a[3], (batch, conditions))

    @jax.jit
    def there_and_back(params, x, condition):
        z, log_det = bijector.forward(params, x, condition)
        back, log_det_back = bijector.inverse(params, z, condition)
        jacobian = jax.jacfwd(lambda x: flat(bijector.forward(params, x, condition)[0]))(x)
        parts, treedef = jax.tree.flatten(z)
        ends = np.cumsum([part.size for part in parts])[:-1]

        def inverse(numbers):
            pieces = jnp.split(numbers, ends)
            pieces = [p.reshape(like.shape) for p, like in zip(pieces, parts, strict=True)]
            return bijector.inverse(params, jax.tree.unflatten(treedef, pieces), condition)[0]

        return log_det, back, log_det_back, jacobian, jax.jacrev(inverse)(flat(z))

    log_det, back, log_det_back, forward, inverse = there_and_back(params, x, condition)
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-9)
    np.testing.assert_allclose(log_det_back, -log_det, atol=1e-9)
    assert log_det.shape == log_det_back.shape == ()
    for jacobian, value in ((forward, log_det), (inverse, log_det_back)):
        expected = np.linalg.slogdet(np.asarray(jacobian).reshape(x.size, x.size))[1]
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-9)


# The others change no digit, or are the same on a vector.
@pytest.mark.parametrize(
    "name", [name for name in CASES if not re.search("image|^perm|^reverse|^squeeze", name)]
)
def test_inverse_inverts_in_float32_for_a_vmapped_batch(name):
    bijector = CASES[name][0]
    with jax.enable_x64(True):
        params = params_of(name)
    params, batch = jax.tree.map(np.float32, (params, batch_of(name)))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    def there_and_back(params, x, condition):
        z, log_det = bijector.forward(params, x, condition)
        back, log_det_back = bijector.inverse(params, z, condition)
        return back, log_det + log_det_back

    back, zero = there_and_back(params, *batch)
    assert back.dtype == zero.dtype == jnp.float32
    np.testing.assert_allclose(back, batch[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(zero, 0, atol=1e-3)


@pytest.mark.parametrize("name", ["autoregressive", "autoregressive spline"])
@pytest.mark.slow
def test_autoregressive_jacobians_are_triangular_in_the_order_of_the_net(float64, name):
    bijector = CASES[name][0]
    params, (batch, conditions) = params_of(name), batch_of(name)
    condition = None if conditions is None else conditions[0]
    jacobian = jax.jacobian(lambda x: bijector.forward(params, x, condition)[0])(batch[0])
    ranks = np.arange(4) if name == "autoregressive" else MADE((), order=3).ranks(4)[0]
    np.testing.assert_array_equal(np.asarray(jacobian) != 0, ranks[:, None] >= ranks)


def test_activation_norm_starts_with_mean_0_and_variance_1_and_keeps_constant_channels():
    images = np.random.default_rng(0).normal(size=(50, 4, 3, 2)) * [3, 0.01] + [100, -1]
    for batch in (np.float32(images), np.float32(images[:, 0, 0])):
        params = activation_norm().init(KEY, jnp.asarray(batch))
        z = jax.vmap(activation_norm().forward, (None, 0))(params, batch)[0]
        axes = tuple(range(batch.ndim - 1))
        np.testing.assert_allclose(z.mean(axes), 0, atol=1e-3)
        np.testing.assert_allclose(z.var(axes), 1, rtol=1e-3)
    constant = activation_norm().init(KEY, jnp.full((5, 2), 7.0))
    chex.assert_trees_all_equal(constant, {"shift": jnp.full(2, 7.0), "log_scale": jnp.zeros(2)})


@pytest.mark.slow
def test_each_of_a_chain_and_of_a_scan_starts_on_what_those_before_it_give():
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(40, 3)) * [9, 1, 0.1], jnp.float32)
    layers = [activation_norm(), invertible_linear(), activation_norm()]
    params = jax.jit(chain(*layers).init)(KEY, batch)
    assert list(params) == ["layer0", "layer1", "layer2"]
    step = chain(layers[0], layers[1])
    for flow in (chain(*layers), chain(repeat(step, 3), activation_norm())):
        params = jax.jit(flow.init)(KEY, batch)
        z, _ = jax.vmap(flow.forward, (None, 0))(params, batch)
        np.testing.assert_allclose(z.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(z.std(0), 1, rtol=1e-4)


@pytest.mark.slow
def test_a_scan_equals_a_chain_with_the_same_parameters(float64):
    step = chain(activation_norm(), CASES["coupling"][0])
    batch = batch_of("coupling")
    params = jax.jit(repeat(step, 3).init)(KEY, *batch)
    unrolled = {f"layer{i}": jax.tree.map(lambda p, i=i: p[i], params) for i in range(3)}
    x, condition = jax.tree.map(lambda a: a[0], batch)
    for direction in (1, 2):
        actual = repeat(step, 3)[direction](params, x, condition)
        expected = chain(step, step, step)[direction](unrolled, x, condition)
        chex.assert_trees_all_close(actual, expected, rtol=1e-12)
    assert np.abs(np.diff(params["layer1"]["params"]["hidden0"]["kernel"], axis=0)).min() > 0


@pytest.mark.slow
def test_invertible_linear_starts_as_a_rotation_and_keeps_its_permutation_and_signs(float64):
    bijector = invertible_linear()
    params = bijector.init(KEY, jnp.zeros((1, 6)))
    matrix = jax.jacobian(lambda x: bijector.forward(params, x)[0])(jnp.zeros(6))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(params["log_scale"].sum(), 0, atol=1e-12)
    assert sorted(params["order"]) == list(range(1, 7))
    x = jnp.arange(6.0)
    grads = jax.grad(lambda p: jnp.sum(bijector.forward(p, x)[0] ** 3))(params)
    assert not grads["order"].any()
    assert not grads["sign"].any()
    # Weight decay and averages make all leaves smaller; the matrix must stay the same.
    decayed = {**params, "order": 0.1 * params["order"], "sign": 0.1 * params["sign"]}
    chex.assert_trees_all_equal(bijector.forward(decayed, x), bijector.forward(params, x))


def test_squeeze_and_permutation_by_hand():
    image = jnp.arange(8.0).reshape(2, 4, 1)
    z, _ = squeeze().forward({}, image)
    np.testing.assert_array_equal(z, [[[0, 1, 4, 5], [2, 3, 6, 7]]])
    z, _ = permutation((2, 0, 1)).forward({}, jnp.array([5.0, 6.0, 7.0]))
    np.testing.assert_array_equal(z, [7, 5, 6])


def test_multi_scale_gives_half_of_the_channels_at_each_level_but_the_last():
    flow = multi_scale(squeeze(), squeeze(), reverse())
    image = jnp.arange(64.0).reshape(8, 8, 1)
    z, _ = flow.forward(flow.init(KEY, image[None]), image)
    assert [part.shape for part in z] == [(4, 4, 2), (2, 2, 4), (2, 2, 4)]
    np.testing.assert_array_equal(z[0][0, 0], [8, 9])


@pytest.mark.parametrize("partition", [checkerboard("even"), checkerboard("odd")])
def test_a_checkerboard_keeps_every_other_pixel_and_all_else_depends_on_them(partition):
    bijector = coupling(conv_net, AFFINE, partition=partition)
    x = jnp.ones((3, 3, 1))
    params = jax.tree.map(lambda p: p + 0.1, bijector.init(KEY, x[None]))
    z, _ = bijector.forward(params, x)
    kept = np.asarray(partition.split(x)[0]) == 1
    assert (
        list(np.indices((3, 3)).sum(0)[kept[..., 0]] % 2) == [int(not kept[0, 0, 0])] * kept.sum()
    )
    assert (np.asarray(z)[kept] == 1).all()
    assert (np.asarray(z)[~kept] != 1).all()


def test_log_scales_are_bounded():
    transform = affine_transform(max_log_scale=2.0)
    raw = jnp.array([-1e4, -1.0, 0.0, 1.0, 1e4])
    z, log_slope = transform.forward(jnp.full(5, 3.0), jnp.stack([jnp.ones(5), raw]))
    np.testing.assert_allclose(log_slope, -2 * np.tanh(np.asarray(raw) / 2), rtol=1e-6)
    np.testing.assert_allclose(z, 2 * np.exp(log_slope), rtol=1e-6)


@pytest.mark.usefixtures("ill_typed")
def test_says_what_is_needed():
    vector, image = jnp.zeros((2, 1)), jnp.zeros((2, 3, 4, 1))
    net = MADE((3,), num_params=3)
    for call, message in (
        (chain, "there are no bijectors"),
        (multi_scale, "there are no levels"),
        (lambda: repeat(reverse(), 0), "num_repeats is 0; give a positive"),
        (lambda: permutation((0, 2)), r"order is \(0, 2\); give each of 0..1 once"),
        (lambda: squeeze().forward({}, image[0]), "image of 3x4 can't be squeezed"),
        (lambda: multi_scale(reverse(), reverse()).init(KEY, image), "single channel can't be"),
        (lambda: halves("third"), "keep is 'third'; give \"first\" or"),
        (lambda: checkerboard("black"), "keep is 'black'; give \"even\" or"),
        (lambda: affine_transform(max_log_scale=0), "max_log_scale is 0; give a positive"),
        (lambda: spline_transform(num_bins=0), "num_bins is 0; give a positive"),
        (lambda: CASES["coupling"][0].init(KEY, vector), r"shape \(1,\) can't be parted"),
        (lambda: autoregressive(net, AFFINE), "net has 3 outputs an input and num_masks 1; give"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_all_pairs_of_halves_cover_an_odd_vector():
    x = jnp.arange(5.0)
    for keep, partner in itertools.permutations(("first", "second")):
        kept, changed = halves(keep).split(x)
        assert len(kept) + len(changed) == 5
        np.testing.assert_array_equal(halves(keep).merge(kept, changed), x)
        np.testing.assert_array_equal(halves(partner).split(x)[0], changed)
