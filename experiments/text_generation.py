"""Text and dialogue, token by token: how probable unseen texts are to a model, and texts it makes.

    python -m experiments.text_generation                            # Python's reference, embedded
    python -m experiments.text_generation --preset dialogues --data-dir DIR
    python -m experiments.text_generation --preset shakespeare --data-dir DIR
    python -m experiments.text_generation --preset dialogues --resume --prompt "USER: A taxi!"

Trains a causal transformer by maximum likelihood, keeps the parameters that validate best, and
reports the perplexity a word of the test texts beside that of an n-gram of the same tokens after
Kneser and Ney. Both say when a text ends, and that counts. The net sees at most `warm_up + length`
tokens, and of a longer text at least `warm_up` before each that counts. Writes to the run's folder:
`result.json`, `tokenizer.json`, `learning_curve.png`, `transcript.txt` of texts that it makes,
metrics, checkpoints. A run that is done can be resumed to make others.

Results, with command, machine, minutes and seeds, stand in experiments/README.md.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from experiments import program, text_generation_report
from experiments.excerpts import (
    Cut,
    Excerpt,
    Sequences,
    as_list,
    cut,
    draw_excerpts,
    excerpt_loss,
    ratio_over_sequences,
)
from experiments.text_generation_config import PRESETS, Config, check
from experiments.text_generation_data import count_words, load_corpus, to_sequences
from metagen_jax.data.text import BEGIN, save_tokenizer
from metagen_jax.evaluation.estimates import Estimate, estimate, estimate_ratio
from metagen_jax.evaluation.likelihood import evaluate_log_prob
from metagen_jax.evaluation.ngrams import fit_ngrams, ngram_log_prob
from metagen_jax.generative.autoregressive import autoregressive_log_prob
from metagen_jax.generative.likelihoods import categorical_log_prob
from metagen_jax.generative.maximum_likelihood import LogProb
from metagen_jax.gradients import gradients
from metagen_jax.nets.transformer import Transformer
from metagen_jax.parallel import data_parallel, replicate
from metagen_jax.training import FitResult, fit, init_state, train_step
from metagen_jax.types import Params, PRNGKey


def make_net(config: Config, vocab_size: int) -> Transformer:
    """The net that the settings name."""
    return Transformer(
        vocab_size,
        config.max_length,
        width=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        hidden_width=4 * config.width,
        causal=True,
        by_distance=True,
        begin=BEGIN,
    )


def make_log_prob(net: Transformer) -> LogProb:
    """Of an excerpt, in nats: the sum over the tokens that count."""

    def apply(params: Params, excerpt: Excerpt) -> Any:
        return net.apply(params, excerpt.values, method="predict_next")

    def of_tokens(excerpt: Excerpt, logits: Array) -> Array:
        return jnp.where(excerpt.counted, categorical_log_prob(excerpt.values, logits), 0)

    of_one = autoregressive_log_prob(apply, of_tokens)
    return lambda params, excerpt, key: of_one(params, (excerpt,), key)


def train(
    config: Config, net: Transformer, log_prob: LogProb, texts: Sequences, val: Sequences
) -> FitResult:
    """Trains the net; the parameters that validate best are the result."""

    def sample(key: PRNGKey, data: Sequences) -> tuple[Excerpt, Array]:
        return draw_excerpts(
            key, data, count=config.batch_size, length=config.length, warm_up=config.warm_up
        )

    def predict(params: Params, tokens: Array, nothing: Array) -> Any:
        return net.apply(params, tokens, method="predict_next")

    pieces = cut(val, length=config.length, reach=config.warm_up)
    lengths = np.diff(val.starts)

    def validate(params: Params) -> dict[str, float]:
        nats = nats_of(config, log_prob, params, pieces)
        return {"nats": float(ratio_over_sequences(nats, pieces, lengths).mean)}

    warm = optax.warmup_cosine_decay_schedule(
        0.0, config.rate, max(1, config.steps // 20), max(2, config.steps)
    )
    optimizer = optax.adamw(warm, weight_decay=config.weight_decay)
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(net.init)(init_key, texts.values[:1])
    devices = program.devices_for(config.num_devices, config.batch_size)
    grad_fn = data_parallel(gradients(excerpt_loss(predict)), devices=devices)
    state, data = replicate((init_state(params, optimizer, train_key), texts), devices=devices)
    return fit(
        train_step(grad_fn, optimizer, sample),
        state,
        data,
        num_steps=config.steps,
        run_dir=config.run_dir,
        validate=validate,
        validate_every=config.validate_every,
        best_metric=("nats", "min"),
        resume=config.resume,
    )


def nats_of(config: Config, log_prob: LogProb, params: Params, pieces: Cut) -> np.ndarray:
    """The negative log-probability of each piece."""
    return -evaluate_log_prob(
        log_prob,
        params,
        pieces.excerpts,
        key=jax.random.key(0),  # Nothing is drawn.
        chunk=config.chunk,
        devices=jax.local_devices()[: config.num_devices],
    ).per_task


def main(config: Config) -> dict[str, Any]:
    """Trains, tests, prints the table, makes texts; gives the numbers by name."""
    check(config)
    corpus = load_corpus(config)
    tokenizer = corpus.tokenizer
    save_tokenizer(tokenizer, config.run_dir / "tokenizer.json")
    prompts = text_generation_report.prompts_asked(config, corpus)
    texts, val, test = (to_sequences(tokenizer, x) for x in (corpus.train, corpus.val, corpus.test))
    words = count_words(corpus.test)
    counts = " / ".join(f"{len(x.starts) - 1:,}" for x in (texts, val, test))
    print(f"{config.dataset}: {counts} texts for training / validation / test")
    net = make_net(config, tokenizer.get_vocab_size())
    log_prob = make_log_prob(net)
    print(f"training a transformer on {len(texts.values):,} tokens")
    result = train(config, net, log_prob, texts, val)
    params = result.best_params
    print("testing")
    pieces = cut(test, length=config.length, reach=config.warm_up)
    nats = nats_of(config, log_prob, params, pieces)
    ngrams = fit_ngrams(as_list(texts), order=config.ngram, num_tokens=tokenizer.get_vocab_size())
    by_ngrams = np.array([-ngram_log_prob(ngrams, tokens).sum() for tokens in as_list(test)])
    a_word = {
        "transformer": ratio_over_sequences(nats, pieces, words),
        f"Kneser-Ney {config.ngram}-gram": estimate_ratio(by_ngrams, words),
    }
    numbers = {
        "num_test": len(words),
        "num_test_words": int(words.sum()),
        "num_test_tokens": len(test.values),
        **compare(*a_word.values()),
        "vocab_size": tokenizer.get_vocab_size(),
        "num_parameters": sum(x.size for x in jax.tree.leaves(params)),
        "validation_nats_a_token": result.best_validation["nats"],
        "best_step": result.best_step,
        "train_seconds": round(result.train_seconds, 1),
        "validation_seconds": round(result.validation_seconds, 1),
        "excerpts_per_second": round(result.steps_per_second * config.batch_size, 2),
    }
    text_generation_report.print_table(config, numbers, a_word)
    text_generation_report.draw_learning_curve(config)
    text_generation_report.write_transcript(config, net, params, tokenizer, prompts)
    return numbers


def compare(of_net: Estimate, of_ngrams: Estimate) -> dict[str, float]:
    """Nats and perplexity a word of both, and how many more nats the n-gram needs."""
    gain = estimate(of_ngrams.per_task - of_net.per_task)
    numbers = {"gain_nats_a_word": float(gain.mean), "gain_interval": float(gain.interval)}
    for name, of in (("transformer", of_net), ("ngram", of_ngrams)):
        numbers |= {
            f"{name}_nats_a_word": float(of.mean),
            f"{name}_nats_interval": float(of.interval),
            f"{name}_perplexity": float(np.exp(of.mean)),
        }
    return numbers


if __name__ == "__main__":
    program.run("text_generation", main, PRESETS, default="topics")
