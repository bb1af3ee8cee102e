"""The task "order" of `experiments.language`: which of two neighbouring segments comes first."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import scipy.sparse
from flax import linen as nn
from jaxtyping import Array, Bool

from experiments.language_config import Config
from experiments.language_data import Corpus, bags_of_words, over_texts, pairs_of
from experiments.language_encoder import (
    encode,
    get_encoder,
    mean_over,
    net_of,
    over_rows,
    train,
)
from metagen_jax.data.text import PAD, SentencePairs
from metagen_jax.evaluation import plots
from metagen_jax.evaluation.bag_of_words import fit_bags
from metagen_jax.evaluation.estimates import Estimate, estimate, percent
from metagen_jax.nets.mlp import MLP
from metagen_jax.runs.log import read_metrics
from metagen_jax.self_supervised.sentence_order import sentence_order_loss
from metagen_jax.types import Params

NET, WORDS = "transformer", "bag of words"


def main(config: Config, corpus: Corpus) -> dict[str, Any]:
    """Trains on from the encoder, tests beside a bag of words; gives the numbers by name."""
    train_pairs, val, test = (pairs_of(config, corpus, part) for part in corpus[1:])
    encoder = get_encoder(config, corpus)
    print(f"training by the order of {len(train_pairs.tokens):,} pairs of segments")
    net, head = net_of(config, corpus), MLP((config.width,), 1, activation=nn.tanh)
    both = np.zeros((1, 2 * config.width), np.float32)
    head_params = head.init(jax.random.key(config.seed), both)

    def logits(params: Params, tokens: Array, documents: Array, types: Array) -> Array:
        features = encode(net, params["net"], tokens, documents, types)
        means = [mean_over(features, (documents != 0) & (types == s)) for s in (0, 1)]
        outputs = head.apply(params["head"], jnp.concatenate(means, axis=-1))
        assert isinstance(outputs, jax.Array)
        return outputs[:, 0]

    def of_row(params: Params, row: tuple[Array, Array, Array]) -> Array:
        return logits(params, *(x[None] for x in row))[0]

    of_rows = over_rows(config, of_row)

    def validate(params: Params) -> dict[str, float]:
        return {"accuracy": float(is_right(of_rows, params, val).mean())}

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
        NET: is_right(of_rows, result.best_params, test),
    }
    accuracies = {name: over_texts(of.mean(1), test.sources) for name, of in right.items()}
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


def is_right(of_rows, params: Params, pairs: SentencePairs) -> Bool[np.ndarray, "n 2"]:
    """Whether each pair is told right in its own order, and turned round."""
    rows = [tuple(x[:, order] for x in pairs[:3]) for order in (0, 1)]
    orders = [np.asarray(of_rows(params, x)) for x in rows]
    return np.stack([orders[0] > 0, orders[1] <= 0], axis=1)


def words_right(
    corpus: Corpus, train: SentencePairs, val: SentencePairs, test: SentencePairs
) -> Bool[np.ndarray, "n 2"]:
    """The same for a logistic model of how often each word stands in either segment.

    Each pair is seen in both orders, so that the best weights of the second segment are minus those
    of the first: the model of both is that of the difference.
    """
    parts = train, val, test
    segments = (
        np.concatenate([np.where(x.types[:, 0] == s, x.tokens[:, 0], PAD) for s in (0, 1)])
        for x in parts
    )
    differences, labels = [], [np.repeat([1, 0], len(x.tokens)) for x in parts]
    for bags in bags_of_words(corpus, *segments):
        half = bags.shape[0] // 2
        difference = bags[:half] - bags[half:]
        differences.append(scipy.sparse.vstack([difference, -difference]).tocsr())
    bags, of_val, of_test = differences
    classifier = fit_bags(bags, labels[0], of_val, labels[1], num_classes=2)
    return (classifier(of_test).argmax(1) == labels[2]).reshape(2, -1).T


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
    records = read_metrics(config.run_dir / "order")
    file = config.run_dir / "learning_curve.png"
    title = f"Order of segments of {config.dataset}"
    plots.plot_learning_curve(records, file, title=title, loss_label="Nats a pair")
    print(f"pictures are in {config.run_dir}: {file.name}")
