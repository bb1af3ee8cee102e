"""The model of both experiments on speech, what it is worth, and what it is compared with."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.excerpts import (
    Cut,
    Excerpt,
    Sequences,
    as_list,
    draw_excerpts,
    excerpt_loss,
    ratio_over_sequences,
)
from experiments.few_shot_speech_config import Config as FewShotConfig
from experiments.speech_config import Config
from metagen_jax.data.audio import mu_law_decode
from metagen_jax.evaluation.estimates import Estimate, estimate_ratio
from metagen_jax.evaluation.likelihood import evaluate_log_prob
from metagen_jax.evaluation.linear_prediction import (
    fit_linear_prediction,
    linear_prediction_log_prob,
)
from metagen_jax.evaluation.ngrams import fit_ngrams, ngram_log_prob
from metagen_jax.generative.autoregressive import autoregressive_log_prob
from metagen_jax.generative.likelihoods import categorical_log_prob
from metagen_jax.generative.maximum_likelihood import LogProb
from metagen_jax.nets.wavenet import WaveNet
from metagen_jax.types import LossFn, Params, PRNGKey

NUM_CODES = 256


def make_net(config: Config | FewShotConfig) -> WaveNet:
    """The net that the settings name."""
    return WaveNet(
        NUM_CODES,
        features=config.num_filters,
        skip_features=config.num_skip,
        dilations=config.dilations,
        num_levels=NUM_CODES,
    )


def told(condition: Array) -> Array | None:
    """The condition as the net takes it: None where there is nothing in it."""
    return condition if condition.shape[-1] else None


def first_params(key: PRNGKey, net: WaveNet, sounds: Sequences) -> Params:
    """Parameters before training, for such conditions as these sounds have."""
    return jax.jit(net.init)(key, sounds.values[:1], told(jnp.asarray(sounds.conditions[0])))


def make_loss(net: WaveNet, *, axis_name: str | None = "tasks") -> LossFn:
    """Nats a sample of excerpts with their conditions; see `excerpt_loss`."""

    def predict(params: Params, codes: Array, conditions: Array) -> Any:
        return net.apply(params, codes, told(conditions))

    return excerpt_loss(predict, axis_name=axis_name)


def draw_batch(
    config: Config | FewShotConfig, key: PRNGKey, sounds: Sequences
) -> tuple[Excerpt, Array]:
    """The excerpts of a step of training, from anywhere in all sounds."""
    return draw_excerpts(
        key, sounds, count=config.batch_size, length=config.excerpt, warm_up=config.warm_up
    )


def make_log_prob(net: WaveNet) -> LogProb:
    """Of an example `(excerpt, condition)`, in nats: the sum over the samples that count."""

    def apply(params: Params, excerpt: Excerpt, condition: Array) -> Any:
        return net.apply(params, excerpt.values, told(condition))

    def of_samples(excerpt: Excerpt, logits: Array) -> Array:
        return jnp.where(excerpt.counted, categorical_log_prob(excerpt.values, logits), 0)

    return autoregressive_log_prob(apply, of_samples)


def bits_a_sample(config: Config, log_prob: LogProb, params: Params, pieces: Cut) -> Estimate:
    """Bits a sample, over recordings."""
    nats = evaluate_log_prob(
        log_prob,
        params,
        (pieces.excerpts, pieces.conditions),
        key=jax.random.key(0),  # Nothing is drawn.
        chunk=config.chunk,
        devices=jax.local_devices()[: config.num_devices],
    ).per_task
    counts = np.bincount(pieces.owners, weights=pieces.excerpts.counted.sum(1)).astype(int)
    return ratio_over_sequences(-nats / np.log(2), pieces, counts)


def key_of(name: str) -> str:
    """A model's name in the numbers of a run."""
    return name.lower().replace(" ", "_").replace("-", "_")


def references(config: Config, train: Sequences, test: Sequences) -> dict[str, Estimate]:
    """Bits a sample of the models that a WaveNet must beat, by name."""
    learn, asked = as_list(train), as_list(test)
    codes = np.arange(NUM_CODES, dtype=np.float64)
    between = codes[1:] - 0.5
    amplitudes, edges = (np.asarray(mu_law_decode(x), np.float64) for x in (codes, between))
    of_amplitudes = fit_linear_prediction(learn, values=amplitudes, edges=edges)
    silence = NUM_CODES // 2
    of_codes = fit_linear_prediction(learn, values=codes - silence, edges=between - silence)
    # Of millions of samples nearly every code has followed every other: what Kneser and Ney count
    # for lower orders tells little here.
    continued, counted = (
        fit_ngrams(learn, order=config.ngram, num_tokens=NUM_CODES, continuation=x)
        for x in (True, False)
    )
    log_probs = {
        "linear prediction of amplitudes": functools.partial(
            linear_prediction_log_prob, of_amplitudes
        ),
        "linear prediction of codes": functools.partial(linear_prediction_log_prob, of_codes),
        f"{config.ngram}-gram": functools.partial(ngram_log_prob, counted),
        f"Kneser-Ney {config.ngram}-gram": functools.partial(ngram_log_prob, continued),
    }
    lengths = np.array([len(x) for x in asked])
    return {
        name: estimate_ratio(np.array([-of(x).sum() for x in asked]) / np.log(2), lengths)
        for name, of in log_probs.items()
    }
