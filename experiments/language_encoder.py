"""The net of `experiments.language`: masked language modelling, and training on from there."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree

from experiments import program
from experiments.language_config import Config
from experiments.language_data import Corpus, draw_batch
from metagen_jax.data import text
from metagen_jax.data.corpora import Documents
from metagen_jax.data.text import MASK, SPECIAL_TOKENS, Rows, pack
from metagen_jax.errors import UserError
from metagen_jax.gradients import gradients
from metagen_jax.nets.transformer import Transformer
from metagen_jax.parallel import data_parallel, map_over_tasks, replicate
from metagen_jax.self_supervised.masked_language import (
    Masked,
    mask_tokens,
    masked_language_model_loss,
    token_losses,
)
from metagen_jax.training import FitResult, fit, init_state, load_params, train_step
from metagen_jax.types import LossFn, Params, PRNGKey

# Of the masks of validation and test, the same for every --seed and unlike any likely one.
VALIDATION_SEED, TEST_SEED = 1_000_000_001, 1_000_000_002
SPECIAL = tuple(range(len(SPECIAL_TOKENS)))
FOLDER = "masked"
"""Of the encoder's own run, where another task first makes one."""
_OF_NET = ("dataset", "vocab_size", "row_length", "width", "depth", "num_heads")
# Rows that a device has at once.
_CHUNK = 32


def net_of(config: Config, corpus: Corpus) -> Transformer:
    """The transformer, which sees both sides."""
    return Transformer(
        vocab_size=corpus.vocab_size,
        max_length=config.row_length,
        width=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        hidden_width=4 * config.width,
        by_distance=True,
        num_types=2,
    )


def encode(
    net: Transformer, params: Params, tokens: Array, documents: Array, types: Array | None = None
) -> Float[Array, "n t width"]:
    """The features of each token, what the other tasks begin with."""
    features = net.apply(params, tokens, documents, types, method="encode")
    assert isinstance(features, jax.Array)
    return features


def mean_over(
    features: Float[Array, "n t width"], there: Bool[Array, "n t"]
) -> Float[Array, "n width"]:
    """The mean over the tokens of each row where `there` is true."""
    return jnp.where(there[..., None], features, 0).sum(1) / jnp.maximum(
        there.sum(1, keepdims=True), 1
    )


def rows_of(config: Config, corpus: Corpus, documents: Documents) -> Rows:
    """Texts as packed rows."""
    return pack(text.encode(corpus.tokenizer, documents.texts), length=config.row_length)


def init_encoder(config: Config, corpus: Corpus) -> Params:
    """The parameters before anything is learned."""
    tokens = jnp.zeros((1, config.row_length), jnp.int32)
    return jax.jit(net_of(config, corpus).init)(jax.random.key(config.seed), tokens)


def train_encoder(config: Config, corpus: Corpus, folder: Path) -> FitResult:
    """Masked language modelling; the parameters that validate best are the result."""
    net, validation = net_of(config, corpus), rows_of(config, corpus, corpus.val)
    loss_fn = masked_language_model_loss(
        net.apply,
        mask=MASK,
        special=SPECIAL,
        vocab_size=corpus.vocab_size,
        share=config.mask_share,
        whole_words=config.whole_words,
        axis_name="tasks",
    )
    masked = hide(config, corpus, validation, VALIDATION_SEED)
    evaluate = hidden_losses(config, net)

    def validate(params: Params) -> dict[str, float]:
        losses, right = evaluate(params, validation, masked)
        return {"loss": float(losses.mean()), "accuracy": float(right.mean())}

    return train(
        config,
        loss_fn,
        init_encoder(config, corpus),
        rows_of(config, corpus, corpus.train)[:3],
        validate,
        folder=folder,
        sizes=(config.steps, config.batch_size, config.rate),
        best_metric=("loss", "min"),
    )


def get_encoder(config: Config, corpus: Corpus) -> Params:
    """The parameters of the run that `encoder` names, or else of one that is made here.

    Raises:
      UserError: that run has other settings or is of another program.
    """
    if config.encoder is None:
        print("masked language modelling")
        return train_encoder(config, corpus, config.run_dir / FOLDER).best_params
    settings = program.read_settings(config.encoder, advice="give the folder of another run")
    for name in _OF_NET:
        if settings.get(name) != getattr(config, name):
            raise UserError(
                f"encoder {config.encoder} has {name} {settings.get(name)} and this run "
                f"{getattr(config, name)}; give it the same"
            )
    return load_params(config.encoder, init_encoder(config, corpus))


def train(
    config: Config,
    loss_fn: LossFn,
    params: Params,
    data: PyTree,
    validate: Callable[[Params], dict[str, float]] | None,
    *,
    folder: Path,
    sizes: tuple[int, int, float],
    best_metric: Any = ("accuracy", "max"),
) -> FitResult:
    """Trains by a loss on random examples of the data; `sizes` are steps, batch and rate."""
    steps, batch_size, rate = sizes
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), max(2, steps))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    devices = program.devices_for(config.num_devices, batch_size)
    state = init_state(params, optimizer, jax.random.key(config.seed))
    state, data = replicate((state, jax.tree.map(jnp.asarray, data)), devices=devices)
    return fit(
        train_step(
            data_parallel(gradients(loss_fn), devices=devices),
            optimizer,
            functools.partial(draw_batch, batch_size=batch_size),
        ),
        state,
        data,
        num_steps=steps,
        run_dir=folder,
        validate=validate,
        best_metric=best_metric,
        resume=config.resume,
    )


def hide(config: Config, corpus: Corpus, rows: Rows, seed: int) -> Masked:
    """Rows in which all chosen tokens are masks, so that nothing of themselves is to be seen."""
    keys = jax.random.split(jax.random.key(seed), len(rows.tokens))

    def of_row(key: PRNGKey, tokens: Array, begins_word: Array) -> Masked:
        return mask_tokens(
            key,
            tokens,
            mask=MASK,
            special=SPECIAL,
            vocab_size=corpus.vocab_size,
            share=config.mask_share,
            kinds=(1.0, 0.0),
            begins_word=begins_word if config.whole_words else None,
        )

    return jax.jit(jax.vmap(of_row))(keys, rows.tokens, rows.begins_word)


def hidden_losses(config: Config, net: Transformer) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """`(params, rows, masked) -> (nats, right)` of all hidden tokens, in the order of reading."""

    def of_row(params: Params, row: tuple[Array, Array, Array]):
        inputs, documents, tokens = row
        logits = net.apply(params, inputs, documents)
        assert isinstance(logits, jax.Array)
        return token_losses(logits, tokens)

    of_rows = over_rows(config, of_row)

    def evaluate(params: Params, rows: Rows, masked: Masked) -> tuple[np.ndarray, np.ndarray]:
        results = of_rows(params, (masked.inputs, rows.documents, rows.tokens))
        losses, right = (np.asarray(x)[np.asarray(masked.chosen)] for x in results)
        return losses, right

    return evaluate


def over_rows(
    config: Config, of_row: Callable[[Params, Any], Any]
) -> Callable[[Params, PyTree], Any]:
    """A function of one row, such as `(tokens, documents)`, for many, on all devices."""
    devices = jax.local_devices()[: config.num_devices]
    return jax.jit(map_over_tasks(of_row, devices=devices, chunk=_CHUNK))
