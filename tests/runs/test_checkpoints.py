"""Checkpoints: whole or not at all, bit for bit, or one line that says what is wrong."""

import random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagen_jax.errors import TrainingError, UserError
from metagen_jax.runs.checkpoints import (
    BEST,
    LATEST,
    load_params,
    place_like,
    restore_checkpoint,
    restore_run,
    save_checkpoint,
    save_run,
    saved_steps,
    to_host,
)

pytest.importorskip("orbax.checkpoint")

RECORD = {"best_step": None, "seconds": 0.1, "sums": {"loss": 1e-300}}


class State(NamedTuple):
    step: jax.Array
    params: dict
    other: object


def make_state(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "a b/c": jax.random.normal(keys[0], (4, 3)),
        "half": jax.random.normal(keys[1], (5,), jnp.bfloat16),
        "empty": jnp.zeros((0, 2)),
        "list": [jnp.arange(3), {"flag": jnp.array(True)}],
        "none": None,
    }
    other = (optax.adam(1e-3).init({"x": jnp.ones(2)}), keys[2], jnp.array(1 / 3))
    return State(jnp.int32(seed), params, other)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(to_host(one)), jax.tree.leaves(to_host(other)), strict=True):
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def test_any_tree_comes_back_bit_for_bit(tmp_path):
    state = make_state()
    save_checkpoint(tmp_path / "7", to_host(state), RECORD)
    restored, record = restore_checkpoint(tmp_path / "7", make_state(1))
    assert_same(restored, state)
    assert record == RECORD
    assert jnp.issubdtype(restored.other[1].dtype, jax.dtypes.prng_key)


def test_arrays_come_back_to_where_those_of_the_target_are():
    committed = jax.device_put(jnp.ones(3), jax.devices()[0])
    free = jnp.ones(3)
    placed = place_like([np.ones(3), np.ones(3)], [committed, free])
    assert [x.committed for x in placed] == [True, False]
    assert placed[0].sharding == committed.sharding


def test_host_copies_survive_donation():
    x = jnp.arange(4.0)
    host = to_host(x)
    jax.block_until_ready(jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(x))
    np.testing.assert_array_equal(host, np.arange(4.0))


def test_a_checkpoint_holds_no_pickle(tmp_path):
    save_checkpoint(tmp_path / "7", to_host(make_state()), RECORD)
    for path in tmp_path.rglob("*"):
        # Protocol 2 and later begin with PROTO, and all end with STOP.
        data = path.read_bytes() if path.is_file() else b""
        assert not (data[:1] == b"\x80" and data[-1:] == b"."), path


@pytest.mark.slow
def test_a_damaged_file_is_one_line_or_does_no_harm(tmp_path):
    state, numbers, messages = make_state(), random.Random(0), []
    save_checkpoint(tmp_path / "7", to_host(state), RECORD)
    for path in sorted(p for p in (tmp_path / "7").rglob("*") if p.is_file()):
        good = path.read_bytes()
        flipped = bytearray(good)
        for _ in range(3 if good else 0):
            flipped[numbers.randrange(len(good))] ^= 0xFF
        for damaged in (good[: len(good) // 2], bytes(flipped), None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            try:
                assert_same(restore_checkpoint(tmp_path / "7", make_state(1))[0], state)
            except TrainingError as error:
                messages.append(str(error))
            path.write_bytes(good)
    assert len(messages) > 5
    for message in messages:
        assert message.startswith("can't read the checkpoint")
        assert "\n" not in message


def test_the_two_newest_of_each_kind_are_kept(tmp_path):
    state = to_host(make_state())
    for step, best in ((1, None), (2, 2), (3, 2), (4, 4), (5, 5)):
        save_run(tmp_path, step, state, {**RECORD, "best_step": best}, state.params)
    assert saved_steps(tmp_path / LATEST) == [4, 5]
    assert saved_steps(tmp_path / BEST) == [4, 5]


def test_what_a_killed_save_has_left_is_cleared_away(tmp_path):
    unfinished = tmp_path / "7.orbax-checkpoint-tmp"
    (unfinished / "tree").mkdir(parents=True)
    assert saved_steps(tmp_path) == []
    save_checkpoint(tmp_path / "7", to_host(make_state()), RECORD)
    assert [path.name for path in tmp_path.iterdir()] == ["7"]


def test_best_parameters_that_the_latest_state_does_not_know_are_forgotten(tmp_path):
    first, second = to_host(make_state(1)), to_host(make_state(2))
    save_run(tmp_path, 3, first, {**RECORD, "best_step": 3}, first.params)
    # As if a kill had come between the two folders that save_run writes.
    save_checkpoint(tmp_path / BEST / "6", second.params, {**RECORD, "best_step": 6})
    state, best_params, record = restore_run(tmp_path, make_state())
    assert record["best_step"] == 3
    assert_same(state, make_state(1))
    assert_same(best_params, first.params)
    assert saved_steps(tmp_path / BEST) == [3]


def test_a_run_without_checkpoints_restores_nothing(tmp_path):
    assert restore_run(tmp_path, make_state()) is None
    with pytest.raises(TrainingError, match="holds no best checkpoint"):
        load_params(tmp_path, {})


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match="can't write") as raised:
        save_run(tmp_path, 1, to_host(make_state()), RECORD, None)
    assert "\n" not in str(raised.value)
