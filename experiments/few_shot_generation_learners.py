"""The learners of `experiments.few_shot_generation`: each a start, a direction, likelihoods, draws.

Training, checkpoints, validation and test are the same for all.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from experiments.density_model import Model, Shape
from experiments.few_shot_generation_config import LEARNED_RULES, Config
from experiments.few_shot_generation_data import conventional_batches, training_episodes
from experiments.few_shot_generation_models import (
    Adaptive,
    Amortised,
    adaptive,
    attention_pixelcnn,
    density_model,
    set_vae,
)
from experiments.fine_tuning import adam_or_sgd, at_rates
from metagen_jax.evaluation.few_shot import Sample
from metagen_jax.evaluation.generated_examples import Draw
from metagen_jax.evaluation.likelihood_by_shots import adapted_log_probs
from metagen_jax.generative.gan import gan_optimizer
from metagen_jax.generative.maximum_likelihood import LogProb
from metagen_jax.generative.set_conditional import set_log_probs, set_loss
from metagen_jax.gradients import gradients
from metagen_jax.meta import update_rules
from metagen_jax.meta.adapt import adapt, with_state
from metagen_jax.meta.maml import maml_loss
from metagen_jax.meta.reptile import reptile_gradients, reptile_over_gradients
from metagen_jax.types import GradFn, MetaParams, Metrics, Params, PredictFn, PRNGKey

# So that the derivative of Adam's update stays finite; see `metagen_jax.meta.adapt`.
_ADAM = functools.partial(optax.adam, eps_root=1e-8)

Purpose = Literal["validation", "choice", "test"]
"""What likelihoods are for: a choice is among all numbers of steps up to one."""


class Scaled(NamedTuple):
    """A factor of the steps of a rule, and the rule's own parameters."""

    factor: Array
    own: PyTree


class Learner(NamedTuple):
    """What a learner brings.

    Attributes:
      init: `(key, images) -> params`.
      grad_fn: over one task of `sample`; None if nothing is trained.
      sample: `(key, data) -> one task` of training.
      candidates: `params -> {name: params to test}`, of which validation classes choose one; the
        name is the rate of the steps, or says what they are. The first is as in training.
      log_probs: `(num_steps, purpose) -> PredictFn` of params to test; None if they have none.
      draw: `num_steps -> ((params to test, support, keys) -> grey values)` of a new image for each
        key, all after one adaptation.
      kind: what the likelihoods of the test are.
      takes_steps: whether it adapts by steps.
    """

    init: Callable[[PRNGKey, Array], Params]
    grad_fn: GradFn | None
    sample: Sample
    candidates: Callable[[Params], dict[str, Params]]
    log_probs: Callable[[int, Purpose], PredictFn] | None
    draw: Callable[[int], Draw]
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
    if config.learner in LEARNED_RULES:
        return learned_rule(config, model)
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
        lambda params: {f"{config.inner_rate:g}": _at_rate(params, config.inner_rate)},
        _inner(config),
        config.rate_factors,
    )


def learned_rule(config: Config, model: Adaptive) -> Learner:
    """MAML with steps that are learned.

    By a rate for each parameter (Meta-SGD), one for each leaf and step, or matrices for each leaf
    (Meta-Curvature). All are factors of `inner_rate`, which begin at 1: the outer optimiser, whose
    steps are about its rate, 1e-3, would throw rates of 1e-4 themselves about.
    """
    one, num_steps = 1.0, config.inner_steps
    init_factors, of_factors = {
        "meta_sgd": (
            functools.partial(update_rules.init_meta_sgd, rate=one),
            update_rules.meta_sgd,
        ),
        "learned_rates": (
            functools.partial(update_rules.init_per_layer_per_step, num_steps=num_steps, rate=one),
            update_rules.per_layer_per_step,
        ),
        "meta_curvature": (
            update_rules.init_meta_curvature,
            functools.partial(update_rules.meta_curvature, rate=one),
        ),
    }[config.learner]

    def init(key: PRNGKey, images: Array) -> MetaParams:
        params = model.init(key, images)
        return MetaParams(params, init_factors(params))

    def rule(factors: PyTree) -> optax.GradientTransformation:
        return optax.chain(of_factors(factors), optax.scale(config.inner_rate))

    loss = update_rules.learned_rule_loss(model.loss_fn, rule=rule, num_steps=config.inner_steps)
    return _by_gradients(
        model,
        init,
        gradients(loss),
        training_episodes(config),
        lambda params: {"learned": params},
        rule,
        config.rate_factors,
    )


def reptile(config: Config, model: Adaptive) -> Learner:
    """Reptile; the inner optimiser's second moments go on from task to task, as published."""
    # The published Adam without momentum, which after its first thousand steps is this. The scale
    # is that of squared gradients of a loss in nats: from a smaller one first steps would be huge.
    optimizer = optax.rmsprop(config.inner_rate, decay=0.999, initial_scale=1.0)

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
        lambda params: {f"{config.inner_rate:g}": params},
        functools.partial(with_state, optimizer),
        config.rate_factors,
    )


