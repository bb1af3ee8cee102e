"""Learning from the order of time: what comes next, whether frames are in order, which way it runs.

All losses take batches of sequences of one length, `(n, t, ...)`: windows of longer ones, films or
series.

Misra, Zitnick, Hebert: Shuffle and Learn: Unsupervised Learning Using Temporal Order Verification,
2016. Wei, Lim, Zisserman, Freeman: Learning and Using the Arrow of Time, 2018. Srivastava,
Mansimov, Salakhutdinov: Unsupervised Learning of Video Representations Using LSTMs, 2015.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key, Shaped

from metagen_jax.errors import UserError
from metagen_jax.gradients import task_keys
from metagen_jax.self_supervised.simclr import Embed, check_embeddings
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.types import Batch, LossFn, Metrics, Params, PRNGKey

Classify = Callable[[Params, Array], Any]
"""`classify(params, inputs (n, ...)) -> logits (n, 2)`."""

PredictNext = Callable[[Params, Array], Any]
"""`predict(params, frames (n, t, ...)) -> (n, t, ...)`: after each frame the next one, from that
frame and those before it alone."""


class FrameTriple(NamedTuple):
    """Three frames of a sequence, and 1 if the second lies between the others in time, else 0."""

    frames: Shaped[Array, "..."]
    in_order: Int32[Array, "*n"]


def sample_frame_triple(key: PRNGKey, sequence: Shaped[Array, "t *shape"]) -> FrameTriple:
    """Frames `(b, c, d)` in order, or `(b, a, d)` or `(b, e, d)`, of any `a < b < c < d < e`.

    In order with probability 1/2, each of the others with 1/4; all fives are equally likely.
    Section 3.1 of Misra et al. 2016, who choose fives where much moves, and have one in four in
    order. First and third frame are drawn alike in all cases, so that they tell nothing.

    Args:
      key: a typed key.
      sequence: `(t, ...)`, of 5 frames or more.

    Raises:
      UserError: there are fewer.
    """
    if len(sequence) < 5:
        raise UserError(f"the sequence has {len(sequence)} frames; give 5 or more")
    times_key, kind_key = jax.random.split(key)
    times = jnp.sort(jax.random.choice(times_key, len(sequence), (5,), replace=False))
    kind = jax.random.randint(kind_key, (), 0, 4)
    second = jnp.array([2, 2, 0, 4])[kind]
    chosen = times[jnp.stack([jnp.int32(1), second, jnp.int32(3)])]
    return FrameTriple(sequence[chosen], (kind < 2).astype(jnp.int32))


def order_verification_loss(embed: Embed, classify: Classify) -> LossFn:
    """The cross-entropy of whether three frames are in order, in nats; chance is `ln 2`.

    `-mean_i log softmax(classify(embed(x_i), embed(y_i), embed(z_i)))[in order_i]`, of triples from
    `sample_frame_triple`; all frames are embedded by the same net, as one batch.

    Args:
      embed: `(params, frames (3 n, ...)) -> (3 n, features)`.
      classify: `(params, (n, 3 features)) -> (n, 2)`.

    Returns:
      A loss over sequences `(n, t, ...)` with the metric `accuracy`, by chance 1/2. Its key may be
      one key, or one for each sequence. It raises a UserError for sequences of fewer than 5 frames,
      and embeddings that are not vectors.
    """

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        triples = jax.vmap(sample_frame_triple)(_keys(key, batch), batch)
        frames = triples.frames.reshape(-1, *batch.shape[2:])
        z = check_embeddings(embed(params, frames), len(frames))
        of_triples = z.reshape(len(batch), -1)
        return cross_entropy_loss(classify)(params, (of_triples, triples.in_order), key)

    return loss_fn


def arrow_of_time_loss(classify: Classify) -> LossFn:
    """The cross-entropy of whether a sequence runs backward, in nats; chance is `ln 2`.

    Each sequence is turned round with probability 1/2: section 3 of Wei et al. 2018. What a
    recording does by itself, such as a camera that always moves one way, tells as well and is
    to be taken out before.

    Args:
      classify: `(params, sequences (n, t, ...)) -> (n, 2)`, logits of forward and of backward.

    Returns:
      A loss over sequences `(n, t, ...)` with the metric `accuracy`, by chance 1/2. Its key may be
      one key, or one for each sequence.
    """

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        backward = jax.vmap(jax.random.bernoulli)(_keys(key, batch))
        turned = jax.vmap(lambda back, x: jnp.where(back, x[::-1], x))(backward, batch)
        labels = backward.astype(jnp.int32)
        return cross_entropy_loss(classify)(params, (turned, labels), key)

    return loss_fn


def next_frame_loss(predict: PredictNext) -> LossFn:
    """The mean of `(x_{t+1} - predict(x_1, ..., x_t))^2` over all frames but the first.

    The best prediction is the mean of what can follow. See that `predict` is causal: a frame that
    it sees is a frame that it copies.

    Args:
      predict: after each frame the next one; of the last frame nothing is asked.

    Returns:
      A loss over sequences `(n, t, ...)`. It raises a UserError for fewer than 2 frames, or
      predictions of another shape.
    """

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        del key
        _check_frames(batch, num_seen=1)
        seen, following = batch[:, :-1], batch[:, 1:]
        predictions = _check_predictions(predict(params, seen), seen)
        return jnp.square(predictions - following).mean(), {}

    return loss_fn


def future_prediction_loss(predict: PredictNext, *, num_seen: int) -> LossFn:
    """The mean squared error of all frames after the first `num_seen`, by `roll_out`.

    What has been predicted is predicted from: errors that grow are seen, and trained against,
    through all frames. Section 2.2 of Srivastava et al. 2015, whose future predictor is conditioned
    on its last frame.

    Args:
      predict: after each frame the next one.
      num_seen: frames that are given.

    Returns:
      A loss over sequences `(n, t, ...)`, t above `num_seen`. Metric: `last_frame`, the error of
      the last. It raises a UserError for too few frames, or predictions of another shape.
    """

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        del key
        _check_frames(batch, num_seen=num_seen)
        seen, following = batch[:, :num_seen], batch[:, num_seen:]
        predictions = roll_out(predict, params, seen, num_frames=following.shape[1])
        errors = jnp.square(predictions - following)
        return errors.mean(), {"last_frame": errors[:, -1].mean()}

    return loss_fn


def roll_out(
    predict: PredictNext, params: Params, seen: Float[Array, "n t *shape"], *, num_frames: int
) -> Float[Array, "n {num_frames} *shape"]:
    """The frames that follow, each predicted from as many before it as are given at first.

    Args:
      predict: after each frame the next one.
      params: of `predict`.
      seen: `(n, t, ...)`, the first frames.
      num_frames: how many follow.

    Raises:
      UserError: for predictions of another shape.
    """

    def step(window: Array, _) -> tuple[Array, Array]:
        following = _check_predictions(predict(params, window), window)[:, -1:]
        return jnp.concatenate([window[:, 1:], following], axis=1), following[:, 0]

    _, frames = jax.lax.scan(step, seen, length=num_frames)
    return jnp.moveaxis(frames, 0, 1)


def _keys(key: Key[Array, "..."], batch: Array) -> Key[Array, " n"]:
    return task_keys(key, len(batch)) if key.ndim == 0 else key


def _check_frames(batch: Array, *, num_seen: int) -> None:
    if not 1 <= num_seen < batch.shape[1]:
        raise UserError(
            f"{num_seen} frames are seen of sequences of shape {batch.shape}; give (n, t, ...) of "
            "more frames than are seen, and see 1 or more"
        )


def _check_predictions(predictions: Array, frames: Array) -> Array:
    if predictions.shape != frames.shape:
        raise UserError(
            f"predictions have shape {predictions.shape} and frames {frames.shape}; give one for "
            "each frame, of its shape"
        )
    return predictions
