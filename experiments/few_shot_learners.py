"""The learners of `experiments.few_shot`: each a start, a direction over one episode, an answer.

Training, checkpoints, validation and test are the same for all.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from experiments.few_shot_config import Config, LearnerName
from metagen_jax.evaluation.few_shot import both_modes
from metagen_jax.gradients import gradients
from metagen_jax.meta import metric, update_rules
from metagen_jax.meta.adapt import with_state
from metagen_jax.meta.cavia import cavia_loss, cavia_params, cavia_predict
from metagen_jax.meta.implicit import implicit_maml_gradients, implicit_maml_predict
from metagen_jax.meta.maml import maml_loss, maml_predict
from metagen_jax.meta.proto_maml import proto_maml_loss, proto_maml_predict
from metagen_jax.meta.reptile import mini_batches, reptile_gradients
from metagen_jax.nets.context_embedding import FullContextEmbedding
from metagen_jax.nets.conv4 import Conv4
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.types import (
    Batch,
    Episode,
    GradFn,
    LossFn,
    MetaParams,
    Metrics,
    Params,
    PredictFn,
    PRNGKey,
    Trainable,
)


class Learner(NamedTuple):
    """What a learner brings.

    Attributes:
      init: `(key, images) -> params`.
      grad_fn: over one `Episode`, or over `(Episode, values of the schedule)`.
      predict: `{mode: logits (steps + 1, queries, ways)}`.
      schedule: what changes in the course of training; see `train_step`.
    """

    init: Callable[[PRNGKey, Array], Params]
    grad_fn: GradFn
    predict: PredictFn
    schedule: Callable[[Array], PyTree] | None = None


def make_net(config: Config, num_outputs: int | None) -> Conv4:
    """The four-block net with so many outputs, or without a head."""
    return Conv4(num_outputs, config.num_filters, config.strided, config.norm, config.matmul_dtype)


def maml(config: Config, *, first_order: bool = False, trainable: Trainable | None = None):
    """MAML, first-order MAML, ANIL and BOIL."""
    net = make_net(config, config.num_ways)
    loss_fn = cross_entropy_loss(net.apply)
    inner: dict[str, Any] = {
        "inner_optimizer": optax.sgd(config.inner_rate),
        "trainable": trainable,
    }
    gradient = "first_order" if first_order else "remat"
    loss = maml_loss(loss_fn, num_steps=config.inner_steps, gradient=gradient, **inner)
    predict = maml_predict(
        loss_fn, both_modes(net.apply), num_steps=config.test_steps, every_step=True, **inner
    )
    return Learner(net.init, gradients(loss), predict)


def reptile(config: Config) -> Learner:
    """Reptile; the inner optimiser's second moments go on from task to task, as published."""
    net = make_net(config, config.num_ways)
    loss_fn = cross_entropy_loss(net.apply)
    # The published Adam without momentum, which after its first thousand steps is this.
    optimizer = optax.rmsprop(config.inner_rate, decay=0.999, initial_scale=1e-4)

    def init(key: PRNGKey, images: Array) -> MetaParams:
        params = net.init(key, images)
        return MetaParams(params, optimizer.init(params))

    grad_fn = reptile_gradients(
        loss_fn,
        inner_optimizer=optimizer,
        num_steps=config.inner_steps,
        batch_at=None if config.inner_batch is None else mini_batches(config.inner_batch),
        carry_state=True,
    )
    predict = update_rules.learned_rule_predict(
        loss_fn,
        both_modes(net.apply),
        rule=functools.partial(with_state, optimizer),
        num_steps=config.test_steps,
        every_step=True,
    )
    return Learner(init, grad_fn, predict)


def implicit(config: Config) -> Learner:
    """iMAML."""
    net = make_net(config, config.num_ways)
    loss_fn = cross_entropy_loss(net.apply)
    inner: dict[str, Any] = {
        "inner_optimizer": optax.sgd(config.inner_rate),
        "strength": config.strength,
    }
    grad_fn = implicit_maml_gradients(
        loss_fn,
        num_steps=config.inner_steps,
        num_cg_steps=config.cg_steps,
        damping=config.cg_damping,
        **inner,
    )
    predict = implicit_maml_predict(
        loss_fn, both_modes(net.apply), num_steps=config.test_steps, every_step=True, **inner
    )
    return Learner(net.init, grad_fn, predict)


