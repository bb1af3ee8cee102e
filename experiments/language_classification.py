"""The task "classification" of `experiments.language`: what a text is about, from few labels."""

from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
import rich.table
from flax import linen as nn
from jaxtyping import Array, Bool, Int32

from experiments.language_config import Config
from experiments.language_data import Corpus, bags_of_words
from experiments.language_encoder import (
    encode,
    get_encoder,
    init_encoder,
    mean_over,
    net_of,
    over_rows,
    train,
)
from metagen_jax.data import text
from metagen_jax.data.corpora import Documents
from metagen_jax.data.text import BEGIN, END, PAD
from metagen_jax.errors import UserError
from metagen_jax.evaluation.bag_of_words import fit_bags
from metagen_jax.evaluation.estimates import Estimate, estimate, percent
from metagen_jax.evaluation.figures import COLOURS, finish, new_figure, save
from metagen_jax.nets.mlp import MLP
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.types import Params

SHARES = (0.01, 0.1, 1.0)
ENCODER, SCRATCH, WORDS = "from the encoder", "from scratch", "bag of words"
# Texts that a class must have to be learned and tested.
LEAST = 8
# Of the labels that are given, the same for every --seed.
SHARE_SEED = 1_000_000_003


class Labelled(NamedTuple):
    """Beginnings of texts, each in a row of its own, and their classes."""

    tokens: Int32[np.ndarray, "n t"]
    documents: Int32[np.ndarray, "n t"]
    labels: Int32[np.ndarray, " n"]


def main(config: Config, corpus: Corpus) -> dict[str, Any]:
    """Trains on parts of the labels from both starts; gives the numbers by name."""
    train_texts, val, test = label(config, corpus)
    starts = {ENCODER: get_encoder(config, corpus), SCRATCH: init_encoder(config, corpus)}
    num_classes = int(train_texts.labels.max()) + 1
    orders = np.random.default_rng(SHARE_SEED).permuted(
        np.tile(np.arange(len(train_texts.labels)), (config.num_draws, 1)), axis=1
    )
    results, counts = {}, {}
    for share in SHARES:
        # All of them are one choice.
        draws = orders if share < 1 else orders[:1]
        counts[share] = max(2, round(share * len(train_texts.labels)))
        right = {name: [] for name in (WORDS, *starts)}
        for number, order in enumerate(draws):
            chosen = order[: counts[share]]
            given = Labelled(*(x[chosen] for x in train_texts))
            right[WORDS].append(words_right(corpus, given, val, test, num_classes))
            for name, start in starts.items():
                print(f"{100 * share:g} % of the labels, choice {number + 1}, {name}")
                what = f"{share:g}-{number}-{name.replace(' ', '_')}"
                right[name].append(tune(config, corpus, start, given, test, num_classes, what))
        results[share] = {name: estimate(np.mean(x, 0)) for name, x in right.items()}
    print_table(config, results, counts, num_test=len(test.labels), num_classes=num_classes)
    draw(config, results)
    return {
        "num_classes": num_classes,
        "num_test": len(test.labels),
        "commonest_class": float((test.labels == np.bincount(train_texts.labels).argmax()).mean()),
        "num_labels": {f"{share:g}": count for share, count in counts.items()},
        "accuracies": {f"{share:g}": _numbers(of) for share, of in results.items()},
    }


def label(config: Config, corpus: Corpus) -> list[Labelled]:
    """The texts of all parts whose class has enough of them in training."""
    counts = np.bincount(corpus.train.labels, minlength=len(corpus.train.label_names))
    number = np.where(counts >= LEAST, np.cumsum(counts >= LEAST) - 1, -1).astype(np.int32)
    parts = []
    for documents in corpus[1:]:
        labels = number[documents.labels]
        tokens = beginnings(config, corpus, documents)[labels >= 0]
        rows = tokens, (tokens != PAD).astype(np.int32), labels[labels >= 0]
        parts.append(Labelled(*rows))
    if not all(len(part.labels) for part in parts):
        raise UserError(
            f"no class has {LEAST} texts to learn from, and some to choose by and to test; give a "
            "higher num_test"
        )
    return parts


def beginnings(
    config: Config, corpus: Corpus, documents: Documents
) -> Int32[np.ndarray, "n {config.row_length}"]:
    """Of each text as much as a row holds, with special tokens around it."""
    tokens = np.full((len(documents.texts), config.row_length), PAD, np.int32)
    for row, document in zip(tokens, text.encode(corpus.tokenizer, documents.texts), strict=True):
        kept = np.concatenate([[BEGIN], document.tokens[: config.row_length - 2], [END]])
        row[: len(kept)] = kept
    return tokens