def figr(config: Config, model: Model) -> Learner:
    """Reptile over a GAN: it draws, and says of no image how probable it is."""
    adam = optax.adam(config.inner_rate, b1=0.5)
    optimizer = gan_optimizer(adam, adam)

    def of_pixels(params: Params, images: Array, key: Array) -> tuple[Params, Metrics]:
        return model.grad_fn(params, 255 * images, key)

    grad_fn = reptile_over_gradients(
        of_pixels, inner_optimizer=optimizer, num_steps=config.inner_steps
    )

    def draw(num_steps: int) -> Draw:
        def sample(params: Params, support: Array, keys: Array) -> Array:
            adapt_key, keys = _halves(keys)
            adapted = _adapted(of_pixels, params, support, adapt_key, optimizer, num_steps)
            # Few steps don't reach the moving average, of which the model draws.
            adapted = adapted._replace(average=adapted.generator)
            return jax.lax.map(functools.partial(model.sample, adapted), keys)

        return sample

    return Learner(
        model.init,
        grad_fn,
        training_episodes(config),
        lambda params: {"the GAN's": params},
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
        lambda params: at_rates(params, dict.fromkeys(("adam", "sgd"), config.tuned_rates)),
        functools.partial(adam_or_sgd, adam=_ADAM),
    )


def amortised(config: Config, model: Amortised) -> Learner:
    """A model that takes the support set in."""
    in_validation = set_log_probs(model.encode, model.log_prob)
    at_test = set_log_probs(model.encode, model.test_log_prob)

    def log_probs(num_steps: int, purpose: Purpose) -> PredictFn:
        del num_steps
        return at_test if purpose == "test" else in_validation

    def draw(num_steps: int) -> Draw:
        del num_steps

        def sample(params: Params, support: Array, keys: Array) -> Array:
            memory = model.encode(params, support)
            return jax.lax.map(functools.partial(model.sample, params, memory), keys)

        return sample

    return Learner(
        model.init,
        gradients(set_loss(model.encode, model.log_prob)),
        training_episodes(config),
        lambda params: {"none": params},
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
    candidates: Callable[[Params], dict[str, MetaParams]],
    rule: update_rules.Rule,
    factors: tuple[float, ...] = (1.0,),
) -> Learner:
    """A learner whose params to test are `MetaParams(init, Scaled)`, of each factor some."""
    by_purpose: dict[Purpose, LogProb] = {
        "validation": model.log_prob,
        "choice": model.choice_log_prob,
        "test": model.test_log_prob,
    }

    def scaled_rule(scaled: Scaled) -> optax.GradientTransformation:
        return optax.chain(rule(scaled.own), optax.scale(scaled.factor))

    def scaled_candidates(params: Params) -> dict[str, MetaParams]:
        return {
            name if factor == 1 else f"{factor:g} x {name}": MetaParams(
                tested.init, Scaled(jnp.float32(factor), tested.rule)
            )
            for factor in factors
            for name, tested in candidates(params).items()
        }

    @functools.cache
    def log_probs(num_steps: int, purpose: Purpose) -> PredictFn:
        return adapted_log_probs(
            model.loss_fn,
            by_purpose[purpose],
            rule=scaled_rule,
            num_steps=num_steps,
            every_step=purpose == "choice",
        )

    def draw(num_steps: int) -> Draw:
        def sample(params: MetaParams, support: Array, keys: Array) -> Array:
            adapt_key, keys = _halves(keys)
            grad_fn, optimizer = gradients(model.loss_fn), scaled_rule(params.rule)
            adapted = _adapted(grad_fn, params.init, support, adapt_key, optimizer, num_steps)
            return jax.lax.map(functools.partial(model.sample, adapted), keys)

        return sample

    return Learner(init, grad_fn, sample, scaled_candidates, log_probs, draw, model.kind)


def _adapted(
    grad_fn: GradFn,
    params: Params,
    support: Array,
    key: PRNGKey,
    optimizer: optax.GradientTransformation,
    num_steps: int,
) -> Params:
    """Parameters to draw from: as they are if there is nothing to adapt to."""
    if not (num_steps and len(support)):
        return params
    return adapt(grad_fn, params, support, key, optimizer=optimizer, num_steps=num_steps).params


def _halves(keys: Array) -> tuple[PRNGKey, Array]:
    """A key to adapt with, and one for each draw."""
    first, second = jax.vmap(jax.random.split, out_axes=1)(keys)
    return first[0], second


def _inner(config: Config) -> Callable[..., optax.GradientTransformation]:
    return _ADAM if config.inner_optimizer == "adam" else optax.sgd


def _at_rate(params: Params, rate: float) -> MetaParams:
    return MetaParams(params, jnp.float32(rate))
