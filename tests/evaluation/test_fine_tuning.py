"""Fine-tuning: whose labels are used, what is trained, how the rate is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.errors import UserError
from metagen_jax.evaluation.fine_tuning import fine_tune, share_of_labels
from metagen_jax.nets.mlp import MLP

KEY = jax.random.key(0)
NET = MLP((4,), 2)


def images_and_labels(seed, num):
    images = np.random.default_rng(seed).normal(size=(num, 30)).astype(np.float32)
    return images, (images[:, :10].sum(1) > 0).astype(np.int32)


SETS = [images_and_labels(seed, num) for seed, num in ((0, 400), (1, 200), (2, 500))]
# Without biases all that no hidden unit sees would be a tie.
START = jax.tree.map(lambda x: x + 0.01 * jnp.arange(x.shape[-1]), NET.init(KEY, SETS[0][0]))


def tuned(params=START, sets=SETS, **changes):
    options = {"fraction": 1.0, "num_steps": 150, "batch_size": 32, "rates": (0.05,), "key": KEY}
    return fine_tune(NET.apply, params, *sets, **{**options, **changes})


def test_shares_are_of_each_class_and_within_one_another():
    labels = np.repeat([0, 1, 2], [100, 50, 3])
    few, more = share_of_labels(labels, 0.1), share_of_labels(labels, 0.5)
    assert np.bincount(labels[few]).tolist() == [10, 5, 1]
    assert np.bincount(labels[more]).tolist() == [50, 25, 2]
    assert set(few) <= set(more)
    assert len(np.unique(more)) == len(more)
    np.testing.assert_array_equal(share_of_labels(labels, 1.0), np.arange(153))
    for fraction in (0.0, 1.1):
        with pytest.raises(UserError, match=r"fraction is .*; give more than 0 and at most 1"):
            share_of_labels(labels, fraction)


@pytest.mark.slow
def test_more_labels_are_worth_more_and_so_is_what_has_been_learned_before():
    few, all_ = tuned(fraction=0.02), tuned()
    assert (few.num_labels, all_.num_labels) == (8, 400)
    assert few.accuracy < 0.75 < 0.9 < all_.accuracy
    hidden = np.zeros((30, 4), np.float32)
    hidden[:10, :2] = np.array([1, -1]) / np.sqrt(10)
    known = jax.tree.map(jnp.zeros_like, START["params"])
    known["hidden0"]["kernel"] = jnp.asarray(hidden)
    known["head"]["kernel"] = jnp.zeros((4, 2)).at[0, 1].set(1).at[1, 0].set(1)
    assert tuned({"params": known}, fraction=0.02, rates=(1e-3,)).accuracy > 0.9


def test_only_the_chosen_images_are_seen():
    """The others' labels are wrong, and that changes nothing."""
    images, labels = SETS[0]
    chosen = share_of_labels(labels, 0.1)
    spoiled = np.where(np.isin(np.arange(400), chosen)[:, None], images, np.nan)
    assert np.isnan(spoiled).any()
    expected = tuned(fraction=0.1)
    result = tuned(sets=[(spoiled, labels), *SETS[1:]], fraction=0.1)
    assert result.accuracy == expected.accuracy
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(result.params))


def test_the_rate_is_chosen_by_validation_alone():
    """At a rate of nearly nothing the net answers as at first."""
    rates = (1e-9, 0.05)
    train, val, test = SETS
    assert tuned(rates=rates).rate == 0.05
    at_first = np.asarray(NET.apply(START, val[0]).argmax(1))
    flattering = (val[0], at_first)
    result = tuned(sets=(train, flattering, test), rates=rates)
    assert result.rate == 1e-9
    assert result.validation_accuracy == 1
    expected = (np.asarray(NET.apply(START, test[0])).argmax(1) == test[1]).mean()
    assert result.accuracy == pytest.approx(expected)
    with pytest.raises(UserError, match="rates is empty"):
        tuned(rates=())


def test_views_are_trained_on_and_whole_images_are_judged():
    """Where the view hides what tells, nothing can be learned from it."""
    hidden = tuned(augment=lambda key, image: image.at[:10].set(jax.random.normal(key, (10,))))
    assert hidden.accuracy < 0.65 < 0.85 < tuned(augment=lambda key, image: image).accuracy
