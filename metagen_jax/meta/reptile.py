"""Reptile: move the initialisation towards what each task makes of it.

Nichol, Achiam, Schulman: On First-Order Meta-Learning Algorithms, 2018.
Clouatre, Demers: FIGR: Few-shot Image Generation with Reptile, 2019.
"""

import jax
import jax.numpy as jnp
import optax

from metagen_jax.errors import UserError
from metagen_jax.gradients import gradients
from metagen_jax.meta.adapt import BatchAt, adapt, with_state
from metagen_jax.types import (
    Batch,
    Episode,
    GradFn,
    LossFn,
    MetaParams,
    Metrics,
    Params,
    PRNGKey,
    Trainable,
)


def reptile_gradients(
    loss_fn: LossFn,
    *,
    inner_optimizer: optax.GradientTransformation,
    num_steps: int,
    batch_at: BatchAt | None = None,
    trainable: Trainable | None = None,
    carry_state: bool = False,
) -> GradFn:
    """Reptile's direction over one `Episode`: from where its support set leads, back to the start.

    `g = theta - theta_K`, theta_K the parameters after K steps on the support set. Nothing is
    differentiated through the steps. An outer SGD of rate epsilon, one task a batch, is the serial
    algorithm 1; on the `mean_over_tasks` it is the batched algorithm 2.

    As published, the inner optimiser is `optax.adam(1e-3, b1=0.0)` on `mini_batches(10)`, a class
    has more shots than at test (10 on Omniglot), and the outer rate falls linearly to zero. The
    authors' program carries Adam's second moments from task to task, and begins with them at test.
    So does `carry_state`, with an optimiser whose state is floats alone, such as
    `optax.rmsprop(1e-3, decay=0.999)`, which is that Adam long after its first steps. Test by
    `maml_predict` with the same optimiser, by `with_state` if its state was carried; whether the
    queries of a task see one another (transduction) is a choice of its `predict_fn`, by
    `transductive` or `inductive` of `metagen_jax.evaluation.few_shot`.

    Args:
      loss_fn: the loss of support and of query, each any pytree.
      inner_optimizer: any optax transformation, its state new for each task unless carried.
      num_steps: inner steps K. One step of SGD gives the rate times the support gradient.
      batch_at: mini-batches for the inner steps, such as `mini_batches(size)`; see `adapt`.
      trainable: which leaves the inner loop moves, by path; None moves all. The others have a
        direction of zero.
      carry_state: params are then `MetaParams(init, rule)`, `rule` the state with which the inner
        optimiser begins, `inner_optimizer.init(init)` at first. Its direction too is from where a
        task leads back to the start, so that an outer SGD of rate 1 takes the tasks' mean. Other
        outer optimisers may make second moments negative.

    Returns:
      A `GradFn` over `Episode(support, query)` whose metrics are those of `loss_fn` on the query
      after the last step, and that `loss`. The query has no part in the direction.
    """
    return reptile_over_gradients(
        gradients(loss_fn),
        inner_optimizer=inner_optimizer,
        num_steps=num_steps,
        batch_at=batch_at,
        trainable=trainable,
        carry_state=carry_state,
    )


def reptile_over_gradients(
    grad_fn: GradFn,
    *,
    inner_optimizer: optax.GradientTransformation,
    num_steps: int,
    batch_at: BatchAt | None = None,
    trainable: Trainable | None = None,
    carry_state: bool = False,
) -> GradFn:
    """Reptile's direction where what is trained is a direction and no loss, as of two players.

    `g = theta - theta_K`, as in `reptile_gradients`, which this is for `gradients(loss_fn)`. Over
    `metagen_jax.generative.gan.gan_gradients` it is FIGR (Clouatre and Demers 2019): both players'
    initialisations move towards what they become on the images of one class.

    Args:
      grad_fn: the direction on support and on query.
      inner_optimizer: as in `reptile_gradients`, and so are the others.
      num_steps: inner steps K.
      batch_at: mini-batches for the inner steps.
      trainable: which leaves the inner loop moves, by path; None moves all.
      carry_state: whether the inner optimiser's state goes on from task to task.

    Returns:
      A `GradFn` over `Episode(support, query)` whose metrics are those of `grad_fn` on the query
      after the last step.
    """

    def direction(params: Params, episode: Episode, key: PRNGKey) -> tuple[Params, Metrics]:
        adapt_key, query_key = jax.random.split(key)
        init, optimizer = params, inner_optimizer
        if carry_state:
            init, optimizer = params.init, with_state(inner_optimizer, params.rule)
        adapted = adapt(
            grad_fn,
            init,
            episode.support,
            adapt_key,
            optimizer=optimizer,
            num_steps=num_steps,
            gradient="first_order",
            trainable=trainable,
            batch_at=batch_at,
        )
        # The direction on the query is not asked for, so that no compiled program computes it.
        _, metrics = grad_fn(adapted.params, episode.query, query_key)
        end = MetaParams(adapted.params, adapted.opt_state) if carry_state else adapted.params
        return optax.tree.sub(params, end), metrics

    return direction


def mini_batches(size: int) -> BatchAt:
    """Mini-batches for the inner steps: `size` examples of the support set, none of them twice.

    Each step draws anew, from its own key. The published program draws without replacement also
    from step to step, until all examples have been seen.

    Args:
      size: examples a batch.

    Returns:
      `batch_at(support, step, key)` for a support set whose leaves have one leading axis of
      examples.

    Raises:
      UserError: if `size` is not positive; from `batch_at`, if the support set has fewer examples
        or its leaves differ in their number.
    """
    if size < 1:
        raise UserError(f"size is {size}; give 1 or more examples a mini-batch")

    def batch_at(support: Batch, step: jax.Array, key: PRNGKey) -> Batch:
        del step
        lengths = sorted({len(x) for x in jax.tree.leaves(support)})
        if len(lengths) != 1 or lengths[0] < size:
            raise UserError(
                f"the leaves of the support set hold {lengths} examples; a mini-batch of {size} "
                f"needs {size} or more, the same number in every leaf"
            )
        chosen = jax.random.permutation(key, lengths[0])[:size]
        return jax.tree.map(lambda x: jnp.take(x, chosen, axis=0), support)

    return batch_at
