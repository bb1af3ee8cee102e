"""What a few-shot learner has to beat: nearest neighbours in pixels, and plain fine-tuning."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from metagen_jax.chunks import Chunk
from metagen_jax.errors import UserError
from metagen_jax.evaluation.estimates import Estimate
from metagen_jax.evaluation.few_shot import Predict, Sample, evaluate_few_shot
from metagen_jax.meta.maml import maml_predict
from metagen_jax.types import Batch, LossFn, MetaParams, Params, PredictFn, PRNGKey, Trainable


def nearest_neighbour_predict(num_ways: int) -> PredictFn:
    """The class of the nearest support example, by Euclidean distance between raw inputs.

    `logits[q, c] = -min_s |x_q - x_s|^2`, s over the support examples of class c; `-inf` for a
    class without any.

    Args:
      num_ways: classes of an episode.

    Returns:
      `predict(params, (inputs, labels), inputs, key) -> logits (queries, ways)`, which ignores
      parameters and key.
    """

    def predict(params: Params, support: Batch, inputs: PyTree, key: PRNGKey) -> Array:
        del params, key
        examples, labels = support
        distances = squared_distances(_flatten(inputs), _flatten(examples))
        is_class = labels == jnp.arange(num_ways)[:, None]
        return -jnp.where(is_class, distances[:, None, :], jnp.inf).min(-1)

    return predict


def squared_distances(
    a: Float[Array, "n features"], b: Float[Array, "m features"]
) -> Float[Array, "n m"]:
    """`|a_i - b_j|^2`, as a matrix product; never negative."""
    squares = jnp.square(a).sum(1)[:, None] + jnp.square(b).sum(1)
    products = jnp.matmul(a, b.T, precision="highest")
    return jnp.maximum(squares - 2 * products, 0)


def fine_tune_predict(
    loss_fn: LossFn,
    predict_fn: Predict,
    *,
    num_ways: int,
    num_steps: int,
    rule: Callable[[Array], optax.GradientTransformation] = optax.sgd,
    trainable: Trainable | None = None,
    every_step: bool = False,
) -> PredictFn:
    """Fine-tunes a classifier of other classes, under a new head, on each support set.

    It is `maml_predict` from parameters that were trained in the conventional way: what is left of
    MAML without meta-training.

    Args:
      loss_fn: the loss to fine-tune by, of a net with `num_ways` outputs.
      predict_fn: `(adapted params, support, inputs) -> logits`; see `few_shot.both_modes`.
      num_ways: classes of an episode.
      num_steps: steps on the support set.
      rule: `rate -> optimiser`.
      trainable: which leaves move, by path; None moves all.
      every_step: predict before the first and after each step, as `maml_predict` does.

    Returns:
      A `PredictFn` of `MetaParams(init, rule)`: the pretrained parameters, whatever the number of
      their outputs, and the rate, which is an array so that trying another does not compile again.
    """

    def predict(params: MetaParams, support: Batch, inputs: PyTree, key: PRNGKey) -> PyTree:
        fine_tuned = maml_predict(
            loss_fn,
            predict_fn,
            inner_optimizer=rule(params.rule),
            num_steps=num_steps,
            trainable=trainable,
            every_step=every_step,
        )
        return fine_tuned(replace_head(params.init, num_ways), support, inputs, key)

    return predict


def replace_head(params: Params, num_outputs: int, *, head: str = "head") -> Params:
    """Parameters with a new head of zeros, under which all classes are equally likely.

    Args:
      params: with leaves below a part named `head`, their last axis the outputs.
      num_outputs: of the new head.
      head: the name of that part.

    Raises:
      UserError: if no part has that name.
    """

    def in_head(path) -> bool:
        return head in jax.tree_util.keystr(path, simple=True, separator="/").split("/")

    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if not any(map(in_head, paths)):
        names = sorted({jax.tree_util.keystr(p, simple=True, separator="/") for p in paths})
        raise UserError(f"none of the parameters {names} is in {head!r}; name the head by `head`")
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros((*x.shape[:-1], num_outputs), x.dtype) if in_head(path) else x,
        params,
    )


class FineTuning(NamedTuple):
    """How to fine-tune, and how well that did on the tasks by which it was chosen."""

    rate: float
    num_steps: int
    accuracy: Estimate


def choose_fine_tuning(
    predict: PredictFn,
    params: Params,
    sample: Sample,
    data: PyTree,
    *,
    key: PRNGKey,
    rates: Sequence[float],
    num_tasks: int = 200,
    chunk: Chunk = "auto",
    devices: Sequence[jax.Device] | None = None,
) -> PyTree:
    """The rate and number of steps with the best mean accuracy on the same validation tasks.

    Args:
      predict: from `fine_tune_predict` with `every_step=True`.
      params: the pretrained parameters.
      sample: `(key, data) -> Episode`.
      data: validation data; test data would flatter the baseline.
      key: fixes the tasks.
      rates: the rates to try; every number of steps up to that of `predict` is tried with each.
      num_tasks: how many tasks.
      chunk: as in `evaluate_few_shot`.
      devices: as in `evaluate_few_shot`.

    Returns:
      The pytree of `predict` with a `FineTuning` for each array of logits. Among equals, the first
      rate and the fewest steps.

    Raises:
      UserError: if there are no rates, or `predict` does not predict at every step.
    """
    if not rates:
        raise UserError("rates is empty; give the learning rates to try")
    runs = [
        evaluate_few_shot(
            predict,
            MetaParams(params, jnp.float32(rate)),
            sample,
            data,
            key=key,
            num_tasks=num_tasks,
            chunk=chunk,
            devices=devices,
        )
        for rate in rates
    ]

    def best(*accuracies: Estimate) -> FineTuning:
        grid = np.stack([accuracy.mean for accuracy in accuracies])
        if grid.ndim != 2:
            raise UserError(
                f"predict gives accuracies of shape {grid.shape[1:]} a task and must give one for "
                "each number of steps; make it with every_step=True"
            )
        rate, step = np.unravel_index(grid.argmax(), grid.shape)
        return FineTuning(float(rates[int(rate)]), int(step), accuracies[int(rate)].at(int(step)))

    return jax.tree.map(best, *runs, is_leaf=lambda x: isinstance(x, Estimate))


def _flatten(inputs: PyTree) -> Float[Array, "n features"]:
    leaves = [x.reshape(len(x), -1).astype(jnp.float32) for x in jax.tree.leaves(inputs)]
    return jnp.concatenate(leaves, axis=1)
