"""What features are worth when labels are few: a whole net trained on some of them.

    net = fine_tune(apply, {"net": pretrained, "head": head}, train, val, test, fraction=0.01, ...)

Beside it stands the same call from parameters that have learned nothing: what labels alone give.

Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual
Representations, 2020, section 6 and appendix B.5.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, Integer, Num

from metagen_jax.errors import UserError
from metagen_jax.evaluation.probes import extract_features
from metagen_jax.gradients import gradients, task_keys
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.types import AnyArray, Batch, Params, PRNGKey

Images = tuple[Num[AnyArray, "_n *shape"], Integer[AnyArray, " _n"]]
"""Images `(n, ...)` and their classes `(n,)`."""


class FineTuned(NamedTuple):
    """A fine-tuned net's test accuracy, a fraction, and how it came about.

    Attributes:
      accuracy: on the test images.
      validation_accuracy: of the rate that was chosen.
      rate: that one.
      num_labels: how many images were learned from.
      params: of the net.
    """

    accuracy: float
    validation_accuracy: float
    rate: float
    num_labels: int
    params: Params


def fine_tune(
    apply: Callable[[Params, Array], Any],
    params: Params,
    train: Images,
    val: Images,
    test: Images,
    *,
    fraction: float,
    key: PRNGKey,
    num_steps: int = 300,
    batch_size: int = 128,
    rates: Sequence[float] = (1e-4, 1e-3),
    augment: Callable[[PRNGKey, Array], Array] | None = None,
) -> FineTuned:
    """Trains all parameters by cross-entropy on a share of each class, and tests them.

    Adam, at a rate that warms up over a tenth of the steps and decays along a cosine; the peak is
    chosen by validation, of which all labels are used.

    Args:
      apply: `(params, images) -> logits (n, classes)`, each image by itself.
      params: what is started from: a net that has learned features and a new head, or one that has
        learned nothing.
      train: images and labels, of which `share_of_labels` takes some.
      val: to choose the rate by.
      test: to report.
      fraction: of the labels.
      key: fixes batches and views; the images are the same for all keys.
      num_steps: of training, for every fraction alike.
      batch_size: images in a step, drawn with replacement.
      rates: to try; among equals the first is taken.
      augment: makes the view of ONE image that is trained on; None takes the image.

    Raises:
      UserError: there are no rates, or the fraction is not in (0, 1].
    """
    if not rates:
        raise UserError("rates is empty; give those to try")
    chosen = share_of_labels(np.asarray(train[1]), fraction)
    data = jnp.asarray(train[0][chosen]), jnp.asarray(train[1][chosen])

    def sample(key: PRNGKey, data: Batch) -> Batch:
        index_key, view_key = jax.random.split(key)
        indices = jax.random.randint(index_key, (batch_size,), 0, len(chosen))
        images, labels = data[0][indices], data[1][indices]
        if augment is not None:
            images = jax.vmap(augment)(task_keys(view_key, batch_size), images)
        return images, labels

    grad_fn = gradients(cross_entropy_loss(apply))
    warmup = max(1, num_steps // 10)
    optimizer = optax.chain(
        optax.scale_by_adam(),
        optax.scale_by_schedule(
            optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, max(num_steps, warmup + 1))
        ),
    )

    # The rate and the images are arguments, so that one program serves all rates.
    @jax.jit
    def step(params: Params, state: optax.OptState, key: PRNGKey, rate: Array, data: Batch):
        direction, _ = grad_fn(params, sample(key, data), key)
        updates, state = optimizer.update(direction, state)
        return optax.apply_updates(params, jax.tree.map(lambda x: -rate * x, updates)), state

    results = []
    for rate in rates:
        tuned, state = params, optimizer.init(params)
        for i in range(num_steps):
            tuned, state = step(tuned, state, jax.random.fold_in(key, i), jnp.float32(rate), data)
        accuracy, of_val = (_accuracy(apply, tuned, *images) for images in (test, val))
        results.append(FineTuned(accuracy, of_val, rate, len(chosen), tuned))
    return max(results, key=lambda result: result.validation_accuracy)


def share_of_labels(labels: Int[np.ndarray, " n"], fraction: float) -> Int[np.ndarray, " _"]:
    """Which examples have labels: the same share of each class, rounded, and at least one.

    Those of a smaller share are among those of a larger one, and do not depend on any seed.

    Args:
      labels: `(n,)`.
      fraction: the share.

    Raises:
      UserError: for a fraction that is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(f"fraction is {fraction}; give more than 0 and at most 1")
    shuffled = np.random.default_rng(0).permutation(len(labels))
    chosen = []
    for label in np.unique(labels):
        of_class = shuffled[labels[shuffled] == label]
        chosen.append(of_class[: max(1, round(fraction * len(of_class)))])
    return np.sort(np.concatenate(chosen))


def _accuracy(apply, params: Params, images: AnyArray, labels: AnyArray) -> float:
    logits = extract_features(apply, params, images)
    return float((logits.argmax(1) == np.asarray(labels)).mean())
