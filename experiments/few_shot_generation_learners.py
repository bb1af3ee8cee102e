"""The learners of `experiments.few_shot_generation`: each a start, a direction, likelihoods, draws.

Training, checkpoints, validation and test are the same for all.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from experiments.density_model import Model, Shape
from experiments.few_shot_generation_config import Config
from experiments.few_shot_generation_data import conventional_batches, training_episodes
from experiments.few_shot_generation_models import (
    Adaptive,
    Amortised,
    adaptive,
    attention_pixelcnn,
    density_model,
    set_vae,
)
from metagen_jax.evaluation.few_shot import Sample
from metagen_jax.evaluation.likelihood_by_shots import adapted_log_probs
from metagen_jax.generative.set_conditional import set_log_probs, set_loss
from metagen_jax.gradients import gradients
from metagen_jax.meta import update_rules
from metagen_jax.meta.adapt import adapt, with_state
from metagen_jax.meta.maml import maml_loss
from metagen_jax.meta.reptile import reptile_gradients, reptile_over_gradients
from metagen_jax.types import GradFn, MetaParams, Params, PredictFn, PRNGKey

# So that the derivative of Adam's update stays finite; see `metagen_jax.meta.adapt`.
_ADAM = functools.partial(optax.adam, eps_root=1e-8)


class Learner(NamedTuple):
    """What a learner brings.

    Attributes:
      init: `(key, images) -> params`.
      grad_fn: over one task of `sample`; None if nothing is trained.
      sample: `(key, data) -> one task` of training.
      candidates: `params -> {rate: params to test}`, of which validation classes choose one.
      log_probs: `(num_steps, every_step, test) -> PredictFn` of params to test; `test`: as well as
        they can be said. None if they can't.
      draw: `num_steps -> ((params to test, support, key) -> grey values)` of one new image.
      kind: what the likelihoods of the test are.
      takes_steps: whether it adapts by steps.
    """

    init: Callable[[PRNGKey, Array], Params]
    grad_fn: GradFn | None
    sample: Sample
    candidates: Callable[[Params], dict[float, Params]]
    log_probs: Callable[[int, bool, bool], PredictFn] | None
    draw: Callable[[int], Callable[[Params, Array, PRNGKey], Array]]
    kind: str
    takes_steps: bool = True


def make_learner(config: Config, shape: Shape) -> Learner:
    """The learner and the model of the settings."""
    if config.learner == "amortised":
        build = {"set_vae": set_vae, "attention_pixelcnn": attention_pixelcnn}[config.model]
        return amortised(config, build(config, shape))
    if config.model == "gan":
        return figr(config, density_model(config, shape))
    model = adaptive(config, shape)
    if config.learner == "reptile":
        return reptile(config, model)
    if config.learner == "meta_sgd":
        return meta_sgd(config, model)
    if config.learner in ("pretrained", "scratch"):
        return conventional(config, model)
    return maml(config, model)


def maml(config: Config, model: Adaptive) -> Learner:
    """MAML and first-order MAML."""
    loss = maml_loss(
        model.loss_fn,
        inner_optimizer=_inner(config)(config.inner_rate),
        num_steps=config.inner_steps,
        gradient="first_order" if config.learner == "fomaml" else "remat",
    )
    return _by_gradients(
        model,
        model.init,
        gradients(loss),
        training_episodes(config),
        lambda params: {config.inner_rate: _at_rate(params, config.inner_rate)},
        _inner(config),
    )


def meta_sgd(config: Config, model: Adaptive) -> Learner:
    """MAML with a learned rate for each parameter."""

    def init(key: PRNGKey, images: Array) -> MetaParams:
        params = model.init(key, images)
        return MetaParams(params, update_rules.init_meta_sgd(params, rate=config.inner_rate))

    loss = update_rules.learned_rule_loss(
        model.loss_fn, rule=update_rules.meta_sgd, num_steps=config.inner_steps
    )
    return _by_gradients(
        model,
        init,
        gradients(loss),
        training_episodes(config),
        lambda params: {config.inner_rate: params},
        update_rules.meta_sgd,
    )


def reptile(config: Config, model: Adaptive) -> Learner:
    """Reptile; the inner optimiser's second moments go on from task to task, as published."""
    # The published Adam without momentum, which after its first thousand steps is this.
    optimizer = optax.rmsprop(config.inner_rate, decay=0.999, initial_scale=1e-4)

    def init(key: PRNGKey, images: Array) -> MetaParams:
        params = model.init(key, images)
        return MetaParams(params, optimizer.init(params))

    grad_fn = reptile_gradients(
        model.loss_fn, inner_optimizer=optimizer, num_steps=config.inner_steps, carry_state=True
    )
    return _by_gradients(
        model,
        init,
        grad_fn,
        training_episodes(config),
        lambda params: {config.inner_rate: params},
        functools.partial(with_state, optimizer),
    )


