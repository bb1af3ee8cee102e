"""CPC on sequences: the loss against loops, its bound, lengths, devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import finite_differences

from metagen_jax.counted import weighted_by_count
from metagen_jax.errors import UserError
from metagen_jax.gradients import gradients, mean_over_tasks
from metagen_jax.parallel import data_parallel
from metagen_jax.self_supervised.contrastive import info_nce
from metagen_jax.self_supervised.cpc import cpc_sequence_loss

KEY = jax.random.key(0)
LENGTHS = np.array([7, 0, 3, 5, 1, 7, 6, 2])
NEGATIVES = ("batch", "sequence")


def embed(params, sequences):
    return jnp.tanh(sequences @ params["embed"])


def contextualise(params, frames):
    return jnp.cumsum(frames, axis=1)


def predict(params, contexts):
    return jnp.einsum("nf,fkg->nkg", contexts, params["predict"])


def example(dtype=jnp.float32):
    sequences = jax.random.normal(KEY, (8, 7, 2), dtype)
    embed_key, predict_key = jax.random.split(jax.random.key(1))
    return {
        "embed": jax.random.normal(embed_key, (2, 3), dtype),
        "predict": jax.random.normal(predict_key, (3, 3, 3), dtype),
    }, (sequences, jnp.asarray(LENGTHS))


loss_of = functools.partial(cpc_sequence_loss, embed, contextualise, predict, num_steps=3)


def by_loops(params, batch, negatives, first_step):
    """The loss and the mean of the logarithms of how many candidates there are."""
    kernel = np.asarray(params["predict"], np.float64)
    sequences, lengths = (np.asarray(x) for x in batch)
    z = [
        np.tanh(x[:n] @ np.asarray(params["embed"]))
        for x, n in zip(sequences, lengths, strict=True)
    ]
    losses, logs = [], []
    for k in range(first_step, first_step + 3):
        for own in z:
            candidates = own[k:] if negatives == "sequence" else np.concatenate([x[k:] for x in z])
            for t in range(len(own) - k):
                query = own[: t + 1].sum(0) @ kernel[:, k - first_step]
                losses.append(np.logaddexp.reduce(candidates @ query) - own[t + k] @ query)
                logs.append(np.log(len(candidates)))
    return np.mean(losses), np.mean(logs)


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize(("block_size", "first_step"), [(None, 1), (4, 1), (None, 3)])
def test_the_loss_equals_a_loop_over_steps_frames_and_candidates(negatives, block_size, first_step):
    with jax.enable_x64(True):
        params, batch = example(jnp.float64)
        loss_fn = loss_of(negatives=negatives, block_size=block_size, first_step=first_step)
        loss, metrics = jax.jit(loss_fn)(params, batch, KEY)
        expected, log_num = by_loops(params, batch, negatives, first_step)
        np.testing.assert_allclose(loss, expected, rtol=1e-10)
        np.testing.assert_allclose(metrics["information"], log_num - expected, rtol=1e-6)


def test_gradients_are_those_of_finite_differences():
    with jax.enable_x64(True):
        params, batch = example(jnp.float64)
        loss_fn = jax.jit(lambda p: loss_of()(p, batch, KEY)[0])
        chex.assert_trees_all_close(
            jax.grad(loss_fn)(params), finite_differences(loss_fn, params), rtol=1e-7, atol=1e-9
        )


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_what_lies_behind_a_length_counts_nowhere(negatives):
    params, (sequences, lengths) = example()
    loss_fn = jax.jit(gradients(loss_of(negatives=negatives)))
    behind = jnp.arange(7)[:, None] >= lengths[:, None, None]
    expected = loss_fn(params, (sequences, lengths), KEY)
    other = loss_fn(params, (jnp.where(behind, 1e3, sequences), lengths), KEY)
    chex.assert_trees_all_equal(other, expected)


def test_frames_from_one_sequence_are_those_of_each_sequence_alone():
    """Weighted by how many frames each predicts."""
    params, (sequences, lengths) = example()
    loss_fn = jax.jit(lambda *batch: loss_of(negatives="sequence")(params, batch, KEY)[0])
    whole = loss_fn(sequences, lengths)
    weights = sum(np.maximum(LENGTHS - k, 0) for k in (1, 2, 3))
    alone = [loss_fn(sequences[i : i + 1], lengths[i : i + 1]) for i in range(8)]
    np.testing.assert_allclose(whole, np.dot(weights, alone) / weights.sum(), rtol=1e-5)


def test_in_chunks_of_sequences_that_are_weighted_by_count_it_is_the_same():
    with jax.enable_x64(True):
        params, batch = example(jnp.float64)
        grad_fn = gradients(loss_of(negatives="sequence"))
        expected = jax.jit(grad_fn)(params, batch, KEY)
        in_chunks = weighted_by_count(grad_fn, mean_over_tasks)
        fours = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), batch)
        direction, metrics = jax.jit(in_chunks)(params, fours, KEY)
        chex.assert_trees_all_close(direction, expected[0], rtol=1e-10)
        np.testing.assert_allclose(metrics["loss"], expected[1]["loss"], rtol=1e-12)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_the_information_of_frames_that_can_be_told_is_the_bound_and_of_others_none(negatives):
    """Each frame is a number in one-hot; a context that names the next one finds it."""
    sequences = jnp.broadcast_to(jnp.eye(7), (1, 7, 7)) if negatives == "sequence" else None
    if sequences is None:
        sequences = jnp.eye(56).reshape(8, 7, 56)
    size = sequences.shape[-1]
    following = jnp.eye(size, k=1)[:, None]

    def loss(scale):
        loss_fn = cpc_sequence_loss(
            lambda p, x: x,
            lambda p, z: z,
            lambda p, c: scale * jnp.einsum("nf,fkg->nkg", c, following),
            num_steps=1,
            negatives=negatives,
        )
        return loss_fn((), (sequences, jnp.full(len(sequences), 7)), KEY)

    log_num = np.log(6 if negatives == "sequence" else 48)
    found, metrics = loss(100.0)
    assert found < 1e-5
    np.testing.assert_allclose(metrics["information"], log_num, rtol=1e-5)
    np.testing.assert_allclose(loss(0.0)[0], log_num, rtol=1e-6)
    np.testing.assert_allclose(loss(0.0)[1]["information"], 0, atol=1e-6)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_sequences_without_predictions_give_zero_and_extremes_are_finite(negatives):
    params, (sequences, lengths) = example()
    loss_fn = jax.jit(gradients(loss_of(negatives=negatives)))
    direction, metrics = loss_fn(params, (sequences, jnp.ones_like(lengths)), KEY)
    assert metrics["loss"] == 0
    assert all((x == 0).all() for x in jax.tree.leaves(direction))
    large = jax.tree.map(lambda p: 1e4 * p, params)
    assert all(
        np.isfinite(x).all() for x in jax.tree.leaves(loss_fn(large, (sequences, lengths), KEY))
    )


@pytest.mark.slow
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_eight_devices_give_the_loss_of_one(negatives):
    """Each has one sequence, some without any prediction."""
    with jax.enable_x64(True):
        params, batch = example(jnp.float64)
        expected = jax.jit(gradients(loss_of(negatives=negatives)))(params, batch, KEY)
        grad_fn = gradients(loss_of(negatives=negatives, axis_name="tasks"))
        many = data_parallel(grad_fn, devices=jax.devices("cpu")[:8])(params, batch, KEY)
        assert many[1].pop("count") == expected[1].pop("count") / 8
        chex.assert_trees_all_close(many, expected, atol=1e-12)


@pytest.mark.slow
def test_candidates_that_are_none_leave_the_loss_of_the_others_as_it_is():
    q, c = jax.random.normal(KEY, (2, 5, 3))
    valid = np.array([True, False, True, True, False])
    losses = info_nce(q, c, valid=valid)
    np.testing.assert_allclose(losses[valid], info_nce(q[valid], c[valid]), rtol=1e-6)
    grads = jax.grad(lambda c: info_nce(q, c, valid=valid)[valid].sum())(c)
    assert (grads[~valid] == 0).all()


@pytest.mark.slow
def test_frames_are_counted_by_the_encoder():
    params, (sequences, lengths) = example()
    halved = loss_of(num_frames=lambda lengths: lengths // 2)(params, (sequences, lengths), KEY)
    expected = loss_of()(params, (sequences, lengths // 2), KEY)
    chex.assert_trees_all_equal(halved, expected)


@pytest.mark.usefixtures("ill_typed")
def test_what_can_not_be_done_is_refused():
    params, batch = example()
    with pytest.raises(UserError, match=r"num_steps is 7 and .* of shape \(8, 7, 3\)"):
        cpc_sequence_loss(embed, contextualise, predict, num_steps=7)(params, batch, KEY)
    with pytest.raises(UserError, match="num_steps is 3 and first_step 5"):
        loss_of(first_step=5)(params, batch, KEY)
    with pytest.raises(UserError, match="3 vectors like the frames"):
        cpc_sequence_loss(embed, contextualise, lambda p, x: x, num_steps=3)(params, batch, KEY)
    with pytest.raises(UserError, match="negatives is 'all'"):
        loss_of(negatives="all")
    with pytest.raises(UserError, match=r"valid has shape \(2,\) for 5 candidates"):
        info_nce(np.ones((5, 3)), np.ones((5, 3)), valid=np.ones(2, bool))
