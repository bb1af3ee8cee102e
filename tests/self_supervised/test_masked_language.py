"""Masked tokens by chi-square, the loss by a loop, over devices and chunks, packed or not."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from pixel_models import random_params

from metagen_jax.counted import weighted_by_count
from metagen_jax.data.text import Document, pack
from metagen_jax.errors import UserError
from metagen_jax.gradients import gradients, mean_over_tasks, task_keys
from metagen_jax.nets.transformer import Transformer
from metagen_jax.parallel import data_parallel
from metagen_jax.self_supervised.masked_language import (
    mask_tokens,
    masked_language_model_loss,
    token_losses,
)

VOCAB, MASK, SPECIAL = 11, 4, (0, 2, 3, 4)
NET = Transformer(VOCAB, 16, width=8, depth=1, num_heads=2, hidden_width=8)
OPTIONS = {"mask": MASK, "special": SPECIAL, "vocab_size": VOCAB}
HIDE = functools.partial(mask_tokens, **OPTIONS)
KEY = jax.random.key(3)


def documents(num=9, longest=12):
    rng = np.random.default_rng(0)
    return [
        Document(rng.integers(5, VOCAB, n, np.int32), rng.random(n) < 0.6)
        for n in rng.integers(2, longest, num)
    ]


def rows(length=16):
    return pack(documents(), length=length)


@pytest.mark.parametrize("whole_words", [False, True])
def test_shares_of_chosen_masked_replaced_and_kept_by_chi_square(whole_words):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, 40_000)
    begins = rng.random(len(tokens)) < 0.5
    hide = jax.jit(HIDE)
    inputs, chosen = map(np.asarray, hide(KEY, tokens, begins_word=begins if whole_words else None))
    ordinary = ~np.isin(tokens, SPECIAL)
    assert not chosen[~ordinary].any()
    np.testing.assert_array_equal(inputs[~chosen], tokens[~chosen])
    # By words tokens are not independent, but words are.
    units = ordinary & begins if whole_words else ordinary
    hits, num = chosen[units].sum(), units.sum()
    assert scipy.stats.binomtest(int(hits), int(num), 0.15).pvalue > 1e-3
    found = inputs[chosen & ordinary]
    original = tokens[chosen & ordinary]
    # Of the 10 % replaced one in seven is the token itself.
    others = VOCAB - len(SPECIAL)
    counts = [(found == MASK).sum(), ((found != MASK) & (found != original)).sum()]
    counts.append(len(found) - sum(counts))
    shares = np.array([0.8, 0.1 * (1 - 1 / others), 0.1 + 0.1 / others])
    assert scipy.stats.chisquare(counts, shares * len(found)).pvalue > 1e-3
    replacements = found[(found != MASK) & (found != original)]
    assert not np.isin(replacements, SPECIAL).any()
    assert (
        scipy.stats.chisquare(np.bincount(replacements, minlength=VOCAB)[[1, *range(5, 11)]])[1]
        > 1e-3
    )


def test_words_are_chosen_whole():
    rng = np.random.default_rng(2)
    tokens = rng.integers(5, VOCAB, 3000)
    begins = rng.random(3000) < 0.4
    chosen = np.asarray(HIDE(KEY, tokens, share=0.5, begins_word=begins).chosen)
    for word in np.split(chosen, np.flatnonzero(begins)[1:]):
        assert word.all() or not word.any()
    alone = np.asarray(HIDE(KEY, tokens, share=0.5).chosen)
    np.testing.assert_array_equal(alone[:1], chosen[:1])


def test_all_or_none_can_be_chosen_and_all_of_them_masked():
    tokens = np.array([5, 0, 7, 3])
    everything = HIDE(KEY, tokens, share=1.0, kinds=(1.0, 0.0))
    assert everything.inputs.tolist() == [MASK, 0, MASK, 3]
    assert not HIDE(KEY, tokens, share=0.0).chosen.any()


def test_the_loss_is_that_of_a_loop_over_chosen_tokens():
    with jax.enable_x64(True):
        packed = rows()
        params = random_params(NET, packed.tokens)
        loss_fn = jax.jit(masked_language_model_loss(NET.apply, **OPTIONS, share=0.3))
        loss, metrics = loss_fn(params, packed, KEY)
        hide = jax.vmap(functools.partial(HIDE, share=0.3))
        inputs, chosen = hide(task_keys(KEY, len(packed.tokens)), packed.tokens)
        logits = np.asarray(jax.jit(NET.apply)(params, inputs, packed.documents))
        losses, right = [], []
        for i, j in np.argwhere(chosen):
            target = packed.tokens[i, j]
            losses.append(np.log(np.exp(logits[i, j]).sum()) - logits[i, j, target])
            right.append(logits[i, j].argmax() == target)
        assert len(losses) > 10
        np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-9)
        np.testing.assert_allclose(metrics["accuracy"], np.mean(right), rtol=1e-9)
        assert metrics["count"] == len(losses)


def test_packed_or_each_in_a_row_of_its_own_documents_have_the_same_loss():
    """With everything masked, so that the choice does not depend on the packing."""
    with jax.enable_x64(True):
        packed, apart = rows(16), [pack([d], length=16) for d in documents()]
        alone = [np.concatenate(x) for x in zip(*apart, strict=True)]
        assert len(packed.tokens) < len(alone[0])
        params = random_params(NET, packed.tokens)
        loss_fn = jax.jit(masked_language_model_loss(every_position_apart, **OPTIONS, share=1.0))
        losses = [loss_fn(params, batch, KEY)[0] for batch in (packed, tuple(alone))]
        np.testing.assert_allclose(*losses, rtol=1e-9)


def every_position_apart(params, tokens, documents):
    """The net on inputs that do not depend on what was drawn: nothing but masks."""
    hidden = jnp.where(jnp.isin(tokens, jnp.asarray(SPECIAL[:3])), tokens, MASK)
    return NET.apply(params, hidden, documents)


@pytest.mark.slow
def test_a_label_that_is_not_chosen_changes_nothing_and_a_chosen_one_does():
    packed = rows()
    logits = jax.random.normal(KEY, (*packed.tokens.shape, VOCAB))

    def loss_of(tokens):
        # The net is shown nothing of the tokens.
        loss_fn = masked_language_model_loss(lambda *_: logits, **OPTIONS)
        return loss_fn((), packed._replace(tokens=tokens), KEY)[0]

    keys = task_keys(KEY, len(packed.tokens))
    chosen = np.asarray(jax.vmap(HIDE)(keys, packed.tokens).chosen)
    ordinary = packed.tokens >= 5
    other = np.where(packed.tokens == 5, 6, 5)
    unchosen = np.where(ordinary & ~chosen, other, packed.tokens)
    assert (unchosen != packed.tokens).sum() > 20
    assert loss_of(unchosen) == loss_of(packed.tokens)
    row, column = np.argwhere(chosen)[0]
    changed = packed.tokens.copy()
    changed[row, column] = other[row, column]
    assert loss_of(changed) != loss_of(packed.tokens)


def test_nothing_chosen_has_loss_and_gradient_0():
    packed = rows()
    params = jax.jit(NET.init)(KEY, packed.tokens)
    loss_fn = masked_language_model_loss(NET.apply, **OPTIONS, share=0.0)
    gradient, metrics = jax.jit(gradients(loss_fn))(params, packed, KEY)
    assert metrics["loss"] == metrics["accuracy"] == metrics["count"] == 0
    for x in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("way", ["axis name", "chunks of 1", "chunks of 2"])
@pytest.mark.slow
def test_eight_devices_and_any_chunks_have_the_loss_and_gradient_of_one(way):
    with jax.enable_x64(True):
        packed = jax.tree.map(lambda x: jnp.asarray(np.resize(x, (16, 16))), rows())
        params = random_params(NET, packed.tokens)
        loss_of = functools.partial(
            masked_language_model_loss, NET.apply, **OPTIONS, whole_words=True
        )
        expected = jax.jit(gradients(loss_of()))(params, packed, KEY)
        devices = jax.devices("cpu")[:8]
        if way == "axis name":
            many = data_parallel(gradients(loss_of(axis_name="tasks")), devices=devices)
        else:
            many = weighted_by_count(
                gradients(loss_of()),
                lambda g: data_parallel(mean_over_tasks(g, chunk=int(way[-1])), devices=devices),
            )
        gradient, metrics = jax.jit(many)(params, packed, KEY)
        chex.assert_trees_all_close(gradient, expected[0], rtol=0, atol=1e-12)
        for name in ("loss", "accuracy"):
            np.testing.assert_allclose(metrics[name], expected[1][name], rtol=1e-12)
        # The mean of the devices' means is another number.
        naive = data_parallel(gradients(loss_of()), devices=devices)
        difference = jax.jit(naive)(params, packed, KEY)[1]["loss"] - expected[1]["loss"]
        assert abs(difference) > 1e-3


def test_losses_of_tokens_at_extremes():
    logits = jnp.array([[1e4, -1e4], [1e4, -1e4]])
    losses, right = token_losses(logits, jnp.array([0, 1]))
    np.testing.assert_allclose(losses, [0, 2e4])
    np.testing.assert_array_equal(right, [1, 0])


def test_says_what_is_needed():
    for options, message in (
        ({"share": 1.5}, "share is 1.5 and kinds"),
        ({"kinds": (0.8, 0.3)}, "those of kinds at most 1 together"),
        ({"special": range(VOCAB)}, "all 11 tokens are special"),
    ):
        with pytest.raises(UserError, match=message):
            HIDE(KEY, np.zeros(3, int), **options)
    with pytest.raises(UserError, match="give one vector for each token"):
        masked_language_model_loss(lambda *_: jnp.zeros((2, 5)), **OPTIONS)((), rows(), KEY)
