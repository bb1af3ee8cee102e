"""The task "order" of `experiments.language`: which of two neighbouring segments comes first."""

import json
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table
from flax import linen as nn
from jaxtyping import Array, Bool

from experiments.language_config import Config
from experiments.language_data import Corpus, pairs_of
from experiments.language_encoder import (
    SPECIAL,
    get_encoder,
    in_blocks,
    mean_features,
    net_of,
    train,
)
from metagen_jax.data.text import PAD, SentencePairs
from metagen_jax.evaluation import plots
from metagen_jax.evaluation.bag_of_words import count_tokens, fit_bags
from metagen_jax.evaluation.estimates import Estimate, estimate, estimate_ratio, percent
from metagen_jax.nets.mlp import MLP
from metagen_jax.self_supervised.sentence_order import sentence_order_loss
from metagen_jax.types import Params

NET, WORDS = "transformer", "bag of words"
_BLOCK_SIZE = 64


def main(config: Config, corpus: Corpus) -> dict[str, Any]:
    """Trains on from the encoder, tests beside a bag of words; gives the numbers by name."""
    train_pairs, val, test = (pairs_of(config, corpus, part) for part in corpus[1:])
    encoder = get_encoder(config, corpus)
    print(f"training by the order of {len(train_pairs.tokens):,} pairs of segments")
    net, head = net_of(config, corpus), MLP((config.width,), 1, activation=nn.tanh)
    head_params = head.init(jax.random.key(config.seed), np.zeros((1, config.width), np.float32))

    def logits(params: Params, tokens: Array, documents: Array, types: Array) -> Array:
        mean = mean_features(net, params["net"], tokens, documents, types)
        outputs = head.apply(params["head"], mean)
        assert isinstance(outputs, jax.Array)
        return outputs[:, 0]

    of_block = jax.jit(logits)

    def validate(params: Params) -> dict[str, float]:
        return {"accuracy": float(is_right(of_block, params, val).mean())}

    result = train(
        config,
        sentence_order_loss(logits),
        {"net": encoder, "head": head_params},
        tuple(train_pairs[:3]),
        validate,
        folder=config.run_dir / "order",
        sizes=(config.tune_steps, config.tune_batch_size, config.tune_rate),
    )
    right = {
        WORDS: words_right(corpus, train_pairs, val, test),
        NET: is_right(of_block, result.best_params, test),
    }
    accuracies = {name: _accuracy(of, test.sources) for name, of in right.items()}
    better = estimate(accuracies[NET].per_task - accuracies[WORDS].per_task)
    print_table(config, accuracies, num_pairs=len(test.tokens))
    draw(config)
    return {
        "num_pairs": {"train": len(train_pairs.tokens), "test": len(test.tokens)},
        "best_step": result.best_step,
        "validation": result.best_validation,
        "train_seconds": round(result.train_seconds, 1),
        "models": {
            name: {"accuracy": float(of.mean), "accuracy_interval": float(of.interval)}
            for name, of in accuracies.items()
        },
        "better_than_words": float(better.mean),
        "better_than_words_interval": float(better.interval),
    }


def is_right(logits, params: Params, pairs: SentencePairs) -> Bool[np.ndarray, "n 2"]:
    """Whether each pair is told right in its own order, and turned round."""
    orders = [
        in_blocks(
            logits, params, *(np.asarray(x[:, order]) for x in pairs[:3]), block_size=_BLOCK_SIZE
        )
        for order in (0, 1)
    ]
    return np.stack([orders[0] > 0, orders[1] <= 0], axis=1)


def words_right(
    corpus: Corpus, train: SentencePairs, val: SentencePairs, test: SentencePairs
) -> Bool[np.ndarray, "n 2"]:
    """The same for a logistic model of how often each token stands in either segment.

    Each pair is seen in both orders, so that the best weights of the second segment are minus those
    of the first: the model of both is that of the difference.
    """

    def differences(pairs: SentencePairs) -> tuple[Any, np.ndarray]:
        tokens, types = (np.concatenate([x[:, 0], x[:, 1]]) for x in (pairs.tokens, pairs.types))
        first, second = (
            count_tokens(
                np.where(types == segment, tokens, PAD),
                num_tokens=corpus.vocab_size,
                ignore=SPECIAL,
            )
            for segment in (0, 1)
        )
        return first - second, np.repeat([1, 0], len(pairs.tokens))

    (bags, labels), of_val, (of_test, expected) = map(differences, (train, val, test))
    classifier = fit_bags(bags, labels, *of_val, num_classes=2)
    right = classifier(of_test).argmax(1) == expected
    return right.reshape(2, -1).T


def _accuracy(right: Bool[np.ndarray, "n 2"], sources: np.ndarray) -> Estimate:
    """The mean over pairs, with an interval that takes texts to be independent."""
    _, text, counts = np.unique(sources, return_inverse=True, return_counts=True)
    return estimate_ratio(np.bincount(text, right.mean(1)), counts)


def print_table(config: Config, accuracies: dict[str, Estimate], *, num_pairs: int) -> None:
    """A row for each model."""
    table = rich.table.Table(
        title=f"The order of {num_pairs:,} pairs of segments of unseen texts of {config.dataset}",
        caption="mean ± 95 % interval over texts, each pair in both orders; chance is 50 %",
    )
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    for name, accuracy in accuracies.items():
        table.add_row(name, percent(accuracy))
    rich.console.Console(width=100).print(table)


def draw(config: Config) -> None:
    """The learning curve."""
    lines = (config.run_dir / "order" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    file = config.run_dir / "learning_curve.png"
    title = f"Order of segments of {config.dataset}"
    plots.plot_learning_curve(map(json.loads, lines), file, title=title, loss_label="Nats a pair")
    print(f"pictures are in {config.run_dir}: {file.name}")
