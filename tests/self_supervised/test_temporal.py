"""Triples of frames, the arrow of time, next frames and futures: by counts, loops and hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from references import finite_differences

from metagen_jax.errors import UserError
from metagen_jax.gradients import gradients
from metagen_jax.parallel import data_parallel
from metagen_jax.self_supervised.temporal import (
    arrow_of_time_loss,
    future_prediction_loss,
    next_frame_loss,
    order_verification_loss,
    roll_out,
    sample_frame_triple,
)

KEY = jax.random.key(0)


def test_triples_are_in_order_half_the_time_and_every_five_is_as_likely():
    """Of six frames there are six fives; chi-squared at most five deviations above its mean."""
    sequence = jnp.arange(6)
    triples = jax.jit(jax.vmap(sample_frame_triple, (0, None)))(
        jax.random.split(jax.random.key(1), 3000), sequence
    )
    first, second, third = np.asarray(triples.frames).T
    in_order = np.asarray(triples.in_order) == 1
    np.testing.assert_array_equal(in_order, (first < second) & (second < third))
    outside = second[~in_order]
    assert ((outside < first[~in_order]) | (outside > third[~in_order])).all()
    for share, expected in ((in_order, 1 / 2), (second < first, 1 / 4), (second > third, 1 / 4)):
        assert abs(share.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / 3000)
    fives = [[i for i in range(6) if i != out] for out in range(6)]
    for kind, place in ((in_order, 2), (second < first, 0), (second > third, 4)):
        counts = {}
        for five in fives:
            triple = (five[1], five[place], five[3])
            counts[triple] = counts.get(triple, 0) + 1
        seen = list(zip(first[kind], second[kind], third[kind], strict=True))
        total, statistic = len(seen), 0.0
        for triple, count in counts.items():
            statistic += (seen.count(triple) - total * count / 6) ** 2 / (total * count / 6)
        assert sum(seen.count(triple) for triple in counts) == total
        freedom = len(counts) - 1
        assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def test_the_outer_frames_tell_nothing_of_the_order():
    triples = jax.vmap(sample_frame_triple, (0, None))(jax.random.split(KEY, 3000), jnp.arange(9.0))
    outer, in_order = np.asarray(triples.frames)[:, ::2], np.asarray(triples.in_order)
    for values in (outer[:, 0], outer[:, 1]):
        a, b = values[in_order == 1], values[in_order == 0]
        assert abs(a.mean() - b.mean()) < 4 * np.sqrt(values.var() * 4 / 3000)


@pytest.mark.slow
def test_who_knows_the_time_of_a_frame_knows_the_order():
    sequences = jnp.broadcast_to(jnp.arange(8.0)[:, None], (64, 8, 1))

    def classify(params, z):
        between = (z[:, 1] - z[:, 0]) * (z[:, 2] - z[:, 1])
        return jnp.stack([jnp.zeros(len(z)), params * between], 1)

    loss_fn = order_verification_loss(lambda p, x: x, classify)
    loss, metrics = loss_fn(100.0, sequences, KEY)
    assert loss < 1e-3
    assert metrics["accuracy"] == 1
    np.testing.assert_allclose(loss_fn(0.0, sequences, KEY)[0], np.log(2), rtol=1e-6)


def test_who_knows_what_rises_knows_the_arrow_of_time():
    rising = jnp.cumsum(jax.random.uniform(KEY, (64, 6)), axis=1)

    def classify(params, x):
        slope = x[:, -1] - x[:, 0]
        return jnp.stack([params * slope, -params * slope], 1)

    loss, metrics = arrow_of_time_loss(classify)(100.0, rising, KEY)
    assert loss < 1e-3
    assert metrics["accuracy"] == 1
    # Of what is the same both ways nothing can be told.
    same = jnp.concatenate([rising, rising[:, ::-1]], axis=1)
    seen = []
    arrow_of_time_loss(lambda p, x: seen.append(x) or classify(p, x))(1.0, same, KEY)
    np.testing.assert_array_equal(seen[0], same)


def test_half_of_all_sequences_are_turned_round_each_as_a_whole():
    sequences = jnp.arange(5.0) + 10 * jnp.arange(1000.0)[:, None]
    seen = []
    arrow_of_time_loss(lambda p, x: seen.append(x) or jnp.zeros((1000, 2)))((), sequences, KEY)
    backward = np.asarray((seen[0] == sequences[:, ::-1]).all(1))
    assert ((seen[0] == sequences).all(1) != backward).all()
    assert abs(backward.mean() - 0.5) < 4 * np.sqrt(0.25 / 1000)


def predict(params, frames):
    """From a frame and a little of the one before."""
    before = jnp.pad(frames, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    return jnp.tanh(frames @ params["now"] + before @ params["before"])


def example(dtype=jnp.float32):
    keys = jax.random.split(KEY, 3)
    params = {
        name: jax.random.normal(key, (3, 3), dtype)
        for name, key in zip(("now", "before"), keys, strict=False)
    }
    return params, jax.random.normal(keys[2], (8, 7, 3), dtype)


def test_errors_of_next_frames_and_futures_equal_loops():
    params, sequences = example()
    now, before = (np.asarray(params[name], np.float64) for name in ("now", "before"))
    x = np.asarray(sequences, np.float64)
    errors = []
    for t in range(6):
        last = x[:, t - 1] if t else np.zeros((8, 3))
        errors.append((np.tanh(x[:, t] @ now + last @ before) - x[:, t + 1]) ** 2)
    loss, _ = jax.jit(next_frame_loss(predict))(params, sequences, KEY)
    np.testing.assert_allclose(loss, np.mean(errors), rtol=1e-5)

    frames = list(np.moveaxis(x[:, :4], 1, 0))
    for _ in range(3):
        frames.append(np.tanh(frames[-1] @ now + frames[-2] @ before))
    following = np.stack(frames[4:], 1)
    rolled = roll_out(predict, params, sequences[:, :4], num_frames=3)
    np.testing.assert_allclose(rolled, following, rtol=1e-4, atol=1e-5)
    loss, metrics = jax.jit(future_prediction_loss(predict, num_seen=4))(params, sequences, KEY)
    np.testing.assert_allclose(loss, np.mean((following - x[:, 4:]) ** 2), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["last_frame"], np.mean((following - x[:, 4:])[:, -1] ** 2), rtol=1e-5
    )


@pytest.mark.slow
def test_gradients_pass_through_all_predictions():
    with jax.enable_x64(True):
        params, sequences = example(jnp.float64)
        for loss_fn in (next_frame_loss(predict), future_prediction_loss(predict, num_seen=2)):
            value = jax.jit(lambda p, f=loss_fn: f(p, sequences, KEY)[0])
            chex.assert_trees_all_close(
                jax.grad(value)(params), finite_differences(value, params), rtol=1e-6, atol=1e-9
            )


def linear(params, x):
    return x.reshape(len(x), -1) @ params


@pytest.mark.slow
def test_eight_devices_draw_what_one_does():
    with jax.enable_x64(True):
        _, sequences = example(jnp.float64)
        for loss_fn, size in (
            (order_verification_loss(lambda p, x: x, linear), 9),
            (arrow_of_time_loss(linear), 21),
        ):
            params = jax.random.normal(KEY, (size, 2), jnp.float64)
            many = data_parallel(gradients(loss_fn), devices=jax.devices("cpu")[:8])
            expected = jax.jit(gradients(loss_fn))(params, sequences, KEY)
            chex.assert_trees_all_close(many(params, sequences, KEY), expected, atol=1e-12)


def test_a_linear_net_learns_a_rotation_where_copying_is_far_off():
    """Each frame is the last one turned: the error goes to 0, that of copying stays."""
    angle = 0.7
    turn = jnp.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    first = jax.random.normal(KEY, (32, 2))
    sequences = jnp.stack([first @ jnp.linalg.matrix_power(turn, t) for t in range(6)], 1)
    loss_fn = next_frame_loss(lambda p, x: x @ p)
    value_and_grad = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, sequences, KEY)[0]))
    params, optimizer = jnp.eye(2), optax.sgd(0.3)
    state = optimizer.init(params)
    copying = value_and_grad(params)[0]
    for _ in range(60):
        updates, state = optimizer.update(value_and_grad(params)[1], state)
        params = optax.apply_updates(params, updates)
    assert copying > 0.2
    assert value_and_grad(params)[0] < 1e-4
    rolled = roll_out(lambda p, x: x @ p, params, sequences[:, :1], num_frames=5)
    np.testing.assert_allclose(rolled, sequences[:, 1:], atol=0.05)


@pytest.mark.usefixtures("ill_typed")
def test_what_can_not_be_done_is_refused():
    params, sequences = example()
    with pytest.raises(UserError, match="the sequence has 4 frames; give 5 or more"):
        sample_frame_triple(KEY, jnp.zeros(4))
    with pytest.raises(UserError, match="7 frames are seen of sequences of shape"):
        future_prediction_loss(predict, num_seen=7)(params, sequences, KEY)
    with pytest.raises(UserError, match="1 frames are seen"):
        next_frame_loss(predict)(params, sequences[:, :1], KEY)
    with pytest.raises(UserError, match=r"predictions have shape \(8, 7\) and frames"):
        roll_out(lambda p, x: x[..., 0], params, sequences, num_frames=2)