def figr(config: Config, model: Model) -> Learner:
    """Reptile over a GAN: it draws, and says of no image how probable it is."""
    optimizer = model.optimizer
    assert optimizer is not None
    grad_fn = reptile_over_gradients(
        model.grad_fn, inner_optimizer=optimizer, num_steps=config.inner_steps
    )

    def draw(num_steps: int) -> Callable[[Params, Array, PRNGKey], Array]:
        def sample(params: Params, support: Array, key: PRNGKey) -> Array:
            adapt_key, sample_key = jax.random.split(key)
            if num_steps and len(support):
                params = adapt(
                    model.grad_fn,
                    params,
                    support,
                    adapt_key,
                    optimizer=optimizer,
                    num_steps=num_steps,
                ).params
            # Few steps don't reach the moving average, of which the model draws.
            return model.sample(params._replace(average=params.generator), sample_key)

        return sample

    return Learner(
        model.init,
        grad_fn,
        training_episodes(config),
        lambda params: {0.0: params},
        None,
        draw,
        model.kind,
    )


def conventional(config: Config, model: Adaptive) -> Learner:
    """Training on images of all classes, or none; then fine-tuning at a rate that is chosen."""
    num_images = config.train_shots + config.num_queries
    trained = config.learner == "pretrained"
    return _by_gradients(
        model,
        model.init,
        gradients(model.loss_fn) if trained else None,
        conventional_batches(config, num_images),
        lambda params: {rate: _at_rate(params, rate) for rate in config.tuned_rates},
        _inner(config),
    )


def amortised(config: Config, model: Amortised) -> Learner:
    """A model that takes the support set in."""
    predictions = {
        test: set_log_probs(model.encode, model.test_log_prob if test else model.log_prob)
        for test in (False, True)
    }

    @functools.cache
    def log_probs(num_steps: int, every_step: bool, test: bool) -> PredictFn:
        del num_steps
        if not every_step:
            return predictions[test]
        return lambda *arguments: predictions[test](*arguments)[None]

    def draw(num_steps: int) -> Callable[[Params, Array, PRNGKey], Array]:
        del num_steps

        def sample(params: Params, support: Array, key: PRNGKey) -> Array:
            return model.sample(params, model.encode(params, support), key)

        return sample

    return Learner(
        model.init,
        gradients(set_loss(model.encode, model.log_prob)),
        training_episodes(config),
        lambda params: {0.0: params},
        log_probs,
        draw,
        model.kind,
        takes_steps=False,
    )


def _by_gradients(
    model: Adaptive,
    init: Callable[[PRNGKey, Array], Params],
    grad_fn: GradFn | None,
    sample: Sample,
    candidates: Callable[[Params], dict[float, Any]],
    rule: update_rules.Rule,
) -> Learner:
    """A learner whose params to test are `MetaParams(init, rule)`."""

    @functools.cache
    def log_probs(num_steps: int, every_step: bool, test: bool) -> PredictFn:
        return adapted_log_probs(
            model.loss_fn,
            model.test_log_prob if test else model.log_prob,
            rule=rule,
            num_steps=num_steps,
            every_step=every_step,
        )

    def draw(num_steps: int) -> Callable[[MetaParams, Array, PRNGKey], Array]:
        def sample(params: MetaParams, support: Array, key: PRNGKey) -> Array:
            adapt_key, sample_key = jax.random.split(key)
            adapted = params.init
            if num_steps and len(support):
                adapted = adapt(
                    gradients(model.loss_fn),
                    params.init,
                    support,
                    adapt_key,
                    optimizer=rule(params.rule),
                    num_steps=num_steps,
                ).params
            return model.sample(adapted, sample_key)

        return sample

    return Learner(init, grad_fn, sample, candidates, log_probs, draw, model.kind)


def _inner(config: Config) -> Callable[..., optax.GradientTransformation]:
    return _ADAM if config.inner_optimizer == "adam" else optax.sgd


def _at_rate(params: Params, rate: float) -> MetaParams:
    return MetaParams(params, jnp.float32(rate))
