"""Generative adversarial networks: the field of two players' gradients, losses and penalties.

    grad_fn = gan_gradients(generate, score, losses=NON_SATURATING, penalty=penalty)
    optimizer = gan_optimizer(optax.adam(2e-4, b1=0.5), optax.adam(2e-4, b1=0.5))
    step = train_step(grad_fn, optimizer, sample, update_slow=update_slow)

Where the players hold leaves that follow others, a moving average of the generator and the vectors
of spectral norms (`metagen_jax.nets.spectral_norm`), the training step moves them:

    def update_slow(params, batch, key):
        average = optax.incremental_update(params.generator, params.average, 1e-3)
        return params._replace(average=average)

Goodfellow et al.: Generative Adversarial Nets, 2014.
Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville: Improved Training of Wasserstein GANs, 2017.
Mescheder, Geiger, Nowozin: Which Training Methods for GANs do actually Converge?, 2018.
Miyato, Kataoka, Koyama, Yoshida: Spectral Normalization for Generative Adversarial Networks, 2018.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Key, PyTree

from metagen_jax.errors import UserError
from metagen_jax.gradients import count_tasks, gradients, task_keys
from metagen_jax.nets.spectral_norm import is_spectral_vector
from metagen_jax.types import Batch, GradFn, Metrics, Params, PRNGKey

Generate = Callable[[Params, Batch, Key[Array, " n"]], Batch]
"""`generate(generator, batch, keys) -> fakes`, in the form of the real batch, fake `n` from key
`n` alone. A conditional generator takes the labels of the real batch, and hands them on."""

Score = Callable[[Params, Batch], Float[Array, " n"]]
"""`score(discriminator, batch) -> (n,)`, unbounded: larger for what is held real."""

ScoreOne = Callable[[PyTree], Float[Array, ""]]
"""`score(example) -> scalar` of ONE example, any pytree of arrays: an image, or it and a label."""

Penalty = Callable[[ScoreOne, Any, Any, PRNGKey], Float[Array, ""]]
"""`penalty(score, real, fake, key) -> scalar`, of ONE real example and ONE fake, weighted."""

Beside = Callable[[Batch, Batch], tuple[Float[Array, ""], Metrics]]
"""`beside(real, fake) -> (loss, metrics)`, of whole batches."""


class GANParams(NamedTuple):
    """What a GAN trains, and what follows it.

    Attributes:
      generator: moved by the gradient of its own loss.
      discriminator: likewise.
      average: a slow leaf: the moving average of the generator, of which samples are better. None
        for none.
    """

    generator: Any
    discriminator: Any
    average: Any = None


@dataclasses.dataclass(frozen=True)
class ScoreLosses:
    """What each player loses by a score, elementwise: `NON_SATURATING`, `WASSERSTEIN`, `HINGE`.

    The discriminator minimises `mean real(score of data) + mean fake(score of fakes)`, the
    generator `mean generator(score of fakes)`.

    Attributes:
      real: the discriminator's loss by the score of a real example.
      fake: the discriminator's loss by the score of a fake.
      generator: the generator's loss by the score of a fake.
    """

    real: Callable[[Array], Array]
    fake: Callable[[Array], Array]
    generator: Callable[[Array], Array]


NON_SATURATING = ScoreLosses(
    real=lambda score: jax.nn.softplus(-score),
    fake=jax.nn.softplus,
    generator=lambda score: jax.nn.softplus(-score),
)
"""Cross-entropies, scores being logits: `-log D(x)`, `-log(1 - D(G(z)))`, and for the generator
`-log D(G(z))` in place of `log(1 - D(G(z)))` (section 3 of Goodfellow et al. 2014)."""

WASSERSTEIN = ScoreLosses(
    real=lambda score: -score, fake=lambda score: score, generator=lambda score: -score
)
"""Bare scores; for a critic that something keeps Lipschitz, such as `gradient_penalty`."""

HINGE = ScoreLosses(
    real=lambda score: jax.nn.relu(1 - score),
    fake=lambda score: jax.nn.relu(1 + score),
    generator=lambda score: -score,
)
"""Equations 16 and 17 of Miyato et al. 2018."""


def gan_gradients(
    generate: Generate,
    score: Score,
    *,
    losses: ScoreLosses,
    penalty: Penalty | None = None,
    beside: Beside | None = None,
) -> GradFn:
    """The field of a GAN: each player's gradient of its own loss, at the same fakes.

    `(d L_G / d generator, d L_D / d discriminator)`, where
    `L_D = 1/N sum_n real(s(x_n)) + fake(s(G(k_n))) + penalty(s, x_n, G(k_n), k'_n)` and
    `L_G = 1/N sum_n generator(s(G(k_n)))`.

    Nothing in it is held constant but by its own player's differentiation, so that derivatives of
    the field, by both players' parameters, are whole: of `metagen_jax.adapt` over it, or of
    `metagen_jax.meta.maml.maml_gradients`, which meta-learns both initialisations.

    Args:
      generate: `(generator, batch, keys) -> fakes`.
      score: `(discriminator, batch) -> (n,)`.
      losses: of the scores.
      penalty: of the discriminator, such as
        `lambda score, real, fake, key: 10 * gradient_penalty(score, real, fake,
        jax.random.uniform(key))` or `lambda score, real, fake, key: 0.1 * r1_penalty(score, real)`.
        A penalised discriminator must score each example by itself.
      beside: what the generator loses besides, such as an error where what it should make is known.

    Returns:
      A `GradFn` of `GANParams` over batches of `N` examples, any pytree with leading axis `N`,
      zero for `average`. Its key may be one key, of which example `n` gets `fold_in(key, n)`, or
      `N` keys, as `data_parallel` gives them. Metrics: `generator_loss` (with what is lost besides,
      whose own metrics are shown too), `discriminator_loss` (with `penalty`, which is also shown
      alone if there is one), and the mean `real_score` and `fake_score`. It raises a UserError for
      scores of another shape than `(n,)`.
    """

    def scores(discriminator: Params, batch: Batch) -> Float[Array, " n"]:
        values, num_examples = score(discriminator, batch), count_tasks(batch)
        if jnp.shape(values) != (num_examples,):
            raise UserError(
                f"the scores of {num_examples} examples have shape {jnp.shape(values)}; give one "
                f"number for each, shape ({num_examples},)"
            )
        return values

    def discriminator_loss(discriminator: Params, batch: Batch, key) -> tuple[Array, Metrics]:
        real, fake = batch
        real_scores, fake_scores = scores(discriminator, real), scores(discriminator, fake)
        loss = losses.real(real_scores).mean() + losses.fake(fake_scores).mean()
        metrics = {"real_score": real_scores.mean(), "fake_score": fake_scores.mean()}
        if penalty is not None:
            of_one = _penalty_of_one(penalty, functools.partial(scores, discriminator))
            metrics["penalty"] = jax.vmap(of_one)(real, fake, key).mean()
            loss = loss + metrics["penalty"]
        return loss, metrics

    def grad_fn(params: GANParams, batch: Batch, key: Key[Array, "..."]):
        keys = task_keys(key, count_tasks(batch)) if key.ndim == 0 else key
        latent_keys, penalty_keys = jax.vmap(jax.random.split, out_axes=1)(keys)

        def generator_loss(generator: Params, batch: Batch, keys) -> tuple[Array, Metrics]:
            fakes = generate(generator, batch, keys)
            loss = losses.generator(scores(params.discriminator, fakes)).mean()
            if beside is None:
                return loss, {}
            other, metrics = beside(batch, fakes)
            return loss + other, metrics

        of_generator, generator_metrics = gradients(generator_loss)(
            params.generator, batch, latent_keys
        )
        # The compiler sees that these are the fakes that the generator is differentiated at.
        fakes = generate(params.generator, batch, latent_keys)
        of_discriminator, metrics = gradients(discriminator_loss)(
            params.discriminator, (batch, fakes), penalty_keys
        )
        direction = GANParams(
            of_generator, of_discriminator, jax.tree.map(jnp.zeros_like, params.average)
        )
        return direction, {
            "generator_loss": generator_metrics.pop("loss"),
            **generator_metrics,
            "discriminator_loss": metrics.pop("loss"),
            **metrics,
        }

    return grad_fn


def gradient_penalty(
    score: ScoreOne, real: PyTree, fake: PyTree, mix: Float[Array, ""] | float
) -> Float[Array, ""]:
    """`(|grad score(x)| - 1)^2` at `x = mix real + (1 - mix) fake`: a critic of slope one.

    Algorithm 1 of Gulrajani et al. 2017, with `mix` uniform in [0, 1] and a weight of 10.

    Args:
      score: `example -> scalar`.
      real: ONE example, any pytree of arrays; leaves that are not floats, such as a label, are no
        part of `x`, and are those of `real`.
      fake: likewise.
      mix: the share of `real`.

    Returns:
      A scalar. Where the gradient is zero its derivative is taken for zero.
    """

    def between(a, b):
        return mix * a + (1 - mix) * b if jnp.issubdtype(jnp.result_type(a), jnp.floating) else a

    slope = _slope(score, jax.tree.map(between, real, fake))
    return jnp.square(optax.safe_norm(slope, 0.0) - 1)


def r1_penalty(score: ScoreOne, real: PyTree) -> Float[Array, ""]:
    """`1/2 |grad score(x)|^2` at a real example: equation 9 of Mescheder et al. 2018 without gamma.

    Args:
      score: `example -> scalar`.
      real: ONE example, any pytree of arrays; leaves that are not floats are not differentiated.

    Returns:
      A scalar, to be multiplied by gamma: 10 in the paper, about 0.1 for 28x28 images in [-1, 1].
    """
    return jnp.sum(jnp.square(_slope(score, real))) / 2


def gan_optimizer(
    generator: optax.GradientTransformation,
    discriminator: optax.GradientTransformation,
    *,
    critic_steps: int = 1,
) -> optax.GradientTransformation:
    """One optimiser of `GANParams`, which moves each player by its own and no slow leaf.

    Args:
      generator: moves the generator.
      discriminator: moves the discriminator, at every step.
      critic_steps: steps of the discriminator for one of the generator, which moves at the last of
        them; before it neither the generator nor its optimiser's state changes. Its gradient is
        computed at all of them.

    Returns:
      An optax transformation; `average` and the vectors of spectral norms stay as they are,
      whatever weight decay the players' optimisers have.

    Raises:
      UserError: for fewer than one critic step.
    """
    if critic_steps < 1:
        raise UserError(f"critic_steps is {critic_steps}; give 1 or more")
    if critic_steps > 1:

        def generator_moves(step: ArrayLike, **_: Any) -> Array:
            return (jnp.asarray(step) + 1) % critic_steps == 0

        generator = optax.conditionally_mask(generator, generator_moves)

    def labels(params: GANParams) -> GANParams:
        def player(name: str, tree: Params) -> PyTree:
            return jax.tree_util.tree_map_with_path(
                lambda path, _: "slow" if is_spectral_vector(path) else name, tree
            )

        return GANParams(
            player("generator", params.generator),
            player("discriminator", params.discriminator),
            jax.tree.map(lambda _: "slow", params.average),
        )

    transforms: dict[Hashable, optax.GradientTransformation] = {
        "generator": generator,
        "discriminator": discriminator,
        "slow": optax.set_to_zero(),
    }
    return optax.multi_transform(transforms, labels)


def _penalty_of_one(penalty: Penalty, score: Callable[[Batch], Array]) -> Callable:
    """`(real, fake, key) -> scalar` of one example from a score of batches."""

    def score_one(example: Any) -> Array:
        return score(jax.tree.map(lambda x: x[None], example))[0]

    return functools.partial(penalty, score_one)


def _slope(score: ScoreOne, example: PyTree) -> Float[Array, " n"]:
    """The score's gradient by all floats of an example."""
    leaves = jax.tree.leaves(jax.grad(score, allow_int=True)(example))
    return jnp.concatenate([g.ravel() for g in leaves if g.dtype != jax.dtypes.float0])
