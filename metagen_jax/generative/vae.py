"""Variational autoencoders: lower bounds on `log p(x)`, in nats, and the losses that raise them.

    encode = lambda params, x: encoder.apply(params["encoder"], x)       # -> mean, log_std
    decode = lambda params, z: decoder.apply(params["decoder"], z)       # -> logits
    infer = gaussian_inference(encode, decode, lambda x, l: bernoulli_log_prob(x, l).sum())
    vae_loss(infer)                                                      # or
    negative_log_likelihood_loss(importance_weighted_log_prob(infer, num_samples=50))

All functions of a model are of ONE example, any pytree of arrays, so that a condition may come with
it; losses are over batches.

Kingma, Welling: Auto-encoding variational Bayes, 2014.
Burda, Grosse, Salakhutdinov: Importance weighted autoencoders, 2016.
Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling: Improving variational inference with inverse
autoregressive flow, 2016.
Tucker, Lawson, Gu, Maddison: Doubly reparameterized gradient estimators, 2019.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import logsumexp
from jaxtyping import Array, Float, Key

from metagen_jax.errors import UserError
from metagen_jax.generative.likelihoods import gaussian_log_prob, sample_gaussian
from metagen_jax.generative.maximum_likelihood import LogProb
from metagen_jax.gradients import count_tasks, task_keys
from metagen_jax.types import Batch, LossFn, Metrics, Params, PRNGKey

Encode = Callable[[Params, Any], tuple[Array, ...]]
"""`encode(params, x) -> (mean, log_std)` of the Gaussian `q(z | x)`, vectors; with a flow of the
latents a third thing may come with them, the context."""

Decode = Callable[[Params, Array], Any]
"""`decode(params, z) -> parameters of p(x | z)`, such as logits."""

LogLikelihood = Callable[[Any, Any], Float[Array, ""]]
"""`log_likelihood(x, decoded) -> log p(x | z)`, in nats, summed over the example."""

Flow = Callable[[Params, Any, Array], tuple[Array, Array]]
"""`flow(params, context, u) -> (z, log |det dz/du|)`, an invertible map of the latents. The context
is what `encode` gives third, or x if it gives a pair."""


class Inference(NamedTuple):
    """One draw `z` from `q(z | x)`, as far as bounds need it.

    Attributes:
      log_likelihood: `log p(x | z)`.
      log_ratio: `log q(z | x) - log p(z)`, whose mean over draws is the KL divergence.
      kl: KL divergence of `q(z | x)` from `p(z)` in closed form, of each latent; in a hierarchy
        given the latents drawn above it. Where there is no closed form, the draw's own ratio.
    """

    log_likelihood: Float[Array, ""]
    log_ratio: Float[Array, ""]
    kl: Float[Array, " latents"]


Infer = Callable[[Params, Any, PRNGKey], Inference]
"""`infer(params, x, key)`: draws latents for ONE example and says how probable all is."""


def gaussian_kl(
    mean: Float[Array, "*shape"],
    log_std: Float[Array, "*shape"],
    prior_mean: Float[Array, "*#shape"] | float = 0.0,
    prior_log_std: Float[Array, "*#shape"] | float = 0.0,
) -> Float[Array, "*shape"]:
    """KL divergence of one Gaussian from another, of each element, in nats.

    `log s_p - log s_q + (s_q^2 + (m_q - m_p)^2) / (2 s_p^2) - 1/2`: appendix B of Kingma and
    Welling 2014 for the standard normal prior.
    """
    log_ratio = log_std - prior_log_std
    deviations = (mean - prior_mean) * jnp.exp(-prior_log_std)
    # expm1(2 r) - 2 r, and not exp(2 r) - 1 - 2 r, which cancels near r = 0.
    return 0.5 * (jnp.expm1(2 * log_ratio) - 2 * log_ratio + jnp.square(deviations))


def gaussian_inference(
    encode: Encode, decode: Decode, log_likelihood: LogLikelihood, *, flow: Flow | None = None
) -> Infer:
    """Inference with a Gaussian posterior and a standard normal prior.

    `z = mean + std * epsilon`, reparameterised: section 2.4 of Kingma and Welling 2014. With a flow
    `u` is drawn so and `z = flow(u)`, `log q(z | x) = log N(u) - log |det dz/du|`: equation 11 of
    Kingma et al. 2016 if the flow is inverse-autoregressive.

    Args:
      encode: `(params, x) -> (mean, log_std)`, vectors; or `(mean, log_std, context)`.
      decode: `(params, z) -> decoded`.
      log_likelihood: `(x, decoded) -> nats`.
      flow: `(params, context, u) -> (z, log_det)`, the context being x if there is no other; there
        is then no closed form of the KL divergence.
    """

    def infer(params: Params, x: Any, key: PRNGKey) -> Inference:
        mean, log_std, *context = encode(params, x)
        z = sample_gaussian(key, mean, log_std)
        log_posterior = gaussian_log_prob(z, mean, log_std).sum()
        if flow is not None:
            z, log_det = flow(params, context[0] if context else x, z)
            log_posterior -= log_det
        log_ratio = log_posterior - gaussian_log_prob(z, 0.0, 0.0).sum()
        kl = gaussian_kl(mean, log_std) if flow is None else log_ratio[None]
        return Inference(_nats(log_likelihood(x, decode(params, z))), log_ratio, kl)

    return infer


def hierarchical_inference(
    apply: Callable[[Params, Any, PRNGKey], tuple[Any, Any]], log_likelihood: LogLikelihood
) -> Infer:
    """Inference with several levels of Gaussian latents, such as `metagen_jax.nets.vae.LadderVAE`.

    `log q(z | x) - log p(z) = sum_i log q(z_i | x, z_>i) - log p(z_i | z_>i)`.

    Args:
      apply: `(params, x, key) -> (decoded, levels)`, each level a triple `(z, posterior, prior)`
        whose last two are pairs `(mean, log_std)`.
      log_likelihood: `(x, decoded) -> nats`.
    """

    def infer(params: Params, x: Any, key: PRNGKey) -> Inference:
        decoded, levels = apply(params, x, key)
        log_ratio = sum(
            (gaussian_log_prob(z, *posterior) - gaussian_log_prob(z, *prior)).sum()
            for z, posterior, prior in levels
        )
        kl = [gaussian_kl(*posterior, *prior) for _, posterior, prior in levels]
        return Inference(
            _nats(log_likelihood(x, decoded)), jnp.asarray(log_ratio), jnp.concatenate(kl)
        )

    return infer


def vae_loss(infer: Infer, *, beta: float = 1.0, free_nats: float = 0.0) -> LossFn:
    """The negative evidence lower bound (ELBO), with the KL divergence in closed form.

    `-1/N sum_n log p(x_n | z_n) + beta sum_i max(free_nats, 1/N sum_n KL_i(x_n))`: equation 10 of
    Kingma and Welling 2014 for `beta = 1` and `free_nats = 0`. Otherwise it bounds nothing; the
    metric `elbo` still does. (The bound whose KL divergence is the draw's own, of more variance,
    is `negative_log_likelihood_loss(importance_weighted_log_prob(infer, num_samples=1))`.)

    Args:
      infer: of one example.
      beta: weight of the KL divergence (Higgins et al. 2017, beta-VAE).
      free_nats: what each latent may cost without being pressed, the free bits of Kingma et al.
        2016 (equation 15), averaged over the batch, or a device's share of it.

    Returns:
      A loss over batches, with the metrics `elbo` and `kl`, in nats an example. The key may be one
      key, of which example `n` gets `fold_in(key, n)`, or one for each example.

    Raises:
      UserError: for a negative `beta` or `free_nats`.
    """
    for name, value in (("beta", beta), ("free_nats", free_nats)):
        if value < 0:
            raise UserError(f"{name} is {value}; give 0 or more")

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        keys = task_keys(key, count_tasks(batch)) if key.ndim == 0 else key
        drawn = jax.vmap(infer, in_axes=(None, 0, 0))(params, batch, keys)
        log_likelihood, kl = drawn.log_likelihood.mean(), drawn.kl.mean(axis=0)
        penalty = beta * jnp.maximum(kl, free_nats).sum()
        return penalty - log_likelihood, {"elbo": log_likelihood - kl.sum(), "kl": kl.sum()}

    return loss_fn


def importance_weighted_log_prob(infer: Infer, *, num_samples: int) -> LogProb:
    """A bound on `log p(x)` that rises with the number of samples.

    `log 1/K sum_k p(x, z_k) / q(z_k | x)`: equation 8 of Burda et al. 2016, the ELBO for K = 1. By
    `negative_log_likelihood_loss` it trains an importance weighted autoencoder.

    Args:
      infer: of one example.
      num_samples: K; all are held in memory at once. `metagen_jax.evaluation.likelihood` takes
        thousands, a chunk at a time.

    Returns:
      `(params, x, key) -> nats`; sample `k` has `fold_in(key, k)`.

    Raises:
      UserError: for fewer than one sample.
    """
    _check_num_samples(num_samples)

    def log_prob(params: Params, x: Any, key: PRNGKey) -> Array:
        keys = task_keys(key, num_samples)
        drawn = jax.vmap(infer, in_axes=(None, None, 0))(params, x, keys)
        return log_mean_exp(drawn.log_likelihood - drawn.log_ratio)

    return log_prob


def doubly_reparameterized_log_prob(
    encode: Encode, decode: Decode, log_likelihood: LogLikelihood, *, num_samples: int
) -> LogProb:
    """The importance weighted bound with the gradient estimator DReG for the encoder.

    The value is that of `importance_weighted_log_prob`. The encoder's gradient is
    `sum_k w_k^2 d log W_k / dz_k dz_k/dphi`, W_k the weights and w_k their shares: equation 8 of
    Tucker et al. 2019. It is unbiased as the plain one is, but its signal does not drown in noise
    as K grows; and it vanishes where q is the exact posterior. All other parameters have their
    plain gradient. Only first derivatives are meant: those of the estimator are not the bound's.

    Args:
      encode: as in `gaussian_inference`. Parameters that it shares with `decode` are right too.
      decode: as in `gaussian_inference`.
      log_likelihood: as in `gaussian_inference`.
      num_samples: K, all in memory at once.

    Returns:
      `(params, x, key) -> nats`, the same draws as those of `importance_weighted_log_prob`.

    Raises:
      UserError: for fewer than one sample.
    """
    _check_num_samples(num_samples)

    def log_prob(params: Params, x: Any, key: PRNGKey) -> Array:
        mean, log_std, *_ = encode(params, x)
        draw = jax.vmap(sample_gaussian, in_axes=(0, None, None))
        z = draw(task_keys(key, num_samples), mean, log_std)
        fixed_mean, fixed_log_std = jax.lax.stop_gradient((mean, log_std))

        def log_weight(z: Array) -> Array:
            log_posterior = gaussian_log_prob(z, fixed_mean, fixed_log_std).sum()
            log_prior = gaussian_log_prob(z, 0.0, 0.0).sum()
            return _nats(log_likelihood(x, decode(params, z))) + log_prior - log_posterior

        # The same values twice, which the compiler computes once.
        shares = jax.nn.softmax(jax.lax.stop_gradient(jax.vmap(log_weight)(z)))
        return log_mean_exp(jax.vmap(log_weight)(_scale_gradient(z, shares[:, None])))

    return log_prob


def log_mean_exp(log_weights: Float[Array, " samples"]) -> Float[Array, ""]:
    """`log 1/K sum_k exp(log_weights[k])`."""
    return logsumexp(log_weights) - math.log(len(log_weights))


@jax.custom_vjp
def _scale_gradient(x: Array, factor: Array) -> Array:
    """`x`, whose gradient is multiplied by `factor`."""
    del factor
    return x


def _save_factor(x: Array, factor: Array) -> tuple[Array, Array]:
    return x, factor


def _multiply(factor: Array, cotangent: Array) -> tuple[Array, Array]:
    return factor * cotangent, jnp.zeros_like(factor)


_scale_gradient.defvjp(_save_factor, _multiply)


def _nats(log_likelihood: Array) -> Array:
    if jnp.shape(log_likelihood) != ():
        raise UserError(
            f"the log-likelihood has shape {jnp.shape(log_likelihood)}; give one number, summed "
            "over the example"
        )
    return log_likelihood


def _check_num_samples(num_samples: int) -> None:
    if num_samples < 1:
        raise UserError(f"num_samples is {num_samples}; give a positive number")