def tune(
    config: Config,
    corpus: Corpus,
    start: Params,
    given: Labelled,
    test: Labelled,
    num_classes: int,
    name: str,
) -> Bool[np.ndarray, " n"]:
    """Trains net and classifier on labelled texts; which test texts are then told right."""
    net = net_of(config, corpus)
    head = MLP((), num_classes, head_init=nn.initializers.zeros)

    def logits(params: Params, rows: tuple[Array, Array]) -> Array:
        features = encode(net, params["net"], *rows)
        outputs = head.apply(params["head"], mean_over(features, rows[1] != 0))
        assert isinstance(outputs, jax.Array)
        return outputs

    head_params = head.init(jax.random.key(config.seed), np.zeros((1, config.width), np.float32))
    result = train(
        config,
        cross_entropy_loss(logits),
        {"net": start, "head": head_params},
        ((given.tokens, given.documents), given.labels),
        None,  # So few labels leave none to choose by: the last parameters are the result.
        folder=config.run_dir / f"classes-{name}",
        sizes=(config.tune_steps, config.tune_batch_size, config.tune_rate),
    )

    def predict(params: Params, row: tuple[Array, Array]) -> Array:
        return logits(params, (row[0][None], row[1][None]))[0].argmax()

    predicted = over_rows(config, predict)(result.best_params, (test.tokens, test.documents))
    return np.asarray(predicted) == test.labels


def words_right(
    corpus: Corpus, given: Labelled, val: Labelled, test: Labelled, num_classes: int
) -> Bool[np.ndarray, " n"]:
    """The same for a logistic model of the words, whose penalty all validation texts choose."""
    bags, of_val, of_test = bags_of_words(corpus, given.tokens, val.tokens, test.tokens)
    fitted = fit_bags(bags, given.labels, of_val, val.labels, num_classes=num_classes)
    return fitted(of_test).argmax(1) == test.labels


def _numbers(of: dict[str, Estimate]) -> dict[str, float]:
    better = estimate(of[ENCODER].per_task - of[SCRATCH].per_task)
    numbers = {}
    for name, value in {**of, "encoder is better by": better}.items():
        numbers |= {name: float(value.mean), f"{name}, interval": float(value.interval)}
    return numbers


def print_table(
    config: Config,
    results: dict[float, dict[str, Estimate]],
    counts: dict[float, int],
    *,
    num_test: int,
    num_classes: int,
) -> None:
    """A row for each share of the labels."""
    table = rich.table.Table(
        title=f"{num_classes} classes of {num_test:,} unseen texts of {config.dataset}",
        caption="accuracy in %, mean ± 95 % interval over test texts; of 1 and 10 % of the labels "
        f"the mean of {config.num_draws} choices; {config.tune_steps} steps each",
    )
    table.add_column("labels")
    for column in (WORDS, SCRATCH, ENCODER, "the encoder is better by"):
        table.add_column(column, justify="right")
    for share, of in results.items():
        better = estimate(of[ENCODER].per_task - of[SCRATCH].per_task)
        cells = [percent(x) for x in (of[WORDS], of[SCRATCH], of[ENCODER], better)]
        table.add_row(f"{100 * share:g} % ({counts[share]:,})", *cells)
    rich.console.Console(width=110).print(table)


def draw(config: Config, results: dict[float, dict[str, Estimate]]) -> None:
    """Accuracies by the share of the labels."""
    figure = new_figure(5.5, 3.4, f"Classes of {config.dataset} from few labels")
    axes = figure.subplots()
    shares = [100 * share for share in results]
    # Beside each other, or equal ones would hide one another.
    for name, colour, aside in zip(
        (ENCODER, SCRATCH, WORDS), COLOURS, (0.95, 1, 1.05), strict=False
    ):
        of = [estimates[name] for estimates in results.values()]
        axes.errorbar(
            [aside * share for share in shares],
            [100 * x.mean for x in of],
            yerr=[100 * x.interval for x in of],
            marker="o",
            color=colour,
            label=name,
        )
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="lower right")
    finish(axes, "Labels (%)", "Accuracy (%), 95 % interval over texts")
    file = config.run_dir / "few_labels.png"
    save(figure, file)
    print(f"the picture is {file}")