def learned_rule(config: Config, init_rule: Callable[[Params], PyTree], rule: update_rules.Rule):
    """Meta-SGD and Meta-Curvature: MAML whose update rule is learned too."""
    net = make_net(config, config.num_ways)
    loss_fn = cross_entropy_loss(net.apply)

    def init(key: PRNGKey, images: Array) -> MetaParams:
        params = net.init(key, images)
        return MetaParams(params, init_rule(params))

    loss = update_rules.learned_rule_loss(loss_fn, rule=rule, num_steps=config.inner_steps)
    predict = update_rules.learned_rule_predict(
        loss_fn, both_modes(net.apply), rule=rule, num_steps=config.test_steps, every_step=True
    )
    return Learner(init, gradients(loss), predict)


def meta_sgd(config: Config) -> Learner:
    """A rate for each parameter."""
    return learned_rule(
        config,
        lambda params: update_rules.init_meta_sgd(params, rate=config.inner_rate),
        update_rules.meta_sgd,
    )


def meta_curvature(config: Config) -> Learner:
    """A matrix for each mode of each leaf, and one fixed rate."""
    return learned_rule(
        config,
        update_rules.init_meta_curvature,
        lambda factors: update_rules.meta_curvature(factors, rate=config.inner_rate),
    )


def maml_plus_plus(config: Config) -> Learner:
    """MAML++: a rate for each layer and step, batch norm's parameters for each step, a loss after
    each step whose weights move to the last in the first tenth of the run, and first-order
    gradients in its first third. (The cosine outer rate is that of every preset.)
    """
    net = make_net(config, config.num_ways)
    loss_fn = cross_entropy_loss(net.apply)
    options: dict[str, Any] = {
        "rule": update_rules.per_layer_per_step,
        "per_step": lambda path: "/norm" in path,
    }

    def init(key: PRNGKey, images: Array) -> MetaParams:
        def for_each_step(path, leaf):
            is_norm = options["per_step"](jax.tree_util.keystr(path, simple=True, separator="/"))
            return jnp.stack([leaf] * (config.inner_steps + 1)) if is_norm else leaf

        params = jax.tree_util.tree_map_with_path(for_each_step, net.init(key, images))
        rates = update_rules.init_per_layer_per_step(
            params, num_steps=config.inner_steps, rate=config.inner_rate
        )
        return MetaParams(params, rates)

    def grad_fn(
        params: MetaParams, batch: tuple[Episode, dict], key: PRNGKey
    ) -> tuple[Params, Metrics]:
        episode, values = batch

        def phase(gradient, weights):
            return gradients(
                update_rules.learned_rule_loss(
                    loss_fn,
                    num_steps=config.inner_steps,
                    query_loss_weights=weights,
                    gradient=gradient,
                    **options,
                )
            )

        # Once all weight is on the last step the queries need not be answered after the others.
        phases = [
            phase("first_order", values["weights"]),
            phase("first_order", None),
            phase("remat", None),
        ]
        return jax.lax.switch(values["phase"], phases, params, episode, key)

    def schedule(step: Array) -> PyTree:
        begins = jnp.array([max(1, config.steps // 10), max(2, config.steps // 3)])
        weights = update_rules.annealed_weights(
            step, num_inner_steps=config.inner_steps, anneal_steps=max(1, config.steps // 10)
        )
        return {"weights": weights, "phase": (step >= begins).sum()}

    predict = update_rules.learned_rule_predict(
        loss_fn, both_modes(net.apply), num_steps=config.test_steps, every_step=True, **options
    )
    return Learner(init, grad_fn, predict, schedule)


def cavia(config: Config) -> Learner:
    """CAVIA: the inner loop moves a context that modulates the third block."""
    net = make_net(config, config.num_ways)

    def apply(params: Params, images: Array, **options) -> Any:
        return net.apply(params["shared"], images, context=params["context"], **options)

    def init(key: PRNGKey, images: Array) -> Params:
        shared = net.init(key, images, context=jnp.zeros(config.num_context))
        return cavia_params(shared, config.num_context)

    loss_fn = cross_entropy_loss(apply)
    optimizer = optax.sgd(config.inner_rate)
    loss = cavia_loss(loss_fn, inner_optimizer=optimizer, num_steps=config.inner_steps)
    predict = cavia_predict(
        loss_fn,
        both_modes(apply),
        inner_optimizer=optimizer,
        num_steps=config.test_steps,
        every_step=True,
    )
    return Learner(init, gradients(loss), predict)


def prototypical(config: Config) -> Learner:
    """Prototypical Networks."""
    net = make_net(config, None)
    num_ways = config.train_ways or config.num_ways
    loss = metric.prototypical_loss(net.apply, num_ways=num_ways, distance=config.distance)
    predict = _without_steps(
        metric.prototypical_predict, net.apply, config.num_ways, distance=config.distance
    )
    return Learner(net.init, gradients(loss), predict)


def matching(config: Config, *, full_context: bool = False) -> Learner:
    """Matching Networks, with or without full context embeddings."""
    net, context = make_net(config, None), FullContextEmbedding()
    num_ways = config.train_ways or config.num_ways

    def init(key: PRNGKey, images: Array) -> Params:
        embed_key, context_key = jax.random.split(key)
        params = {"embed": net.init(embed_key, images)}
        if full_context:
            embedded = net.apply(params["embed"], images)
            params["context"] = context.init(context_key, embedded, embedded)
        return params

    def embed(params: Params, images: Array, **options) -> Any:
        return net.apply(params["embed"], images, **options)

    def contextualise(params: Params, support: Array, queries: Array) -> Any:
        return context.apply(params["context"], support, queries)

    options: dict[str, Any] = {
        "contextualise": contextualise if full_context else None,
        "distance": config.distance,
    }
    loss: LossFn = metric.matching_loss(embed, num_ways=num_ways, **options)
    predict = _without_steps(metric.matching_predict, embed, config.num_ways, **options)
    return Learner(init, gradients(loss), predict)


def proto_maml(config: Config) -> Learner:
    """Proto-MAML: MAML whose head starts from the prototypes of the episode."""
    net = make_net(config, None)
    optimizer = optax.sgd(config.inner_rate)
    loss = proto_maml_loss(
        net.apply,
        num_ways=config.train_ways or config.num_ways,
        inner_optimizer=optimizer,
        num_steps=config.inner_steps,
    )
    predict = each_mode(
        lambda inductive: proto_maml_predict(
            net.apply,
            num_ways=config.num_ways,
            inner_optimizer=optimizer,
            num_steps=config.test_steps,
            every_step=True,
            inductive=inductive,
        )
    )
    return Learner(net.init, gradients(loss), predict)


def _without_steps(make_predict: Callable[..., PredictFn], embed, num_ways: int, **options):
    """The answers of a metric learner in both modes, after its only number of steps, none."""
    answer = each_mode(
        lambda inductive: make_predict(embed, num_ways=num_ways, inductive=inductive, **options)
    )

    def predict(params: Params, support: Batch, inputs: PyTree, key: PRNGKey) -> PyTree:
        return jax.tree.map(lambda x: x[None], answer(params, support, inputs, key))

    return predict


def each_mode(make_predict: Callable[[bool], PredictFn]) -> PredictFn:
    """`{"transductive": ..., "inductive": ...}` of what `make_predict(inductive)` predicts."""
    modes = {"transductive": make_predict(False), "inductive": make_predict(True)}

    def predict(params: Params, support: Batch, inputs: PyTree, key: PRNGKey) -> PyTree:
        return {name: mode(params, support, inputs, key) for name, mode in modes.items()}

    return predict


LEARNERS: dict[LearnerName, Callable[[Config], Learner]] = {
    "maml": maml,
    "fomaml": lambda config: maml(config, first_order=True),
    "anil": lambda config: maml(config, trainable=lambda path: "/head/" in path),
    "boil": lambda config: maml(config, trainable=lambda path: "/head/" not in path),
    "reptile": reptile,
    "imaml": implicit,
    "meta_sgd": meta_sgd,
    "maml_plus_plus": maml_plus_plus,
    "meta_curvature": meta_curvature,
    "cavia": cavia,
    "prototypical": prototypical,
    "matching": matching,
    "matching_fce": lambda config: matching(config, full_context=True),
    "proto_maml": proto_maml,
}
